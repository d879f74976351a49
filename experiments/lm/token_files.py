"""Tokens of encoded examples in a file, for data that exceed the memory.

A callback of the compiled program reads the rows of a batch, so that only these
are in memory. Training is the same as with tables in memory.
"""

import array
import dataclasses
import functools
import hashlib
import io
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.harness.store import files
from experiments.lm import batches
from experiments.lm import tokenizer as tokenizer_lib

Rows = dict[str, Any]
_ARRAYS = ('rows', 'lengths', 'places')
_COUNTS = ('too_long', 'empty', 'equal', 'refused', 'controls', 'truncated')
_BLOCK = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile(Sequence[Rows]):
  """Encoded examples in a file: int32, twice each token plus its mask.

  Attributes:
    path: the file.
    names: names of the sequences of an example, as in `batches.Encoded`.
    ends: ends of all sequences in the file after a 0, int64.
    answers: tokens of the longest answer of each example in the file, int32.
    numbers: numbers of the selected examples in the file, int32.
    digest: digest of the file, uint8.
  """

  path: pathlib.Path
  names: tuple[str, ...]
  ends: np.ndarray
  answers: np.ndarray
  numbers: np.ndarray
  digest: np.ndarray

  def __len__(self) -> int:
    return len(self.numbers)

  def __getitem__(self, i):
    number = self.numbers[i]
    first = number * len(self.names)
    sizes = np.diff(self.ends[first : first + len(self.names) + 1])
    rows = self.read([number], int(sizes.max()))
    return {name: array[0] for name, array in rows.items()}

  def select(self, places: np.ndarray) -> 'TokenFile':
    """Selects examples by their places in this selection."""
    return dataclasses.replace(self, numbers=self.numbers[places])

  def read(self, numbers: Any, length: int) -> Rows:
    """Reads examples by their numbers in the file.

    Args:
      numbers: the numbers.
      length: length to which rows are padded with zeros.

    Returns:
      int32 (numbers, length) by name.
    """
    rows = {}
    with open(self.path, 'rb') as file:
      for place, name in enumerate(self.names):
        both = np.zeros((len(numbers), length), np.int32)
        for row, number in zip(both, np.asarray(numbers)):
          first = int(number) * len(self.names) + place
          start, end = self.ends[first : first + 2]
          file.seek(both.itemsize * start)
          row[: end - start] = np.fromfile(file, both.dtype, end - start)
        rows |= {name: both >> 1, batches.mask_name(name): both & 1}
    return rows

  def take(self, numbers: jax.Array, length: int) -> Rows:
    """Reads examples in a compiled program; see `read`."""
    names = [n for name in self.names for n in (name, batches.mask_name(name))]
    return _call(self, names, numbers, length)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedFile:
  """Demonstrations in a file that share rows, see `batches.pack`.

  Attributes:
    items: the demonstrations.
    places: their indices in `items`, row by row, int32.
    ends: ends of the rows in `places` after a 0, int64.
    digest: digest of the file and of the rows, uint8.
  """

  items: TokenFile
  places: np.ndarray
  ends: np.ndarray
  digest: np.ndarray

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the sequences of a row."""
    return self.items.names

  def read(self, numbers: Any, length: int) -> Rows:
    """Reads rows by their numbers, int32 (numbers, length) by name."""
    rows = [self._places(int(number)) for number in np.asarray(numbers)]
    return batches.pack(self.items, rows, length)

  def count_answers(self) -> np.ndarray:
    """Counts the tokens to learn of each row, (rows,)."""
    items, numbers = self.items, self.items.numbers
    # The first token of a demonstration has no prediction.
    stored = np.memmap(items.path, np.int32, mode='r')
    firsts = stored[items.ends[numbers * len(items.names)]] & 1
    counts = (items.answers[numbers] - firsts)[self.places]
    return np.add.reduceat(counts, self.ends[:-1])

  def take(self, numbers: jax.Array, length: int) -> Rows:
    """Reads rows in a compiled program; see `read`."""
    return _call(self, batches.PACKED, numbers, length)

  def _places(self, number):
    return self.places[slice(*self.ends[number : number + 2])]


def pack(items: TokenFile, rows: Sequence[Sequence[int]]) -> PackedFile:
  """Packs demonstrations in a file into rows.

  Args:
    items: the demonstrations.
    rows: indices of the demonstrations of each row, not empty.

  Returns:
    The rows.
  """
  places = np.array([place for row in rows for place in row], np.int32)
  ends = np.cumsum([0, *map(len, rows)], dtype=np.int64)
  digest = hashlib.blake2b(items.digest.tobytes(), digest_size=16)
  for part in (items.numbers[places], ends):
    digest.update(part.tobytes())
  return PackedFile(
    items, places, ends, np.frombuffer(digest.digest(), np.uint8)
  )


def _call(
  source: TokenFile | PackedFile,
  names: Sequence[str],
  numbers: jax.Array,
  length: int,
) -> Rows:
  """Reads rows by a callback of the compiled program."""
  shape = jax.ShapeDtypeStruct((*numbers.shape, length), np.int32)
  return jax.pure_callback(
    functools.partial(source.read, length=length),
    dict.fromkeys(names, shape),
    numbers,
    vmap_method='sequential',
  )


class _Writer:
  """Writes encoded examples to a file, as a list to which they are appended."""

  def __init__(self, file: io.BufferedWriter):
    self._file = file
    self.names: tuple[str, ...] = ()
    self.ends, self.answers = array.array('q', [0]), array.array('i')
    self.digest = hashlib.blake2b(digest_size=16)

  def __len__(self) -> int:
    return len(self.answers)

  def append(self, item: Rows) -> None:
    self.names = tuple(n for n in item if batches.mask_name(n) in item)
    masks = [item[batches.mask_name(name)] for name in self.names]
    for name, mask in zip(self.names, masks):
      content = (2 * item[name] + mask).astype(np.int32).tobytes()
      self.digest.update(content)
      self._file.write(content)
      self.ends.append(self.ends[-1] + len(mask))
    self.answers.append(max(int(mask.sum()) for mask in masks))


def describe(tokenizer: tokenizer_lib.Tokenizer) -> str:
  """Describes all of a tokeniser on which tokens depend."""
  inner = getattr(tokenizer.inner, 'to_str', lambda: 'bytes')()
  special = sorted(tokenizer.tokens.items())
  return f'{inner} {tokenizer.template} {tokenizer.end} {special}'


def load_or_encode(
  folder: files.Path, text: str, encode: Callable[[Any], batches.Encoded]
) -> batches.Encoded:
  """Encodes examples into a file, or takes that of an earlier call.

  Args:
    folder: folder of the files.
    text: all inputs of the encoding.
    encode: calls `batches.encode` with its argument as `items`.

  Returns:
    An `Encoded` whose items are a `TokenFile`.

  Raises:
    WriteError: if the folder cannot be written.
    UserError: as `encode`.
  """
  name = hashlib.blake2b(f'1 {text}'.encode(), digest_size=16).hexdigest()
  path = files.make_folder(folder) / f'tokens-{name}.bin'
  index = path.with_suffix('.npz')
  encoded = _read(path, index)
  if encoded is None:
    _write(path, index, encode)
    encoded = _read(path, index)
  return encoded


def _write(
  path: pathlib.Path,
  index: pathlib.Path,
  encode: Callable[[Any], batches.Encoded],
) -> None:
  """Encodes examples into a file and its index."""
  with files.writing(path.parent), open(path, 'wb') as file:
    writer = _Writer(file)
    encoded = encode(writer)
  counts = {name: getattr(encoded, name) for name in _COUNTS}
  about = {'names': writer.names, 'counts': counts}
  buffer = io.BytesIO()
  np.savez(
    buffer,
    ends=np.array(writer.ends, np.int64),
    answers=np.array(writer.answers, np.int32),
    digest=np.frombuffer(writer.digest.digest(), np.uint8),
    about=np.frombuffer(json.dumps(about).encode(), np.uint8),
    **{name: np.array(getattr(encoded, name)) for name in _ARRAYS},
  )
  files.write_bytes(index, buffer.getvalue())


def _read(path: pathlib.Path, index: pathlib.Path) -> batches.Encoded | None:
  """Reads encoded examples; None if they are missing or damaged."""
  try:
    with np.load(index) as file:
      arrays = {name: file[name] for name in file.files}
    about = json.loads(arrays['about'].tobytes())
    digest = hashlib.blake2b(digest_size=16)
    with open(path, 'rb') as file:
      while block := file.read(_BLOCK):
        digest.update(block)
    if digest.digest() != arrays['digest'].tobytes():
      raise ValueError(f'{path} has another digest')
    count = len(arrays['answers'])
    items = TokenFile(
      path,
      tuple(about['names']),
      arrays['ends'],
      arrays['answers'],
      np.arange(count, dtype=np.int32),
      arrays['digest'],
    )
    return batches.Encoded(
      items=items,
      **{name: arrays[name] for name in _ARRAYS},
      **about['counts'],
    )
  except FileNotFoundError:
    return None
  except Exception:  # A damaged file may raise anything.
    files.put_aside(
      index, f'{index} or {path} is damaged; encoding again', index.parent
    )
    return None
