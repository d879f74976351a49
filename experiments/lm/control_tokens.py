"""Control tokens of a tokeniser, and texts that hold theirs."""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

# A code point that Unicode reserves for internal use; texts do not hold it.
MARK = '\ufdd0'


class Controls(NamedTuple):
  """The control tokens of a tokeniser.

  Attributes:
    numbers: their numbers by text.
    unflagged: numbers of those that the tokenizer does not call special.
    pattern: finds the places where the text of one begins.
    pieces: splits a text at them.
  """

  numbers: Mapping[str, int]
  unflagged: frozenset[int]
  pattern: re.Pattern[str]
  pieces: re.Pattern[str]

  def count(self, text: str) -> int:
    """How often the text of a control token occurs."""
    return len(self.pattern.findall(text))

  def broken(self, text: str) -> str:
    """The text with a mark within each occurrence."""
    return self.pattern.sub(rf'\g<0>{MARK}', text)

  def fragments(self, text: str) -> list[str]:
    """The text in parts that hold no control token."""
    ends = [match.end() for match in self.pattern.finditer(text)]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)])]

  def split(self, text: str) -> list[str]:
    """The text in pieces: control tokens, and what is between them."""
    return self.pieces.split(text)


@functools.lru_cache(maxsize=8)
def find(inner: Any, end: int, tokens: tuple[tuple[str, str], ...]) -> Controls:
  """Finds them by name, by the end of an answer, or by being special."""
  added = inner.get_added_tokens_decoder()
  special = {t.content: i for i, t in added.items() if t.special}
  named = {text for name, text in tokens if name != 'unk_token'}
  every = inner.get_vocab(with_added_tokens=True)
  others = {
    text: number
    for text, number in every.items()
    if (number == end or text in named) and text not in special
  }
  numbers = special | others
  texts = sorted(numbers, key=len, reverse=True)
  # Never matches if there is no control token.
  either = '|'.join(map(re.escape, texts)) or '(?!)'
  return Controls(
    numbers,
    frozenset(others.values()),
    # The first character, so that overlapping texts are all found.
    re.compile(f'(?=(?:{either})).', re.DOTALL),
    re.compile(f'({either})'),
  )
