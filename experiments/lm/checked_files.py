"""Reads files that others wrote: regular, bounded, valid, named in errors."""

import gzip
import os
import pathlib
import reprlib
import stat
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from experiments import harness
from experiments.harness.data import json_values

# Limits: bytes of a JSON file, of a list of rows, of a line, after
# decompression, and their ratio to the compressed bytes, which small files may
# exceed.
MOST_JSON, MOST_LIST, MOST_LINE, MOST_UNPACKED = 2**27, 2**28, 2**24, 2**30
MOST_RATIO, ANY_RATIO = 100, 2**22
# Lines of any compressed file, and compressed bytes of each further line.
ANY_LINES, LEAST_PACKED_LINE = 2**16, 4
# Largest token number and size of an axis.
LARGEST = 2**31 - 1
_POINTER = b'version https://git-lfs.github.com/spec/'


def require_regular(
  path: pathlib.Path, folder: pathlib.Path | None = None
) -> pathlib.Path:
  """Checks that a path is a regular file, and inside of a folder.

  Args:
    path: the file.
    folder: the folder that links may not leave; None follows all links. A link
      from a snapshot of Hugging Face's cache may lead to the blobs.

  Returns:
    The path.

  Raises:
    MissingDataError: if the file is missing.
    DamagedDataError: if it is a folder, FIFO or device, a pointer of git-lfs,
      or leads out of the folder.
  """
  try:
    target = path.resolve(strict=True)
    mode = target.stat().st_mode
  except FileNotFoundError as error:
    kind = 'is a link to a missing file' if path.is_symlink() else 'is missing'
    raise harness.MissingDataError(f'{path} {kind}.') from error
  # A link to itself is a RuntimeError before Python 3.13; a zero byte in the
  # path is a ValueError.
  except (OSError, RuntimeError, ValueError) as error:
    reason = 'a loop of links' if path.is_symlink() else one_line(error)
    raise harness.DamagedDataError(
      f'{path} cannot be read ({reason}).'
    ) from error
  if not stat.S_ISREG(mode):
    raise harness.DamagedDataError(
      f'{path} is a folder, pipe or device, expected a regular file: put a '
      'copy of the file there.'
    )
  if folder is not None and not any(map(target.is_relative_to, _roots(folder))):
    raise harness.DamagedDataError(
      f'{path} leads outside of its folder, to {target}: put a copy of the '
      'file into the folder.'
    )
  with harness.parsing(path, 'readable file'), target.open('rb') as file:
    if file.read(len(_POINTER)) == _POINTER:
      raise harness.DamagedDataError(
        f'{path} is a pointer of git-lfs, not the file: run `git lfs pull`.'
      )
  return path


def _roots(folder: pathlib.Path) -> list[pathlib.Path]:
  root = folder.resolve()
  blobs = root.parent.parent / 'blobs'
  return [root, *([blobs] if root.parent.name == 'snapshots' else [])]


def one_line(error: BaseException | str) -> str:
  """Returns the message of an error in one line of at most 200 characters."""
  text = ' '.join(str(error).split())[:200].rstrip('.')
  return text or type(error).__name__


def read_text(
  path: pathlib.Path, folder: pathlib.Path | None = None, limit: int = MOST_JSON
) -> str:
  """Reads a text in UTF-8 of limited size; see `require_regular`."""
  require_regular(path, folder)
  if (size := path.stat().st_size) > limit:
    raise harness.DamagedDataError(
      f'{path} has {size:,} bytes, more than {limit:,}: it is damaged or '
      'another file.'
    )
  raw = path.read_bytes()
  try:
    return raw.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = raw.count(b'\n', 0, error.start) + 1
    raise harness.DamagedDataError(
      f'{path}, line {line}: not UTF-8 ({error.reason}); save the file as '
      'UTF-8.'
    ) from error


def read_packed_lines(
  path: pathlib.Path, most_line: int = MOST_LINE
) -> Iterator[bytes]:
  """Yields the lines of a file, decompressed if its name ends in .gz.

  Args:
    path: the file.
    most_line: largest number of bytes of a line.

  Yields:
    The lines with their ends.

  Raises:
    DamagedDataError: if the file is damaged, unpacks to too many bytes, or has
      a line of too many bytes.
  """
  require_regular(path)
  is_packed, size = path.suffix == '.gz', path.stat().st_size
  limit = min(max(ANY_RATIO, MOST_RATIO * size), MOST_UNPACKED)
  # Equal short rows take few bytes each, but much memory.
  most_lines = ANY_LINES + size // LEAST_PACKED_LINE
  total = number = 0
  with gzip.open(path) if is_packed else path.open('rb') as file:
    while line := _read_line(path, file, most_line):
      number, total = number + 1, total + len(line)
      if is_packed and (total > limit or number > most_lines):
        raise harness.DamagedDataError(
          f'{path} unpacks to more than {limit:,} bytes or {most_lines:,} '
          'lines: if you trust it, unpack it by gunzip and give the result.'
        )
      if len(line) > most_line:
        raise harness.DamagedDataError(
          f'{path}, line {number}: it has more than {most_line:,} bytes: get '
          'the file again, or save it as .jsonl, with a line for each row.'
        )
      yield line


def _read_line(path: pathlib.Path, file: Any, most_line: int) -> bytes:
  try:
    return file.readline(most_line + 1)
  except (OSError, EOFError, zlib.error) as error:
    raise harness.DamagedDataError(
      f'{path} cannot be read: {one_line(error)}: get it again.'
    ) from error


def read_json(
  path: pathlib.Path, folder: pathlib.Path | None = None
) -> dict[str, Any]:
  """Reads an object of JSON.

  Raises:
    MissingDataError, DamagedDataError: as `read_text`, or if the content is not
      one object.
  """
  text = read_text(path, folder)
  try:
    value = json_values.parse_json(text)
  except ValueError as error:
    raise harness.DamagedDataError(
      f'{path}: {one_line(error)}; expected JSON.'
    ) from error
  if not isinstance(value, dict):
    raise harness.DamagedDataError(f'{path} has no object of JSON.')
  return value


def integer(
  source: str | pathlib.Path,
  fields: Mapping[str, Any],
  name: str,
  low: int = 1,
  high: int = LARGEST,
  default: int | None = None,
) -> int:
  """Reads an integer field.

  Args:
    source: the file, for messages.
    fields: fields of the file.
    name: name of the field.
    low: least value.
    high: largest value.
    default: value of a missing field; None requires it.

  Returns:
    The integer.

  Raises:
    DamagedDataError: if the field is missing, no integer or out of range.
  """
  value = _value(source, fields, name, default)
  if type(value) is not int or not low <= value <= high:
    raise harness.DamagedDataError(
      f'{source} has {name}={reprlib.repr(value)}, expected an integer from '
      f'{low} to {high}.'
    )
  return value


def number(
  source: str | pathlib.Path,
  fields: Mapping[str, Any],
  name: str,
  low: float = 0.0,
  default: float | None = None,
) -> float:
  """Reads a finite number greater than `low`; see `integer`."""
  value = _value(source, fields, name, default)
  # Comparing does not overflow for integers of any size, and excludes NaN.
  if type(value) in (int, float) and low < value < 1e30:
    return float(value)
  raise harness.DamagedDataError(
    f'{source} has {name}={reprlib.repr(value)}, expected a finite number '
    f'greater than {low:g}.'
  )


def typed(
  source: str | pathlib.Path,
  fields: Mapping[str, Any],
  name: str,
  kind: type,
  default: Any = None,
) -> Any:
  """Reads a field of a type: bool, str, list or dict; see `integer`."""
  value = _value(source, fields, name, default)
  if not isinstance(value, kind):
    names = {bool: 'true or false', str: 'a text', list: 'a list'}
    raise harness.DamagedDataError(
      f'{source} has {name}={reprlib.repr(value)}, expected '
      f'{names.get(kind, "an object")}.'
    )
  return value


def _value(
  source: str | pathlib.Path,
  fields: Mapping[str, Any],
  name: str,
  default: Any,
) -> Any:
  value = fields.get(name)
  value = default if value is None else value
  if value is None:
    raise harness.DamagedDataError(f'{source} has no field {name!r}.')
  return value


def token_numbers(
  source: str | pathlib.Path, fields: Mapping[str, Any], name: str
) -> list[int]:
  """Reads token numbers: one, several or none.

  Numbers of -1, by which some files mean no token, are left out.
  """
  value = fields.get(name)
  values = value if isinstance(value, list) else [value]
  listed = [{name: one} for one in values if one is not None]
  numbers = [integer(source, one, name, low=-1) for one in listed]
  return [one for one in numbers if one >= 0]


def exists(path: pathlib.Path) -> bool:
  """Whether a path exists, also as a link to a missing file."""
  return os.path.lexists(path)
