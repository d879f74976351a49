"""Tests of the flags of a binary."""

import dataclasses
import sys
from typing import Literal

import pytest
from absl import flags

from experiments import harness
from experiments.harness import flags as flags_lib


@dataclasses.dataclass(frozen=True)
class Settings:
  steps: int = 10
  rate: float = 0.5
  name: str = 'a'
  fast: bool = False
  sizes: tuple[int, ...] = (1, 2)
  names: tuple[str, ...] = ('a',)
  limit: float | None = None
  mode: Literal['mean', 'max'] = 'mean'
  seeds: int = 3


PRESETS = {'quick': Settings(), 'paper': Settings(steps=1000)}


def parse(*arguments, presets=PRESETS):
  values = flags.FlagValues()
  flags_lib.define(presets, paper='pbgd', binary='toy', values=values)
  values(['toy', *arguments])
  return flags_lib.resolve(presets, paper='pbgd', binary='toy', values=values)


class TestOptions:
  def test_defaults(self, monkeypatch):
    monkeypatch.delenv('BILEVEL_JAX_DATA', raising=False)
    options = parse()
    assert options == harness.Options(
      paper='pbgd',
      binary='toy',
      preset='quick',
      settings=Settings(),
      workdir='runs/pbgd/toy/quick',
      data_dir=None,
      seeds=(0, 1, 2),
    )

  def test_data_dir_comes_from_the_environment(self, monkeypatch):
    monkeypatch.setenv('BILEVEL_JAX_DATA', '/data')
    assert parse().data_dir == '/data'
    assert parse('--data_dir=/other').data_dir == '/other'

  def test_preset_and_its_folder(self):
    options = parse('--preset=paper', '--rate=0.1')
    assert options.settings == Settings(steps=1000, rate=0.1)
    assert options.workdir == 'runs/pbgd/toy/paper'
    assert parse('--workdir=/tmp/here').workdir == '/tmp/here'

  def test_seeds_replace_the_field(self):
    options = parse('--seeds=2')
    assert (options.seeds, options.settings.seeds) == ((0, 1), 2)

  def test_a_preset_without_seeds_has_one(self):
    @dataclasses.dataclass(frozen=True)
    class Small:
      steps: int = 1

    assert parse(presets={'quick': Small()}).seeds == (0,)

  def test_unknown_preset_names_the_known(self):
    with pytest.raises(flags.IllegalFlagValueError, match='quick'):
      parse('--preset=huge')

  def test_several_binaries_in_one_process(self):
    assert parse('--steps=1').settings.steps == 1
    assert parse('--steps=2').settings.steps == 2


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
    found = getattr(flags_lib.override(Settings(), {name: rest}), name)
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
      flags_lib.override(Settings(), {name: rest})
    assert text in str(error.value)

  def test_type_in_the_message(self):
    with pytest.raises(ValueError, match=r'steps takes a value of type int\.'):
      flags_lib.override(Settings(), {'steps': '1.5'})
    with pytest.raises(ValueError, match='sizes takes a list, commas between'):
      flags_lib.override(Settings(), {'sizes': 'a'})
    with pytest.raises(ValueError, match='mode takes one of mean, max'):
      flags_lib.override(Settings(), {'mode': 'min'})


class TestRun:
  """`run` on the process's flags, which are put back afterwards."""

  @pytest.fixture(autouse=True)
  def fresh_flags(self):
    before = set(flags.FLAGS)
    yield
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()

  def run(self, monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, 'argv', ['toy', *arguments])
    with pytest.raises(SystemExit) as stopped:
      harness.run(main, PRESETS, paper='pbgd', binary='toy')
    return stopped.value.code

  def test_calls_main(self, monkeypatch):
    seen = []
    code = self.run(monkeypatch, seen.append, '--steps=7')
    assert not code
    assert seen[0].settings.steps == 7

  def test_user_errors_are_one_line(self, monkeypatch):
    def main(options):
      raise harness.MissingDataError('no data')

    assert self.run(monkeypatch, main) == 'pbgd/toy: no data'

  @pytest.mark.parametrize(
    ('argument', 'message'),
    [
      ('--steps=x', 'steps takes a value of type int'),
      ('--step=1', "Unknown command line flag 'step'. Did you mean: steps"),
      ('steps=1', 'unknown arguments: steps=1'),
    ],
  )
  def test_wrong_usage(self, monkeypatch, argument, message, capsys):
    assert self.run(monkeypatch, print, argument) == 1
    assert message in ''.join(capsys.readouterr())
