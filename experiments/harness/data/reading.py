"""Opens data files within limits, and explains what is wrong with them.

Data may be damaged or hostile. Loaders open it by this module, which refuses
pipes, devices, and links out of a data set, decompresses no more than a file
may contain, and reports errors as `file, line or key: cause: remedy.`
"""

import contextlib
import csv
import gzip
import io
import math
import os
import pathlib
import stat
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from experiments.harness.app import errors
from experiments.harness.store import files

# Limits: bytes of a text and of an array after decompression, bytes of a line,
# and numbers in a table.
MOST_TEXT, MOST_BYTES, MOST_LINE = 2**30, 2**30, 2**24
MOST_NUMBERS = 2**26
# A compressed file may grow by this factor, and to this number of bytes anyway.
MOST_GROWTH, LEAST_LIMIT = 100, 2**22
# The largest number of single precision, in which experiments compute.
LARGEST = float(np.finfo(np.float32).max)
# What to do about a file of others, and about one line of it.
AGAIN, CORRECT = 'get it again', 'correct the line'
_PUT = 'put the file itself into the folder, and give its path there'
# Errors that the standard library raises on damaged files.
_DAMAGE = (OSError, EOFError, MemoryError, csv.Error, zlib.error)
_KINDS = {
  stat.S_ISDIR: 'a folder',
  stat.S_ISFIFO: 'a named pipe',
  stat.S_ISCHR: 'a device',
  stat.S_ISBLK: 'a device',
  stat.S_ISSOCK: 'a socket',
}


def damaged(
  where: Any, cause: Any, remedy: str = AGAIN
) -> errors.DamagedDataError:
  """Makes the error of a damaged file.

  Args:
    where: the file, and the line or key in it.
    cause: what is wrong, shortened to 200 characters.
    remedy: how to mend it, a command without a full stop.

  Returns:
    The error, to be raised.
  """
  cause = shorten(cause, 200).rstrip('.:')
  return errors.DamagedDataError(f'{shorten(where, 600)}: {cause}: {remedy}.')


def shorten(text: Any, length: int = 40) -> str:
  """Formats a value in one printable line of a limited length."""
  text = ' '.join(str(text)[: 4 * length].split())
  text = ''.join(
    c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in text
  )
  return text if len(text) <= length else f'{text[:length]}...'


def check_regular(path: files.Path) -> int:
  """Checks that a path is a regular file or a link to one.

  Args:
    path: the file.

  Returns:
    Its size in bytes.

  Raises:
    MissingDataError: if it is missing.
    DamagedDataError: if it is a folder, a pipe or a device.
  """
  try:
    status = os.stat(path)
  except FileNotFoundError:
    raise errors.MissingDataError(
      f'there is no file {path}: correct its name, or get it.'
    ) from None
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise damaged(
      path, f'it cannot be read ({reason})', 'correct it'
    ) from error
  for is_kind, name in _KINDS.items():
    if is_kind(status.st_mode):
      raise damaged(
        path, f'it is {name}, not a regular file', 'put a file in its place'
      )
  return status.st_size


def check_inside(
  path: files.Path, folder: files.Path, where: Any = None
) -> pathlib.Path:
  """Checks that a file is in the folder of its data set, also behind links.

  Args:
    path: the file, which need not exist.
    folder: the folder; it may be a link itself.
    where: what names the file, for the message; the file itself by default.

  Returns:
    The path.

  Raises:
    DamagedDataError: if it is outside or cannot be a path.
  """
  path = pathlib.Path(path)
  where = path if where is None else where
  try:
    inside = pathlib.Path(os.path.realpath(path)).is_relative_to(
      os.path.realpath(folder)
    )
    os.stat(path)
  except FileNotFoundError:
    pass
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    name = shorten(path.name)
    raise damaged(
      where, f'{name} is no path ({reason})', 'correct the path'
    ) from error
  if not inside:
    raise damaged(where, f'{shorten(path.name)} is outside of {folder}', _PUT)
  return path


@contextlib.contextmanager
def parsing(
  path: Any,
  what: str,
  raised: tuple[type[Exception], ...] = (Exception,),
) -> Iterator[None]:
  """Turns the errors of a parser into a `DamagedDataError`.

  Args:
    path: the file, and the place in it.
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
    reason = shorten(error, 200).rstrip('.') or type(error).__name__
    raise errors.DamagedDataError(
      f'{path} is damaged, cut short or no {what}: {reason}: {AGAIN}.'
    ) from error


class _Inflated(io.RawIOBase):
  """A decompressed stream that ends with an error if it grows too much."""

  def __init__(self, path: pathlib.Path, stream: Any, size: int):
    self._path, self._stream = path, stream
    self._left = growth_limit(size)

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    count = self._stream.readinto(buffer)
    self._left -= count
    if self._left < 0:
      raise _grown(self._path)
    return count


def growth_limit(size: int) -> int:
  """The largest number of bytes of a compressed file after decompression."""
  return max(LEAST_LIMIT, MOST_GROWTH * size)


def check_growth(path: files.Path, size: int, total: int) -> None:
  """Checks announced bytes before they are decompressed.

  Args:
    path: the file.
    size: its size in bytes.
    total: bytes after decompression.

  Raises:
    DamagedDataError: if there are too many.
  """
  if total > growth_limit(size):
    raise _grown(path)


def _grown(path):
  return damaged(
    path,
    f'it grows more than {MOST_GROWTH}-fold when it is decompressed',
    'decompress it yourself if you trust it, or get it again',
  )


@contextlib.contextmanager
def opened(path: files.Path, what: str) -> Iterator[IO[bytes]]:
  """Opens a binary file, decompressed if its name ends in .gz; see `parsing`.

  Raises:
    MissingDataError: if the file is missing.
    DamagedDataError: if it is no regular file, or grows too much.
  """
  path = pathlib.Path(path)
  size = check_regular(path)
  with parsing(path, what, _DAMAGE), open(path, 'rb') as file:
    if path.suffix != '.gz':
      yield file
      return
    if size > 4:
      # What the file announces may be wrong, so the stream is limited, too.
      file.seek(-4, os.SEEK_END)
      check_growth(path, size, int.from_bytes(file.read(4), 'little'))
      file.seek(0)
    with gzip.GzipFile(fileobj=file) as stream:
      yield io.BufferedReader(_Inflated(path, stream, size), 2**17)


def read_lines(path: files.Path, what: str) -> Iterator[str]:
  """Yields the lines of a text, within the limits above; see `opened`."""
  total = number = 0
  with opened(path, what) as file:
    while line := file.readline(MOST_LINE + 1):
      number, total = number + 1, total + len(line)
      if len(line) > MOST_LINE or total > MOST_TEXT:
        raise damaged(
          f'{path}, line {number}',
          f'a line has at most {MOST_LINE:,} bytes and a text {MOST_TEXT:,}',
          'split it',
        )
      yield decode(line, f'{path}, line {number}', first=number == 1)


def decode(line: bytes, where: Any, *, first: bool = False) -> str:
  """Decodes UTF-8, without the byte order mark of a first line.

  Raises:
    DamagedDataError: if the bytes are not UTF-8.
  """
  try:
    return line.decode('utf-8-sig' if first else 'utf-8')
  except UnicodeDecodeError as error:
    raise damaged(
      where, f'not UTF-8 ({error.reason})', 'convert the file to UTF-8'
    ) from error


def parse_number(
  text: str,
  where: Any,
  what: str,
  low: float = -LARGEST,
  high: float = LARGEST,
  *,
  integer: bool = False,
  infinite: bool = False,
  remedy: str = CORRECT,
) -> float:
  """Parses a number within limits.

  Args:
    text: the number, without underscores.
    where: its place, for the message.
    what: its name, for the message.
    low: the smallest allowed number.
    high: the largest allowed number.
    integer: whether it has to be a whole number.
    infinite: whether infinities and NaN are also allowed.
    remedy: see `damaged`.

  Returns:
    The number.

  Raises:
    DamagedDataError: if it is no such number.
  """
  try:
    number = float(text if '_' not in text else 'none')
  except ValueError:
    raise damaged(
      where, f'the {what} {shorten(text)!r} is not a number', remedy
    ) from None
  if infinite and not math.isfinite(number):
    return number
  if not low <= number <= high or (integer and number != int(number)):
    kind = 'whole number' if integer else 'number'
    raise damaged(
      where,
      f'the {what} must be a {kind} of at least {low:,} and at most {high:,}, '
      f'got {shorten(text)}',
      remedy,
    )
  return int(number) if integer else number


def read_small(path: files.Path, what: str, limit: int = 2**24) -> bytes:
  """Reads a whole file of a limited size; see `opened`."""
  with opened(path, what) as file:
    content = _read_upto(file, limit + 1)
  if len(content) > limit:
    raise damaged(path, f'a {what} has at most {limit:,} bytes', AGAIN)
  return bytes(content)


def _read_upto(file: IO[bytes], count: int) -> bytearray:
  """Reads at most `count` bytes; memory grows with the content."""
  content = bytearray()
  while piece := file.read(min(count - len(content), 2**20)):
    content += piece
  return content


def read_bytes(path: files.Path, file: IO[bytes], count: int) -> np.ndarray:
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
    raise damaged(
      path, f'it announces {count:,} bytes; at most {MOST_BYTES:,} are read'
    )
  content = _read_upto(file, count + 1)
  if len(content) != count:
    has = 'more' if len(content) > count else f'{len(content):,}'
    raise errors.DamagedDataError(
      f'{path} is cut short or too long: it announces {count:,} bytes and has '
      f'{has}: {AGAIN}.'
    )
  return np.frombuffer(content, np.uint8)


def check_finite(path: Any, array: np.ndarray) -> np.ndarray:
  """Returns an array unchanged if it is finite in single precision.

  Args:
    path: the file, and the key of the array.
    array: numbers.

  Raises:
    DamagedDataError: names the first other number, counted from 1.
  """
  wrong = ~(np.abs(array) <= LARGEST)
  if wrong.any():
    place = np.unravel_index(np.argmax(wrong), array.shape)
    names = ('row', 'column') if array.ndim == 2 else ('index',) * array.ndim
    where = ', '.join(f'{n} {i + 1}' for n, i in zip(names, place))
    raise damaged(
      f'{path}, {where}' if where else path,
      f'{array[place]} is no finite number',
      'correct the number, or get the file again',
    )
  return array
