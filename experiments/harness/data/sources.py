"""Finds and opens data files, checks them, and identifies data sets."""

import contextlib
import csv
import gzip
import hashlib
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np

from experiments.harness.app import errors
from experiments.harness.store import files

# Limits: bytes of a text and of an array after decompression, bytes of a line,
# and numbers in a table.
MOST_TEXT, MOST_BYTES, MOST_LINE = 2**30, 2**30, 2**24
MOST_NUMBERS = 2**26
# The largest number of single precision, in which experiments compute.
LARGEST = float(np.finfo(np.float32).max)
# Errors that the standard library raises on damaged files.
_DAMAGE = (OSError, EOFError, MemoryError, csv.Error, zlib.error)
# Digests of the arrays of data sets, or of their training and test parts.
_PARTS = {
  'MNIST': ('fb3dfac15aee177ffefe98c4', 'd6dc1142089d21aa0f330572'),
  'Fashion-MNIST': ('afc71080c3828f531e9d92bf', 'f683ba0ee58a0244d683784f'),
  'sarcos': ('1479e3aa60237a37f27135ee',),
  'adult': ('5fcc36dffe15f28d8df49015',),
  'school': ('d76d82c3e56ea0f1dc717d0b',),
  'a9a': ('ab9dd9ebe9eeb59c175bb556',),
  'magic': ('1d851bc0cd6a99c6d62349ae',),
  'AN4': ('c705c4e1f7e24b110a11a64c',),
  'FSDD': ('7cab764afec723fed589e66e',),
}
_KNOWN = {digest: name for name, parts in _PARTS.items() for digest in parts}


class Source(NamedTuple):
  """The identity of data.

  Attributes:
    name: name of a known data set, otherwise a description.
    words: one line for people, without a full stop.
    digest: hex digests of the parts, joined by dashes.
  """

  name: str
  words: str
  digest: str


def identify_source(
  words: str, *parts: Sequence[np.ndarray], otherwise: str
) -> Source:
  """Identifies a data set by its content.

  Args:
    words: one line for people.
    *parts: the arrays of each part; a data set is known if all its parts are.
    otherwise: the name of unknown data.

  Returns:
    A `Source`.
  """
  digests = [_digest(part) for part in parts]
  names = {_KNOWN.get(digest, otherwise) for digest in digests}
  name = names.pop() if len(names) == 1 else otherwise
  return Source(name, words, '-'.join(digests))


def _digest(arrays):
  total = hashlib.blake2b(digest_size=12)
  for array in map(np.ascontiguousarray, arrays):
    total.update(f'{array.dtype.str}{array.shape}'.encode())
    total.update(array.data if array.size else b'')
  return total.hexdigest()


def substituted(data: Sequence[Source], published: Sequence[str]) -> str:
  """Names the data that replace the published data sets.

  Args:
    data: the data that were read.
    published: names of the published data sets.

  Returns:
    '' if all of them were read, otherwise the names of the other data.
  """
  names = {source.name for source in data}
  if names.issuperset(published):
    return ''
  return ', '.join(sorted(names.difference(published))) or 'a part of the data'


def find(
  data_dir: files.Path | None,
  names: Sequence[str],
  *,
  folders: Sequence[str] = ('',),
  advice: str,
  is_folder: bool = False,
) -> pathlib.Path:
  """Finds a file or folder of a data set.

  Args:
    data_dir: folder of data sets, or None.
    names: possible names.
    folders: possible subfolders, in order.
    advice: where to get the data, for the message.
    is_folder: whether to find a folder.

  Returns:
    The first match.

  Raises:
    MissingDataError: if there is no match.
  """
  for folder in folders if data_dir is not None else ():
    for name in names:
      path = pathlib.Path(data_dir) / folder / name
      with contextlib.suppress(OSError):
        if path.is_dir() if is_folder else path.is_file():
          return path
  where = 'no --data_dir is given' if data_dir is None else f'not in {data_dir}'
  raise errors.MissingDataError(
    f'{" or ".join(names[:2])} is missing ({where}): {advice}.'
  )


@contextlib.contextmanager
def parsing(
  path: files.Path,
  what: str,
  raised: tuple[type[Exception], ...] = (Exception,),
) -> Iterator[None]:
  """Turns the errors of a parser into a `DamagedDataError`.

  Args:
    path: the file.
    what: its format, for the message.
    raised: errors of the parser; third-party parsers raise nearly any.

  Yields:
    Nothing.

  Raises:
    DamagedDataError: names the file and the reason.
  """
  try:
    yield
  except errors.UserError:
    raise
  except raised as error:
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise errors.DamagedDataError(
      f'{path} is damaged, cut short or no {what}: {reason.rstrip(".")}.'
    ) from error


@contextlib.contextmanager
def opened(path: pathlib.Path, what: str) -> Iterator[IO[bytes]]:
  """Opens a binary file, decompressed if its name ends in .gz; see `parsing`.

  Raises:
    MissingDataError: if the file is missing.
  """
  if not path.exists():
    raise errors.MissingDataError(f'there is no file {path}.')
  with (
    parsing(path, what, _DAMAGE),
    (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as file,
  ):
    yield file


def read_lines(path: pathlib.Path, what: str) -> Iterator[str]:
  """Yields the lines of a text, within the limits above; see `opened`."""
  total = number = 0
  with opened(path, what) as file:
    while line := file.readline(MOST_LINE + 1):
      number, total = number + 1, total + len(line)
      if len(line) > MOST_LINE or total > MOST_TEXT:
        raise errors.DamagedDataError(
          f'{path}, line {number}: a line has at most {MOST_LINE:,} bytes and '
          f'a text {MOST_TEXT:,}.'
        )
      try:
        yield line.decode('utf-8-sig' if number == 1 else 'utf-8')
      except UnicodeDecodeError as error:
        raise errors.DamagedDataError(
          f'{path}, line {number}: not UTF-8 ({error.reason}).'
        ) from error


def read_bytes(path: pathlib.Path, file: IO[bytes], count: int) -> np.ndarray:
  """Reads the rest of a file, which should have the announced size.

  Args:
    path: path of the file, for messages.
    file: an open file.
    count: number of bytes announced by its header.

  Returns:
    uint8 (count,).

  Raises:
    DamagedDataError: if there are more or fewer bytes, or too many to read.
  """
  if count > MOST_BYTES:
    raise errors.DamagedDataError(
      f'{path} announces {count:,} bytes; at most {MOST_BYTES:,} are read.'
    )
  content = np.empty(count, np.uint8)
  done = 0
  while piece := file.read(min(count - done + 1, 2**20)):
    if done + len(piece) > count:
      done = count + 1
      break
    content[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
    done += len(piece)
  if done != count:
    has = 'more' if done > count else f'{done:,}'
    raise errors.DamagedDataError(
      f'{path} is cut short or too long: it announces {count:,} bytes and has '
      f'{has}.'
    )
  return content


def check_finite(path: files.Path, array: np.ndarray) -> np.ndarray:
  """Returns an array unchanged if it is finite in single precision.

  Raises:
    DamagedDataError: names the first other number, counted from 1.
  """
  wrong = ~(np.abs(array) <= LARGEST)
  if wrong.any():
    place = np.unravel_index(np.argmax(wrong), array.shape)
    names = ('row', 'column') if array.ndim == 2 else ('index',) * array.ndim
    where = ', '.join(f'{n} {i + 1}' for n, i in zip(names, place))
    raise errors.DamagedDataError(
      f'{path}, {where}: {array[place]} is no finite number.'
    )
  return array
