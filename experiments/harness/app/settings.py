"""Settings of a run: parsed from flags, and checked.

By default, a number in a settings dataclass is finite and above 0, a list has
at least one entry, and an integer is at most 10^8, since products of larger
sizes overflow. Annotations change that, for integers below 2^31:

    noise: Annotated[float, harness.Allowed(0)] = 0.1  # May be 0.
    share: Annotated[float, harness.Allowed(0, 1)] = 0.5
    ratios: Annotated[tuple[float, ...], harness.Allowed(empty=True)] = ()
    methods: Annotated[tuple[str, ...], harness.Among(METHODS)] = ('soba',)

A field may itself be such a dataclass, a group of settings: the field `steps`
of the field `train` has the name and the flag `train.steps`.
"""

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from experiments.harness.app import errors

_LARGEST_INT, _DEFAULT_LARGEST_INT = 2**31 - 1, 10**8
_KINDS = {
  bool: 'true or false',
  float: 'a number',
  int: 'an integer',
  str: 'a text',
}


class Allowed(NamedTuple):
  """The allowed range of a setting, with both ends.

  Attributes:
    low: the smallest number; None for any number above 0.
    high: the largest number.
    empty: whether a list may be empty.
  """

  low: float | None = None
  high: float = math.inf
  empty: bool = False


class Among(NamedTuple):
  """The allowed names of a setting.

  Attributes:
    known: the names, or a mapping from names to titles.
    meanings: one sentence by name, for `--help`; see `help.meaning`.
  """

  known: Iterable[str]
  meanings: Mapping[str, str] = types.MappingProxyType({})


class Field(NamedTuple):
  """A setting.

  Attributes:
    value: its value.
    kind: its type.
    limits: `Allowed` and `Among` from its annotation.
    description: from the section Attributes of the docstring; '' if missing.
  """

  value: Any
  kind: Any
  limits: tuple[Any, ...]
  description: str


def flatten(settings: Any, group: str = '') -> dict[str, Field]:
  """Returns all fields by name; the field `b` of a group `a` is `a.b`.

  Args:
    settings: a dataclass instance with annotated fields.
    group: prefix of the names.
  """
  hints = typing.get_type_hints(type(settings), include_extras=True)
  described = _descriptions(type(settings))
  fields: dict[str, Field] = {}
  for field in dataclasses.fields(settings):
    name, value = group + field.name, getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      fields |= flatten(value, f'{name}.')
      continue
    kind, limits = hints[field.name], ()
    if typing.get_origin(kind) is typing.Annotated:
      kind, *limits = typing.get_args(kind)
    description = described.get(field.name, '')
    fields[name] = Field(value, kind, tuple(limits), description)
  return fields


def check(settings: Any) -> None:
  """Checks the numbers and names in settings.

  Args:
    settings: a dataclass instance with annotated fields.

  Raises:
    SettingsError: for the first number out of range or unknown name.
  """
  for name, (value, _, limits, _) in flatten(settings).items():
    allowed = next((x for x in limits if isinstance(x, Allowed)), Allowed())
    several = isinstance(value, tuple)
    if several and not (value or allowed.empty):
      raise errors.SettingsError(f'--{name}=: {name} needs at least one entry.')
    for entry in value if several else (value,):
      _check_number(name, entry, allowed)
      for limit in limits:
        if isinstance(limit, Among) and entry not in (known := [*limit.known]):
          raise errors.SettingsError(
            f'--{name}={entry}: {name} knows {", ".join(known)}.'
          )


def _check_number(name: str, value: Any, allowed: Allowed) -> None:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return
  low, high, _ = allowed
  if isinstance(value, int):
    low = 1 if low is None else low
    high = min(high, _LARGEST_INT)
    if allowed.high == math.inf:
      high = _DEFAULT_LARGEST_INT
  if not (value > 0 if low is None else value >= low):
    bound = 'above 0' if low is None else f'at least {low:,g}'
  elif value > high or math.isinf(value):
    bound = f'at most {high:,}' if math.isfinite(high) else 'finite'
  else:
    return
  raise errors.SettingsError(f'--{name}={value}: {name} must be {bound}.')


def run_settings(settings: Any, *without: str) -> dict[str, Any]:
  """Returns the settings that identify a training run.

  Args:
    settings: settings of the binary.
    *without: fields or groups to leave out, as `seeds` always is: the methods
      and the grid of a comparison, or `steps` if a run may be extended.

  Returns:
    Values by name, for `train`.
  """
  excluded = {'seeds', *without}
  return {
    name: field.value
    for name, field in flatten(settings).items()
    if not excluded & {name, name.partition('.')[0]}
  }


def override(settings: Any, texts: Mapping[str, str]) -> Any:
  """Replaces fields of a dataclass instance.

  Args:
    settings: a dataclass instance with annotated fields.
    texts: texts of values by field; a tuple is written 1,2,3.

  Returns:
    A new instance.

  Raises:
    SettingsError: if a value has another type than its field.
  """
  known = flatten(settings)
  for name, text in texts.items():
    kind = known[name].kind
    try:
      value = _parse(text.strip(), kind)
    except (ValueError, KeyError):
      raise errors.SettingsError(
        f'--{name}={text}: {name} takes {kind_name(kind)}.'
      ) from None
    settings = replaced(settings, {name: value})
  return settings


def replaced(settings: Any, values: Mapping[str, Any]) -> Any:
  """Replaces fields by name; the field `b` of a group `a` is `a.b`."""
  for name, value in values.items():
    first, _, rest = name.partition('.')
    if rest:
      value = replaced(getattr(settings, first), {rest: value})
    settings = dataclasses.replace(settings, **{first: value})
  return settings


def _descriptions(kind: type) -> dict[str, str]:
  """Reads the section Attributes of a class and its bases, by field."""
  texts = {}
  for base in reversed(kind.__mro__):
    text = inspect.cleandoc(base.__doc__ or '')
    _, _, section = text.partition('Attributes:\n')
    entry = r'^ {2}(\w+): (.*(?:\n {4,}.*)*)'
    for name, sentence in re.findall(entry, section, re.MULTILINE):
      texts[name] = ' '.join(sentence.split())
  return texts


def as_text(value: Any) -> str:
  """Formats a value as its flag accepts it."""
  several = isinstance(value, tuple)
  return ','.join(map(str, value)) if several else str(value)


def kind_name(kind: Any) -> str:
  """Describes the values of a type, for messages."""
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple:
    count = 'a list' if ... in arguments else f'{len(arguments)} values'
    return f'{count} separated by commas, each {kind_name(arguments[0])}'
  if origin is typing.Literal:
    return f'one of {", ".join(map(str, arguments))}'
  if origin in (typing.Union, types.UnionType):
    return ' or '.join(
      'None' if choice is type(None) else kind_name(choice)
      for choice in arguments
    )
  return _KINDS.get(kind, f'a value of type {kind.__name__}')


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
    if ... not in arguments and len(pieces) != len(arguments):
      raise ValueError(text)
    return tuple(_parse(piece, arguments[0]) for piece in pieces)
  if kind is type(None):
    return {'None': None}[text]
  if kind is bool:
    return {'true': True, 'false': False}[text.lower()]
  return kind(text.replace('_', '') if kind is int else text)
