"""Control tokens of a tokeniser, and their text in other texts."""

import functools
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# A code point that Unicode reserves for internal use.
MARK = '\ufdd0'


class Controls(NamedTuple):
  """The control tokens of a tokeniser.

  Attributes:
    numbers: token numbers by text.
    unflagged: numbers of control tokens that the tokeniser does not flag as
      special.
    pattern: matches the start of the text of a control token.
    pieces: splits a text at control tokens.
  """

  numbers: Mapping[str, int]
  unflagged: frozenset[int]
  pattern: re.Pattern[str]
  pieces: re.Pattern[str]

  def count(self, text: str) -> int:
    """Counts texts of control tokens."""
    return len(self.pattern.findall(text))

  def mark(self, text: str) -> str:
    """Inserts a mark into each text of a control token."""
    return self.pattern.sub(rf'\g<0>{MARK}', text)

  def fragments(self, text: str) -> list[str]:
    """Splits a text within each text of a control token."""
    ends = [match.end() for match in self.pattern.finditer(text)]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)])]

  def split(self, text: str) -> list[str]:
    """Splits a text into control tokens and the text between them."""
    return self.pieces.split(text)


@functools.lru_cache(maxsize=8)
def find(inner: Any, end: int, tokens: tuple[tuple[str, str], ...]) -> Controls:
  """Finds control tokens: special, named by the template, or the end token."""
  added = inner.get_added_tokens_decoder()
  special = {t.content: i for i, t in added.items() if t.special}
  named = {text for name, text in tokens if name != 'unk_token'}
  vocabulary = inner.get_vocab(with_added_tokens=True)
  unflagged = {
    text: number
    for text, number in vocabulary.items()
    if (number == end or text in named) and text not in special
  }
  numbers = special | unflagged
  texts = sorted(numbers, key=len, reverse=True)
  # '(?!)' never matches.
  either = '|'.join(map(re.escape, texts)) or '(?!)'
  return Controls(
    numbers,
    frozenset(unflagged.values()),
    # Matches one character, to find overlapping texts.
    re.compile(f'(?=(?:{either})).', re.DOTALL),
    re.compile(f'({either})'),
  )


class Counter:
  """Counts texts of control tokens in examples, and warns about them.

  Args:
    controls: the control tokens.
  """

  def __init__(self, controls: Controls):
    self._controls, self._total, self._first = controls, 0, 0

  def add(self, texts: Iterable[str], row: int) -> None:
    """Counts in the texts of an example, by its row number."""
    count = sum(map(self._controls.count, texts))
    if count and not self._total:
      self._first = row
    self._total += count

  def warn(self, source: str) -> int:
    """Prints the warning, if there are any; returns the number of texts."""
    if self._total:
      print(
        f'{source or "examples"}: warning: the text of control tokens occurs '
        f'{self._total} times, first in row {self._first} (from 0); it is '
        'encoded as plain text. Give dialogues as messages instead of rendered '
        'templates.',
        file=sys.stderr,
      )
    return self._total
