"""Models of language that count: learnt from texts, or read from ARPA files.

Both give the probability of a token after those before it, with two tokens of
their own, where a text begins and where it ends. Logarithms are natural.
"""

import collections
import math
import pathlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
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


class Counted(NamedTuple):
  r"""Interpolated counts with the weights of Witten and Bell.

  With c(h w) how often w was after h, and n(h) how many different tokens were,

  .. math:: p(w | h) = \frac{c(h w) + n(h)\, p(w | h')}{\sum_v c(h v) + n(h)}

  where h' is h without its first token; after nothing, p(w | h') is even over
  all tokens and the end.

  Attributes:
    order: tokens that are looked at, the new one among them.
    counts: by history, how often each token followed, and all of them.
    vocabulary: tokens; the end of a text is not among them.
  """

  order: int
  counts: Mapping[History, tuple[Mapping[Token, int], int]]
  vocabulary: frozenset[Token]

  def log_prob(self, history: History, token: Token) -> float:
    """Of a token after others.

    Args:
      history: tokens before; only the last `order - 1` count.
      token: one of the vocabulary, or `END`. Of others, the probability is the
        one of a token that was never seen.

    Returns:
      The natural logarithm.
    """
    history = _last(history, self.order)
    found = 1.0 / (len(self.vocabulary) + 1)
    for length in range(len(history) + 1):
      seen = self.counts.get(history[len(history) - length :])
      if seen is None:
        break  # Longer ones were not seen either.
      followed, total = seen
      kinds = len(followed)
      found = (followed.get(token, 0) + kinds * found) / (total + kinds)
    return math.log(found)

  def knows(self, token: Token) -> bool:
    """Whether a token is in the vocabulary, or the end."""
    return token in self.vocabulary or token == END


def _last(history, order):
  return tuple(history[-(order - 1) :]) if order > 1 else ()


def learn(
  texts: Iterable[Sequence[Token]], *, order: int, vocabulary: Iterable[Token]
) -> Counted:
  """Counts the tokens of texts.

  Args:
    texts: each a sequence of tokens.
    order: tokens that are looked at, the new one among them.
    vocabulary: all tokens that may come; what else is in the texts is added.

  Returns:
    The model.

  Raises:
    SettingsError: if the order is below 1.
  """
  if order < 1:
    raise harness.SettingsError(
      f'the order of a model is 1 or more, got {order}.'
    )
  counts: dict[History, collections.Counter] = {}
  known = set(vocabulary)
  for text in texts:
    line = (START, *text, END)
    known.update(text)
    for i in range(1, len(line)):
      for length in range(min(order, i + 1)):
        history = line[i - length : i]
        counts.setdefault(history, collections.Counter())[line[i]] += 1
  totals = {history: (dict(c), c.total()) for history, c in counts.items()}
  return Counted(order, totals, frozenset(known))


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
    """Of a word after others, see `Counted.log_prob`.

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
