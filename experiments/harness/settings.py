"""Settings of a run, from texts, and what numbers they may hold.

A number in a settings dataclass is finite and above zero, a list of numbers has
at least one, and a whole number has less than 32 bits, as steps are counted,
unless the annotation of the field says otherwise:

    noise: Annotated[float, harness.Allowed(0)] = 0.1  # Or none.
    share: Annotated[float, harness.Allowed(0, 1)] = 0.5
    ratios: Annotated[tuple[float, ...], harness.Allowed(empty=True)] = ()
"""

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.harness import errors

_LARGEST = 2**31 - 1


class Allowed(NamedTuple):
  """What a field of settings may hold; both ends of the range belong to it.

  Attributes:
    low: the least number; None for any above zero.
    high: the largest.
    empty: whether a list may be empty.
  """

  low: float | None = None
  high: float = math.inf
  empty: bool = False


def check(settings: Any) -> None:
  """Checks the numbers of settings.

  Args:
    settings: a dataclass instance with annotated fields.

  Raises:
    SettingsError: names the first field with a number out of range.
  """
  hints = typing.get_type_hints(type(settings), include_extras=True)
  for name, hint in hints.items():
    value = getattr(settings, name)
    notes = getattr(hint, '__metadata__', ())
    allowed = next((n for n in notes if isinstance(n, Allowed)), Allowed())
    several = isinstance(value, tuple)
    if several and not (value or allowed.empty):
      raise errors.SettingsError(f'--{name}=: {name} needs at least one entry.')
    for number in value if several else (value,):
      _check_number(name, number, allowed)


def _check_number(name: str, value: Any, allowed: Allowed) -> None:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return
  low, high, _ = allowed
  if isinstance(value, int):
    low, high = 1 if low is None else low, min(high, _LARGEST)
  if not (value > 0 if low is None else value >= low):
    bound = 'above 0' if low is None else f'at least {low:,g}'
  elif value > high or math.isinf(value):
    bound = f'at most {high:,}' if math.isfinite(high) else 'finite'
  else:
    return
  raise errors.SettingsError(f'--{name}={value}: {name} is {bound}.')


def settings_of(settings: Any, *without: str) -> dict[str, Any]:
  """Fields of a dataclass as a run's settings, without some.

  Args:
    settings: of the binary.
    *without: fields on which no single run depends, beside `seeds`: the methods
      and the grid of a comparison; `steps`, where a run may be made longer.

  Returns:
    Values by name, for `train`.
  """
  given = dataclasses.asdict(settings)
  return {k: v for k, v in given.items() if k not in {'seeds', *without}}


def types_of(settings: Any) -> dict[str, Any]:
  """The types of the fields of settings, by name."""
  hints = typing.get_type_hints(type(settings))
  return {f.name: hints[f.name] for f in dataclasses.fields(settings)}


def words_of(settings: Any) -> dict[str, str]:
  """What docstrings say under Attributes, by field.

  Args:
    settings: a dataclass instance; the docstrings of its base classes count
      too.
  """
  known, words = types_of(settings), {}
  for kind in reversed(type(settings).__mro__):
    text = inspect.cleandoc(kind.__doc__ or '')
    _, _, listed = text.partition('Attributes:\n')
    entry = r'^ {2}(\w+): (.*(?:\n {4,}.*)*)'
    for name, sentence in re.findall(entry, listed, re.MULTILINE):
      if name in known:
        words[name] = ' '.join(sentence.split())
  return words


def override(settings: Any, texts: Mapping[str, str]) -> Any:
  """Replaces fields of a dataclass instance.

  Args:
    settings: a dataclass instance with annotated fields.
    texts: values by field, as texts; a tuple is written 1,2,3.

  Returns:
    A new instance.

  Raises:
    SettingsError: if a value is not of its field's type.
  """
  known = types_of(settings)
  changes = {}
  for name, text in texts.items():
    try:
      changes[name] = _parse(text.strip(), known[name])
    except (ValueError, KeyError):
      raise errors.SettingsError(
        f'--{name}={text}: {name} takes {kind_name(known[name])}.'
      ) from None
  return dataclasses.replace(settings, **changes)


def kind_name(kind: Any) -> str:
  """What a field takes, in words."""
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple:
    return f'a list, commas between, each {kind_name(arguments[0])}'
  if origin is typing.Literal:
    return f'one of {", ".join(map(str, arguments))}'
  if origin in (typing.Union, types.UnionType):
    return ' or '.join(
      'None' if choice is type(None) else kind_name(choice)
      for choice in arguments
    )
  return f'a value of type {kind.__name__}'


def _parse(text: str, kind: Any) -> Any:
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    for choice in sorted(arguments, key=lambda a: a is str):
      try:
        return _parse(text, choice)
      except (ValueError, KeyError):
        continue
    raise ValueError(text)
  if origin is typing.Literal:
    return {str(choice): choice for choice in arguments}[text]
  if origin is tuple:
    pieces = [piece.strip() for piece in text.split(',')] if text else []
    return tuple(_parse(piece, arguments[0]) for piece in pieces)
  if kind is type(None):
    return {'None': None}[text]
  if kind is bool:
    return {'true': True, 'false': False}[text.lower()]
  return kind(text.replace('_', '') if kind is int else text)
