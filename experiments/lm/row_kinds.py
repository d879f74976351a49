"""Kinds of rows: single answers, pairs, and answers with a label."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from experiments import harness

# Single answers, pairs of answers, or single answers with a label.
Kind = Literal['demonstrations', 'comparisons', 'labelled']
LABELS = ('label', 'kto_tag')
_TRUTH = ('true', 'false')


def refuse_unclear(row: Mapping[str, Any]) -> None:
  """Raises UserError if a label may mean true or false but is neither."""
  for key in LABELS:
    value = row.get(key)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number or (isinstance(value, str) and value.lower() in _TRUTH):
      raise harness.UserError(
        f'{_describe(row, key)}; if the field has another meaning, rename it'
      )


def _describe(row: Mapping[str, Any], key: str) -> str:
  """Describes an invalid label, and how to mend it."""
  value, quotes = row[key], ''
  shown = 'null' if value is None else reprlib.repr(value)
  if isinstance(value, str):
    shown, quotes = f'the text {shown}', ' without quotes'
  return (
    f'{key} is {shown}, expected true or false{quotes} (whether the answer is '
    'wanted, the format of KTO)'
  )


def require(
  examples: Sequence[Any], kind: Kind | None, row: Mapping[str, Any]
) -> None:
  """Checks that the examples of a row have a kind.

  Args:
    examples: the examples, of `data.Example`.
    kind: the kind; None allows demonstrations and comparisons.
    row: the row, for the message.

  Raises:
    UserError: if an example is of another kind.
  """
  for example in examples:
    is_comparison = example.rejected is not None
    if kind is not None and is_comparison != (kind == 'comparisons'):
      kinds = ('one answer', 'two answers (chosen and rejected)')
      raise harness.UserError(
        f'the row has {kinds[is_comparison]}, expected '
        f'{kinds[not is_comparison]}: put demonstrations and comparisons into '
        'separate files'
      )
    if kind == 'labelled' and example.wanted is None:
      label = next((key for key in LABELS if key in row), None)
      raise harness.UserError(
        'the row has no label, expected true or false (whether the answer is '
        'wanted)'
        if label is None
        else _describe(row, label)
      )
    if kind != 'labelled' and example.wanted is False:
      raise harness.UserError(
        'the label is false: the answer is unwanted (the format of KTO), not a '
        'demonstration; train on it by --comparisons=kto_labelled, remove the '
        'row, or pair it with a wanted answer as prompt, chosen and rejected'
      )
