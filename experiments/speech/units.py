"""Text units of a recogniser: characters, words, or learnt word pieces.

Label 0 is the CTC blank, label 1 an unknown unit, and units start at 2. Label 1
does not occur in training texts, but may occur in test texts.
"""

import base64
import collections
import functools
import io
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from experiments import harness
from experiments.harness.data import reading
from experiments.harness.store import files

BLANK, UNKNOWN, FIRST = 0, 1, 2
# Symbol of an unknown unit in a decoded text.
MARK = '⁇'
KINDS = ('characters', 'words', 'pieces')
_MOST_BYTES = 2**26
# Symbol of a space in sentencepiece.
_SPACE = '▁'


class Units(Protocol):
  """A mapping between texts and labels.

  Attributes:
    kind: one of `KINDS`.
    symbols: symbol of each label.
    size: number of labels, with the blank.
    breaks: labels that end the previous word, bool (size,).
  """

  kind: str
  symbols: tuple[str, ...]
  size: int
  breaks: np.ndarray

  def encode(self, text: str) -> np.ndarray:
    """Converts a text to labels, int32 (n,)."""

  def decode(self, labels: Iterable[int]) -> str:
    """Converts labels to a text, without blanks."""

  def unknown(self, texts: Iterable[str]) -> dict[str, int]:
    """Counts unknown units in texts, the most frequent first."""

  def save(self, path: files.Path) -> None:
    """Writes the file that `load` reads."""


class Listed:
  """A list of units: characters with the space, or words."""

  def __init__(self, kind: str, known: Sequence[str]):
    self.kind = kind
    self.symbols = ('', MARK, *known)
    self.size = len(self.symbols)
    self._between = '' if kind == 'characters' else ' '
    self._numbers = {symbol: i for i, symbol in enumerate(known, FIRST)}
    self.breaks = np.array(
      [kind == 'words' or symbol == ' ' for symbol in self.symbols]
    )

  def encode(self, text: str) -> np.ndarray:
    """Converts a text to labels, with single spaces between words."""
    return np.array(
      [self._numbers.get(s, UNKNOWN) for s in self._split(text)], np.int32
    )

  def decode(self, labels: Iterable[int]) -> str:
    """Converts labels to a text."""
    symbols = [self.symbols[i] for i in labels if i != BLANK]
    return ' '.join(self._between.join(symbols).split())

  def unknown(self, texts: Iterable[str]) -> dict[str, int]:
    """Counts unknown units in texts, the most frequent first."""
    return _count(
      s for text in texts for s in self._split(text) if s not in self._numbers
    )

  def save(self, path: files.Path) -> None:
    """Writes the file that `load` reads."""
    values = {'kind': self.kind, 'known': list(self.symbols[FIRST:])}
    files.write_text(path, files.seal(values, ensure_ascii=False) + '\n')

  def _split(self, text: str) -> Sequence[str]:
    words = text.split()
    return words if self.kind == 'words' else ' '.join(words)


class Pieces:
  """Word pieces learnt by the package sentencepiece."""

  kind = 'pieces'

  def __init__(self, model: bytes):
    self._model = model
    package = harness.load_extra(
      'sentencepiece', 'asr', 'learnt pieces of words'
    )
    self._inner = package.SentencePieceProcessor(model_proto=model)
    # sentencepiece numbers its unknown unit 0; labels are larger by 1.
    count = self._inner.get_piece_size()
    pieces = [self._inner.id_to_piece(i) for i in range(1, count)]
    self.symbols = ('', MARK, *pieces)
    self.size = len(self.symbols)
    self.breaks = np.array([s.startswith(_SPACE) for s in self.symbols])

  def encode(self, text: str) -> np.ndarray:
    """Converts a text to labels."""
    ids = self._inner.encode(' '.join(text.split()))
    return np.array(ids, np.int32).reshape(-1) + 1

  def decode(self, labels: Iterable[int]) -> str:
    """Converts labels to a text."""
    text = ''.join(self.symbols[i] for i in labels if i != BLANK)
    return ' '.join(text.replace(_SPACE, ' ').split())

  def unknown(self, texts: Iterable[str]) -> dict[str, int]:
    """Counts characters in texts that are in no piece."""
    known = set(''.join(self.symbols[FIRST:])) | {' '}
    return _count(
      c for text in texts for c in ' '.join(text.split()) if c not in known
    )

  def save(self, path: files.Path) -> None:
    """Writes the file that `load` reads."""
    model = base64.b64encode(self._model).decode()
    values = {'kind': self.kind, 'model': model}
    files.write_text(path, files.seal(values) + '\n')


def _count(symbols):
  return dict(collections.Counter(symbols).most_common())


def characters(texts: Iterable[str]) -> Listed:
  """Makes units of the characters of training texts and the space."""
  letters = {c for text in texts for c in ' '.join(text.split())}
  return Listed('characters', sorted(letters | {' '}))


def words(texts: Iterable[str]) -> Listed:
  """Makes units of the words of training texts."""
  return Listed('words', sorted({w for text in texts for w in text.split()}))


def pieces(texts: Sequence[str], *, size: int) -> Pieces:
  """Learns word pieces from training texts, deterministically.

  Args:
    texts: training texts.
    size: number of labels, with blank and unknown; short texts give fewer.

  Returns:
    The units.

  Raises:
    SettingsError: if sentencepiece is not installed, or the size is smaller
      than the number of characters.
  """
  package = harness.load_extra('sentencepiece', 'asr', 'learnt pieces of words')
  lines = [' '.join(text.split()) for text in texts]
  letters = len({c for line in lines for c in line} | {_SPACE})
  if size < letters + FIRST:
    raise harness.SettingsError(
      f'{size} units are fewer than the {letters} characters of the texts plus '
      'blank and unknown: give more units, or use characters.'
    )
  content = io.BytesIO()
  package.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=content,
    model_type='unigram',
    vocab_size=size - 1,  # Without the blank.
    hard_vocab_limit=False,
    character_coverage=1.0,
    normalization_rule_name='identity',
    unk_id=0,
    bos_id=-1,
    eos_id=-1,
    pad_id=-1,
    num_threads=1,
    max_sentence_length=2**16,
    minloglevel=2,
  )
  return Pieces(content.getvalue())


def load(path: files.Path) -> Units:
  """Reads units from a file.

  Raises:
    MissingDataError: if the file is missing.
    DamagedDataError: if the file is invalid.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise harness.MissingDataError(f'the file of units {path} does not exist.')
  with harness.parsing(path, 'file of units'):
    return parse(reading.read_small(path, 'file of units', _MOST_BYTES))


def parse(content: bytes) -> Units:
  """Parses the content of a file of units.

  Raises:
    ValueError: if the content is invalid.
  """
  values = files.unseal(content)
  kind = values.get('kind')
  if kind not in KINDS:
    raise ValueError(f'its kind is {kind!r}, not one of {", ".join(KINDS)}')
  if kind == 'pieces':
    model = base64.b64decode(values['model'], validate=True)
    if not model:
      raise ValueError('its model is empty')
    return Pieces(model)
  known = values.get('known')
  if not isinstance(known, list) or not all(
    isinstance(unit, str) and (kind == 'words' or len(unit) == 1)
    for unit in known
  ):
    raise ValueError(f'known is no list of {kind}')
  if len(set(known)) < len(known):
    raise ValueError('known has a unit twice')
  return Listed(kind, known)


def load_or_make(
  path: files.Path, kind: str, texts: Sequence[str], *, size: int = 0
) -> Units:
  """Loads the units of a run, or makes and saves them.

  Args:
    path: the file, in the folder of the run.
    kind: one of `KINDS`.
    texts: training texts.
    size: number of pieces, see `pieces`.

  Returns:
    The units. A damaged file is put aside with a warning.

  Raises:
    SettingsError: if the kind is unknown or differs from the file's, or the
      file lacks units of the texts.
  """
  makers: dict[str, Callable[[Sequence[str]], Any]] = {
    'characters': characters,
    'words': words,
    'pieces': functools.partial(pieces, size=size),
  }
  if kind not in makers:
    raise harness.SettingsError(
      f'unknown units {kind!r}; known: {", ".join(KINDS)}.'
    )
  path = pathlib.Path(path)
  loaded = None
  if path.exists():
    try:
      loaded = load(path)
    except harness.DamagedDataError as error:
      files.put_aside(path, f'{error} They are made again', path.parent)
  if loaded is not None:
    if loaded.kind != kind:
      raise harness.SettingsError(
        f'{path} has {loaded.kind}, not {kind}: give another folder, or remove '
        'the file.'
      )
    if missing := list(loaded.unknown(texts)):
      raise harness.SettingsError(
        f'{path} has no units for {", ".join(map(repr, missing[:3]))}, since '
        'the texts have changed: give another folder, or remove the file.'
      )
    return loaded
  units = makers[kind](texts)
  units.save(path)
  return units
