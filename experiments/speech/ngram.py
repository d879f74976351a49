"""N-gram language models in ARPA files, with natural logarithms."""

import collections
import math
import pathlib
from collections.abc import Hashable, Mapping
from typing import NamedTuple, Protocol

from experiments import harness
from experiments.harness.data import reading
from experiments.harness.store import files

START, END, UNKNOWN = '<s>', '</s>', '<unk>'
# Log10 probability of an unknown word in a model without an unknown token.
_UNKNOWN_LOG10 = -10.0
# Log10 probabilities up to this one stand for probability 0.
_ZERO_LOG10 = -99.0
# Log10 probabilities are at most 0, up to rounding.
_ROUNDING = 1e-3

Token = Hashable
History = tuple[Token, ...]


class Model(Protocol):
  """A language model over tokens."""

  @property
  def order(self) -> int:
    """Order of the n-grams."""

  def log_prob(self, history: History, token: Token) -> float:
    """Log-probability of a token after a history, which begins by `START`."""

  def knows(self, token: Token) -> bool:
    """Whether the token is in the vocabulary."""


def _last(history, order):
  return tuple(history[-(order - 1) :]) if order > 1 else ()


class Arpa(NamedTuple):
  """A back-off model from an ARPA file.

  Attributes:
    order: order of the n-grams.
    table: log-probability and log back-off weight of each n-gram.
  """

  order: int
  table: Mapping[tuple[str, ...], tuple[float, float]]

  def log_prob(self, history: History, token: Token) -> float:
    """Log-probability of a word after a history.

    A word outside the vocabulary has the probability of `<unk>`, or 1e-10 if
    the file has no `<unk>`.
    """
    known = lambda word: word if (word,) in self.table else UNKNOWN
    last = known(token)
    if (last,) not in self.table:
      return _UNKNOWN_LOG10 * math.log(10)
    before = tuple(known(word) for word in _last(history, self.order))
    backoff = 0.0
    while before and (*before, last) not in self.table:
      backoff += self.table.get(before, (0.0, 0.0))[1]
      before = before[1:]
    return backoff + self.table[*before, last][0]

  def knows(self, token: Token) -> bool:
    """Whether the token is in the vocabulary."""
    return (token,) in self.table


def read_arpa(path: files.Path, *, lower: bool = True) -> Arpa:
  """Reads a model in the ARPA format, gzipped or not.

  Args:
    path: the file.
    lower: whether words are converted to lower case.

  Returns:
    The model.

  Raises:
    MissingDataError: if the file is missing.
    DamagedDataError: if a line is invalid, or the number of n-grams differs
      from the header.
  """
  path = pathlib.Path(path)
  table: dict[tuple[str, ...], tuple[float, float]] = {}
  announced: dict[int, int] = {}
  counts: collections.Counter = collections.Counter()
  length, started, ended = 0, False, False
  for number, line in enumerate(reading.read_lines(path, 'ARPA file'), 1):
    line = line.strip()
    where = f'{path}, line {number}'
    if not started:
      started = line == '\\data\\'
    elif ended or not line:
      continue
    elif line == '\\end\\':
      ended = True
    elif line.startswith('\\') and line.endswith('-grams:'):
      length = _parse_int(line[1:-7], where, 1)
    elif not length:
      size, _, entries = line.removeprefix('ngram ').partition('=')
      announced[_parse_int(size, where, 1)] = _parse_int(entries, where, 0)
    else:
      words, values = _parse_entry(line, length, where, lower)
      counts[length] += 1
      # Of words that differ only in case, the likelier one stays.
      if words not in table or table[words][0] < values[0]:
        table[words] = values
  if not ended or not announced:
    raise harness.DamagedDataError(
      f'{path} is truncated or not an ARPA file: it has no section from '
      f'\\data\\ to \\end\\: {reading.AGAIN}.'
    )
  for order, count in announced.items():
    if counts[order] != count:
      raise harness.DamagedDataError(
        f'{path} announces {count:,} entries of {order} words, but has '
        f'{counts[order]:,}: get it again.'
      )
  return Arpa(max(announced), table)


def _parse_int(text, where, low):
  try:
    number = int(text)
  except ValueError:
    number = -1
  if number < low:
    text = reading.shorten(text)
    raise reading.damaged(
      where, f'{text!r} is not a whole number from {low}', reading.CORRECT
    )
  return number


def _parse_entry(line, length, where, lower):
  parts = line.split()
  if not length + 1 <= len(parts) <= length + 2:
    raise reading.damaged(
      where,
      f'it has {len(parts)} parts; an entry of {length} words has a '
      'log-probability, the words, and optionally a back-off weight',
      reading.CORRECT,
    )
  words = tuple(parts[1 : length + 1])
  if lower:
    words = tuple(w.lower() for w in words)
  try:
    log10s = [float(part) for part in (parts[0], *parts[length + 1 :])]
  except ValueError:
    raise reading.damaged(
      where, 'expected a number as the logarithm', reading.CORRECT
    ) from None
  if not all(map(math.isfinite, log10s)) or log10s[0] > _ROUNDING:
    raise reading.damaged(
      where,
      'a logarithm is not finite, or that of a probability above 1',
      reading.CORRECT,
    )
  logs = [-math.inf if x <= _ZERO_LOG10 else x * math.log(10) for x in log10s]
  return words, (logs[0], logs[1] if len(logs) > 1 else 0.0)
