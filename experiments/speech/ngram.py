"""Models of language in ARPA files.

They give the probability of a token after those before it, with two tokens of
their own, where a text begins and where it ends. Logarithms are natural.
"""

import collections
import math
import pathlib
from collections.abc import Hashable, Mapping
from typing import NamedTuple, Protocol

from experiments import harness
from experiments.harness.data import sources
from experiments.harness.store import files

START, END, UNKNOWN = '<s>', '</s>', '<unk>'
# What a token gets that a model of no unknown token does not have, a power of
# ten.
_LEAST = -10.0
_NONE = -99.0

Token = Hashable
History = tuple[Token, ...]


class Model(Protocol):
  """The probability of tokens."""

  @property
  def order(self) -> int:
    """Tokens that are looked at, the new one among them."""

  def log_prob(self, history: History, token: Token) -> float:
    """Of a token after others; `START` is the first of a history."""

  def knows(self, token: Token) -> bool:
    """Whether a token has a probability of its own."""


def _last(history, order):
  return tuple(history[-(order - 1) :]) if order > 1 else ()


class Arpa(NamedTuple):
  """A model of an ARPA file: what is not in it is made of shorter tokens.

  Attributes:
    order: tokens that are looked at, the new one among them.
    table: by tokens, the logarithm of the last one's probability, and of what
      is left for those that do not stand after them.
  """

  order: int
  table: Mapping[tuple[str, ...], tuple[float, float]]

  def log_prob(self, history: History, token: Token) -> float:
    """Logarithm of the probability of a word after others.

    A word that the file does not have is its `<unk>`; where it has none, it
    gets a ten-billionth.
    """
    one = lambda word: word if (word,) in self.table else UNKNOWN
    last = one(token)
    if (last,) not in self.table:
      return _LEAST * math.log(10)
    before = tuple(one(word) for word in _last(history, self.order))
    left = 0.0
    while before and (*before, last) not in self.table:
      left += self.table.get(before, (0.0, 0.0))[1]
      before = before[1:]
    return left + self.table[*before, last][0]

  def knows(self, token: Token) -> bool:
    """Whether the file has a token."""
    return (token,) in self.table


def read_arpa(path: files.Path, *, lower: bool = True) -> Arpa:
  """Reads a model in the format of ARPA, gzipped or not.

  Args:
    path: of the file.
    lower: whether words are put into small letters.

  Returns:
    The model.

  Raises:
    MissingDataError: if there is no such file.
    DamagedDataError: if a line is none of the format; names it. If there are
      other numbers of tokens than the file says.
  """
  path = pathlib.Path(path)
  table: dict[tuple[str, ...], tuple[float, float]] = {}
  announced: dict[int, int] = {}
  found: collections.Counter = collections.Counter()
  length, started, ended = 0, False, False
  for number, line in enumerate(sources.read_lines(path, 'ARPA file'), 1):
    line = line.strip()
    where = f'{path}, line {number}'
    if not started:
      started = line == '\\data\\'
    elif ended or not line:
      continue
    elif line == '\\end\\':
      ended = True
    elif line.startswith('\\') and line.endswith('-grams:'):
      length = _whole(line[1:-7], where)
    elif not length:
      size, _, entries = line.removeprefix('ngram ').partition('=')
      announced[_whole(size, where)] = _whole(entries, where)
    else:
      words, values = _entry(line, length, where, lower)
      found[length] += 1
      # Words that differ in capitals alone are one: the likelier stays.
      if words not in table or table[words][0] < values[0]:
        table[words] = values
  if not ended or not announced:
    raise harness.DamagedDataError(
      f'{path} is cut short or no ARPA file: it has no part from \\data\\ to '
      '\\end\\.'
    )
  for order, count in announced.items():
    if found[order] != count:
      raise harness.DamagedDataError(
        f'{path} says that it has {count:,} entries of {order} words, and has '
        f'{found[order]:,}.'
      )
  return Arpa(max(announced), table)


def _whole(text, where):
  try:
    return int(text)
  except ValueError:
    raise harness.DamagedDataError(
      f'{where}: {text.strip()!r} is no whole number.'
    ) from None


def _entry(line, length, where, lower):
  parts = line.split()
  if not length + 1 <= len(parts) <= length + 2:
    raise harness.DamagedDataError(
      f'{where} has {len(parts)} parts; an entry of {length} words is a '
      'logarithm, the words, and maybe what is left.'
    )
  words = tuple(parts[1 : length + 1])
  if lower:
    words = tuple(w.lower() for w in words)
  try:
    tens = [float(part) for part in (parts[0], *parts[length + 1 :])]
  except ValueError:
    raise harness.DamagedDataError(
      f'{where} has something that is no number where a logarithm should be.'
    ) from None
  if not all(math.isfinite(ten) for ten in tens):
    raise harness.DamagedDataError(
      f'{where} has a logarithm that is not finite.'
    )
  natural = [-math.inf if t <= _NONE else t * math.log(10) for t in tens]
  return words, (natural[0], natural[1] if len(natural) > 1 else 0.0)
