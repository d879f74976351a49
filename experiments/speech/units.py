"""What a network says: characters, words, or pieces that were learnt.

Each kind numbers its units alike: 0 is the blank of connectionist temporal
classification, 1 is whatever is no unit, and units start at 2. A network never
learns to say 1, since training texts have none; texts of a test may.
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
from experiments.harness.store import files

BLANK, UNKNOWN, FIRST = 0, 1, 2
# What stands in a decoded text for what is no unit.
MARK = '⁇'
KINDS = ('characters', 'words', 'pieces')
# How sentencepiece writes a space.
_SPACE = '▁'


class Units(Protocol):
  """Texts as labels, int32 from 1, and back.

  Attributes:
    kind: one of `KINDS`.
    symbols: of the labels, from 0; for pictures and for models of language.
    size: how many labels there are, blank included.
    breaks: bool (size,), which labels end the word before them.
  """

  kind: str
  symbols: tuple[str, ...]
  size: int
  breaks: np.ndarray

  def encode(self, text: str) -> np.ndarray:
    """Labels of a text, int32 (n,)."""

  def decode(self, labels: Iterable[int]) -> str:
    """The text of labels; a blank says nothing."""

  def unknown(self, texts: Iterable[str]) -> dict[str, int]:
    """How often what is no unit is in texts, the most frequent first."""

  def save(self, path: files.Path) -> None:
    """Writes the file that `load` reads."""


class Listed:
  """Units that are a list: characters, the space among them, or words."""

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
    """Labels of a text; spaces are single and between words."""
    return np.array(
      [self._numbers.get(s, UNKNOWN) for s in self._split(text)], np.int32
    )

  def decode(self, labels: Iterable[int]) -> str:
    """The text of labels."""
    said = [self.symbols[i] for i in labels if i != BLANK]
    return ' '.join(self._between.join(said).split())

  def unknown(self, texts: Iterable[str]) -> dict[str, int]:
    """How often what is no unit is in texts, the most frequent first."""
    return _counted(
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
  """Units that the package sentencepiece has learnt."""

  kind = 'pieces'

  def __init__(self, model: bytes):
    self._model = model
    package = harness.load_extra(
      'sentencepiece', 'asr', 'learnt pieces of words'
    )
    self._inner = package.SentencePieceProcessor(model_proto=model)
    # Its own number of what it does not know is 0, so that all are one more.
    count = self._inner.get_piece_size()
    pieces = [self._inner.id_to_piece(i) for i in range(1, count)]
    self.symbols = ('', MARK, *pieces)
    self.size = len(self.symbols)
    self.breaks = np.array([s.startswith(_SPACE) for s in self.symbols])

  def encode(self, text: str) -> np.ndarray:
    """Labels of a text."""
    found = self._inner.encode(' '.join(text.split()))
    return np.array(found, np.int32).reshape(-1) + 1

  def decode(self, labels: Iterable[int]) -> str:
    """The text of labels."""
    said = ''.join(self.symbols[i] for i in labels if i != BLANK)
    return ' '.join(said.replace(_SPACE, ' ').split())

  def unknown(self, texts: Iterable[str]) -> dict[str, int]:
    """How often characters that are in no piece are in texts."""
    known = set(''.join(self.symbols[FIRST:])) | {' '}
    return _counted(
      c for text in texts for c in ' '.join(text.split()) if c not in known
    )

  def save(self, path: files.Path) -> None:
    """Writes the file that `load` reads."""
    model = base64.b64encode(self._model).decode()
    values = {'kind': self.kind, 'model': model}
    files.write_text(path, files.seal(values) + '\n')


def _counted(symbols):
  return dict(collections.Counter(symbols).most_common())


def characters(texts: Iterable[str]) -> Listed:
  """The characters of training texts, in order; space is one of them."""
  found = {c for text in texts for c in ' '.join(text.split())}
  return Listed('characters', sorted(found | {' '}))


def words(texts: Iterable[str]) -> Listed:
  """The words of training texts, in order."""
  return Listed('words', sorted({w for text in texts for w in text.split()}))


def pieces(texts: Sequence[str], *, size: int) -> Pieces:
  """Learns pieces of words from training texts.

  The same texts give the same pieces: one thread learns from all of them, and
  nothing is drawn.

  Args:
    texts: to learn from.
    size: labels, with blank and what is no unit; fewer come out if the texts
      have not so many.

  Returns:
    The units.

  Raises:
    SettingsError: if sentencepiece is not installed, or the size is less than
      the characters of the texts.
  """
  package = harness.load_extra('sentencepiece', 'asr', 'learnt pieces of words')
  lines = [' '.join(text.split()) for text in texts]
  letters = len({c for line in lines for c in line} | {_SPACE})
  if size < letters + FIRST:
    raise harness.SettingsError(
      f'{size} units are fewer than the {letters} characters of the texts, '
      'blank, and what is no unit: give more, or characters.'
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
  """Reads units that were saved.

  Raises:
    MissingDataError: if there is no such file.
    DamagedDataError: if it is damaged, or no file of units.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise harness.MissingDataError(f'there is no file of units {path}.')
  with harness.parsing(path, 'file of units'):
    return parse(path.read_bytes())


def parse(content: bytes) -> Units:
  """Units from what such a file holds.

  Raises:
    ValueError: if it is damaged, or no file of units.
  """
  values = files.unseal(content)
  if values['kind'] == 'pieces':
    return Pieces(base64.b64decode(values['model']))
  if values['kind'] not in KINDS:
    raise ValueError(f'its units are {values["kind"]}')
  return Listed(values['kind'], values['known'])


def kept(
  path: files.Path, kind: str, texts: Sequence[str], *, size: int = 0
) -> Units:
  """Units of training texts, made once and read afterwards.

  Args:
    path: of the file that keeps them, in the folder of a run.
    kind: one of `KINDS`.
    texts: to be made of.
    size: of pieces, see `pieces`.

  Returns:
    The units of the file, or of the texts where there is no file.

  Raises:
    SettingsError: if the kind is unknown, the file's is another, or it lacks
      units of the texts.
  """
  makers: dict[str, Callable[[Sequence[str]], Any]] = {
    'characters': characters,
    'words': words,
    'pieces': functools.partial(pieces, size=size),
  }
  if kind not in makers:
    raise harness.SettingsError(f'units are {", ".join(KINDS)}, got {kind!r}.')
  if pathlib.Path(path).exists():
    found = load(path)
    if found.kind != kind:
      raise harness.SettingsError(
        f'{path} has units that are {found.kind}, not {kind}: give another '
        'folder, or remove the file.'
      )
    if lacks := list(found.unknown(texts)):
      raise harness.SettingsError(
        f'{path} has no units for {", ".join(map(repr, lacks[:3]))}: the texts '
        'are others than when it was made. Give another folder, or remove it.'
      )
    return found
  made = makers[kind](texts)
  made.save(path)
  return made
