"""Tests of settings: from texts, and what numbers they may hold."""

import dataclasses
import math
from typing import Annotated, Literal

import pytest

from experiments import harness
from experiments.harness.app import settings


@dataclasses.dataclass(frozen=True)
class Settings:
  steps: int = 10
  long: Annotated[int, harness.Allowed(high=2**31 - 1)] = 1
  rate: float = 0.5
  name: str = 'a'
  fast: bool = False
  sizes: tuple[int, ...] = (1, 2)
  names: tuple[str, ...] = ('a',)
  limit: float | None = None
  mode: Literal['mean', 'max'] = 'mean'
  share: Annotated[float, harness.Allowed(0.0, 1)] = 0.0
  extra: Annotated[tuple[float, ...], harness.Allowed(empty=True)] = ()


class TestCheck:
  def test_what_is_allowed(self):
    settings.check(Settings())
    settings.check(
      Settings(share=1.0, extra=(2.0,), steps=10**8, long=2**31 - 1)
    )

  @pytest.mark.parametrize(
    ('changes', 'message'),
    [
      ({'steps': 0}, '--steps=0: steps must be at least 1.'),
      ({'steps': 2**31 - 1}, 'steps must be at most 100,000,000.'),
      ({'long': 2**31}, 'long must be at most 2,147,483,647.'),
      ({'rate': -0.1}, '--rate=-0.1: rate must be above 0.'),
      ({'rate': math.nan}, 'rate must be above 0.'),
      ({'rate': math.inf}, '--rate=inf: rate must be finite.'),
      ({'limit': 0.0}, 'limit must be above 0.'),
      ({'sizes': (3, -1)}, '--sizes=-1: sizes must be at least 1.'),
      ({'sizes': ()}, '--sizes=: sizes needs at least one entry.'),
      ({'names': ()}, 'names needs at least one entry.'),
      ({'share': -0.1}, 'share must be at least 0.'),
      ({'share': 1.5}, 'share must be at most 1.'),
      ({'extra': (0.0,)}, 'extra must be above 0.'),
    ],
  )
  def test_what_is_not(self, changes, message):
    with pytest.raises(harness.SettingsError) as error:
      settings.check(Settings(**changes))
    assert str(error.value).endswith(message)


class TestOverride:
  @pytest.mark.parametrize(
    ('text', 'value'),
    [
      ('steps=20', 20),
      ('rate=1', 1.0),
      ('rate=1e-3', 1e-3),
      ('name=x=y z', 'x=y z'),
      ('name=1', '1'),
      ('fast=True', True),
      ('fast=false', False),
      ('sizes=3,4,5', (3, 4, 5)),
      ('sizes=3', (3,)),
      ('sizes=', ()),
      ('names=a,b', ('a', 'b')),
      ('steps=1_000', 1000),
      ('limit=2', 2.0),
      ('limit=None', None),
      ('mode=max', 'max'),
    ],
  )
  def test_values_take_the_type_of_the_field(self, text, value):
    name, _, rest = text.partition('=')
    found = getattr(settings.override(Settings(), {name: rest}), name)
    assert found == value
    assert type(found) is type(value)

  @pytest.mark.parametrize(
    'text',
    [
      'steps=1.5',
      'steps=True',
      'steps=',
      'steps=x',
      'rate=fast',
      'fast=1',
      'sizes=1.5,2',
      'limit=x',
      'mode=min',
    ],
  )
  def test_wrong_type_says_which(self, text):
    name, _, rest = text.partition('=')
    with pytest.raises(ValueError, match=f'{name} takes') as error:
      settings.override(Settings(), {name: rest})
    assert text in str(error.value)

  def test_type_in_the_message(self):
    with pytest.raises(ValueError, match=r'steps takes an integer\.'):
      settings.override(Settings(), {'steps': '1.5'})
    with pytest.raises(ValueError, match='sizes takes a list separated by'):
      settings.override(Settings(), {'sizes': 'a'})
    with pytest.raises(ValueError, match='mode takes one of mean, max'):
      settings.override(Settings(), {'mode': 'min'})


@dataclasses.dataclass(frozen=True)
class Groups:
  small: Settings = Settings()
  ends: tuple[float, float] = (1.0, 2.0)


def test_a_tuple_of_a_length_takes_as_many_values():
  assert settings.override(Groups(), {'ends': '3, 4'}).ends == (3.0, 4.0)
  for text in ('', '3', '3,4,5'):
    with pytest.raises(harness.SettingsError, match='ends takes 2 values'):
      settings.override(Groups(), {'ends': text})


def test_fields_of_groups_are_replaced_by_name():
  changed = harness.replaced(Groups(), {'small.rate': 0.1, 'ends': (0.0, 1.0)})
  assert changed == Groups(Settings(rate=0.1), (0.0, 1.0))
