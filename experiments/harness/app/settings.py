"""Settings of a run, from texts, and what numbers they may hold.

A number in a settings dataclass is finite and above zero, a list of numbers has
at least one, and a whole number has less than 32 bits, as steps are counted,
unless the annotation of the field says otherwise:

    noise: Annotated[float, harness.Allowed(0)] = 0.1  # Or none.
    share: Annotated[float, harness.Allowed(0, 1)] = 0.5
    ratios: Annotated[tuple[float, ...], harness.Allowed(empty=True)] = ()
    methods: Annotated[tuple[str, ...], harness.Among(METHODS)] = ('soba',)

A field may be such a dataclass itself, for what belongs together: the field
`steps` of the field `train` is named `train.steps`, also as a flag.
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


class Among(NamedTuple):
  """What words a field of settings may hold.

  Attributes:
    known: the words; of a mapping, its keys.
  """

  known: Iterable[str]


class Field(NamedTuple):
  """A field of settings, or of one of its groups.

  Attributes:
    value: what it holds.
    kind: its type.
    notes: `Allowed` and `Among` of its annotation.
    words: what the docstring says under Attributes; '' if nothing.
  """

  value: Any
  kind: Any
  notes: tuple[Any, ...]
  words: str


def fields_of(settings: Any, group: str = '') -> dict[str, Field]:
  """All fields by name, those of a field `a` that is a dataclass as `a.b`.

  Args:
    settings: a dataclass instance with annotated fields.
    group: what stands before the names.
  """
  hints = typing.get_type_hints(type(settings), include_extras=True)
  words = _words(type(settings), set(hints))
  found: dict[str, Field] = {}
  for field in dataclasses.fields(settings):
    name, value = group + field.name, getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      found |= fields_of(value, f'{name}.')
      continue
    kind, notes = hints[field.name], ()
    if typing.get_origin(kind) is typing.Annotated:
      kind, *notes = typing.get_args(kind)
    found[name] = Field(value, kind, tuple(notes), words.get(field.name, ''))
  return found


def check(settings: Any) -> None:
  """Checks the numbers and words of settings.

  Args:
    settings: a dataclass instance with annotated fields.

  Raises:
    SettingsError: names the first field with a number out of range, or with a
      word that is not known.
  """
  for name, (value, _, notes, _) in fields_of(settings).items():
    allowed = next((n for n in notes if isinstance(n, Allowed)), Allowed())
    several = isinstance(value, tuple)
    if several and not (value or allowed.empty):
      raise errors.SettingsError(f'--{name}=: {name} needs at least one entry.')
    for entry in value if several else (value,):
      _check_number(name, entry, allowed)
      for note in notes:
        if isinstance(note, Among) and entry not in (known := list(note.known)):
          raise errors.SettingsError(
            f'--{name}={entry}: {name} knows {", ".join(known)}.'
          )


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
    *without: fields, or groups of them, on which no single run depends, beside
      `seeds`: the methods and the grid of a comparison; `steps`, where a run
      may be made longer.

  Returns:
    Values by name, for `train`.
  """
  left_out = {'seeds', *without}
  return {
    name: field.value
    for name, field in fields_of(settings).items()
    if not left_out & {name, name.partition('.')[0]}
  }


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
  known = fields_of(settings)
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
  """Replaces fields by name, `a.b` for the field `b` of the group `a`."""
  for name, value in values.items():
    first, _, rest = name.partition('.')
    if rest:
      value = replaced(getattr(settings, first), {rest: value})
    settings = dataclasses.replace(settings, **{first: value})
  return settings


def _words(kind: type, known: set[str]) -> dict[str, str]:
  """What docstrings, also of base classes, say under Attributes, by field."""
  words = {}
  for one in reversed(kind.__mro__):
    text = inspect.cleandoc(one.__doc__ or '')
    _, _, listed = text.partition('Attributes:\n')
    entry = r'^ {2}(\w+): (.*(?:\n {4,}.*)*)'
    for name, sentence in re.findall(entry, listed, re.MULTILINE):
      if name in known:
        words[name] = ' '.join(sentence.split())
  return words


def text_of(value: Any) -> str:
  """A value as a flag takes it."""
  several = isinstance(value, tuple)
  return ','.join(map(str, value)) if several else str(value)


def kind_name(kind: Any) -> str:
  """What a field takes, in words."""
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple:
    each = f'commas between, each {kind_name(arguments[0])}'
    count = 'a list' if ... in arguments else f'{len(arguments)} values'
    return f'{count}, {each}'
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
    if ... not in arguments and len(pieces) != len(arguments):
      raise ValueError(text)
    return tuple(_parse(piece, arguments[0]) for piece in pieces)
  if kind is type(None):
    return {'None': None}[text]
  if kind is bool:
    return {'true': True, 'false': False}[text.lower()]
  return kind(text.replace('_', '') if kind is int else text)
