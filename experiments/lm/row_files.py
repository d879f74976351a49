"""Reads files of JSON rows and reports each invalid row.

`.jsonl` files have one object per line, `.json` files a list of objects or one
object per line; both may be compressed (`.gz`). An invalid row has a reason, so
that a caller can raise an error or skip it.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from experiments import harness
from experiments.harness.data import json_values
from experiments.harness.store import files
from experiments.lm import checked_files

SUPPORTED = (
  'files of rows are .jsonl (one JSON object per line) or .json (a list of '
  'objects), also with .gz'
)
_JOIN = (
  ': `cat A.jsonl B.jsonl > ALL.jsonl`, if each ends with a line break, '
  'or `cat A.jsonl.gz B.jsonl.gz > ALL.jsonl.gz`'
)
# The byte order mark; concatenated files have it inside.
_MARK = b'\xef\xbb\xbf'
# Numbers of rows per reason and of reasons that `describe` lists.
NAMED, REASONS = 3, 16


class Row(NamedTuple):
  """A row of a file.

  Attributes:
    number: row number from 0, without blank lines.
    place: description of the place, with the line if each line is a row.
    value: the object; None if the row is invalid.
    reason: reason why the row is invalid; '' if it is valid.
    offset: first byte of the line of a .jsonl file.
  """

  number: int
  place: str
  value: dict[str, Any] | None
  reason: str = ''
  offset: int = 0


def scan(path: str | pathlib.Path) -> list[Row]:
  """Reads all rows of a file, valid or not.

  Args:
    path: the file.

  Returns:
    The rows in order.

  Raises:
    UserError: if the file is missing, unreadable, empty or of another format.
  """
  path = _require_rows(path)
  if path.name.removesuffix('.gz').endswith('.json'):
    rows = _list_rows(path)
  else:
    rows = list(_line_rows(checked_files.read_packed_lines(path)))
  if not rows:
    raise harness.UserError(f'{path} has no rows.')
  return rows


def iterate(path: str | pathlib.Path) -> Iterator[Row]:
  """Yields the rows of a .jsonl file one at a time, valid or not.

  Args:
    path: the file, may be compressed.

  Yields:
    The rows in order, with offsets in the unpacked file.

  Raises:
    UserError: as `scan`, or if the file is a list.
  """
  path = _require_lines(path)
  count = 0
  for row in _line_rows(checked_files.read_packed_lines(path)):
    count += 1
    yield row
  if not count:
    raise harness.UserError(f'{path} has no rows.')


def unpack(path: str | pathlib.Path, folder: files.Path) -> pathlib.Path:
  """Unpacks a .jsonl.gz file, whose rows cannot be read by their offsets.

  Args:
    path: a file of rows.
    folder: folder of the unpacked file, which another call takes again.

  Returns:
    The unpacked file; the path itself if it is not compressed.

  Raises:
    UserError: as `iterate`.
    WriteError: if the folder cannot be written.
  """
  path = _require_lines(path)
  if path.suffix != '.gz':
    return path
  checked_files.require_regular(path)
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
  folder = files.make_folder(folder)
  unpacked = folder / f'rows-{digest.hexdigest()}.jsonl'
  if not unpacked.exists():
    print(f'{path} is unpacked to {unpacked}.')
    temporary = unpacked.with_suffix('.tmp')
    with files.writing(folder), open(temporary, 'wb') as file:
      for line in checked_files.read_packed_lines(path):
        file.write(line)
    os.replace(temporary, unpacked)
  return unpacked


def read_row(path: pathlib.Path, offset: int, number: int) -> Row:
  """Reads one row that `iterate` has yielded, by its offset and number."""
  with path.open('rb') as file:
    file.seek(offset)
    raw = file.readline(checked_files.MOST_LINE)
  row = _parse(number, f'row {number} (from 0)', raw)
  if row.value is None:
    raise harness.DamagedDataError(
      f'{path}, {row.place}: {row.reason}: the file was changed while it is '
      'read; run the command again.'
    )
  return row


def _require_lines(path: str | pathlib.Path) -> pathlib.Path:
  """Raises UserError if a path is no .jsonl file, by its name."""
  path = _require_rows(path)
  if not path.name.removesuffix('.gz').endswith('.jsonl'):
    raise harness.UserError(
      f'{path}: rows stay on disk (--stream) only in .jsonl and .jsonl.gz '
      'files: save it with one row per line.'
    )
  return path


def _require_rows(path: str | pathlib.Path) -> pathlib.Path:
  """Raises UserError if a path is no file of rows, by its name."""
  path = pathlib.Path(path)
  name = path.name.removesuffix('.gz')
  if os.path.isdir(path):
    raise harness.UserError(
      f'{path} is a folder, expected a file of rows, .jsonl or .json: give one '
      f'of the files in it, or join them{_JOIN}.'
    )
  if not os.path.exists(path) and any(mark in str(path) for mark in ',*?'):
    raise harness.UserError(
      f'there is no file {path}; several files have to be joined{_JOIN}.'
    )
  if not name.endswith(('.json', '.jsonl')):
    missing = '' if os.path.exists(path) else ' The file does not exist either.'
    raise harness.UserError(
      f'{path}: {SUPPORTED}. Convert other formats, such as parquet and csv, '
      f'by `to_json` of the package datasets.{missing}'
    )
  if not checked_files.exists(path):
    raise harness.MissingDataError(f'there is no file {path}.')
  return path


def read_rows(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """Reads the objects of a file.

  Raises:
    UserError: as `scan`, or for the first row that is not an object.
  """
  objects = []
  for row in scan(path):
    if row.value is None:
      raise harness.UserError(f'{path}, {row.place}: {row.reason}.')
    objects.append(row.value)
  return objects


def describe(path: str | pathlib.Path, skipped: Sequence[str]) -> str:
  """Describes how many rows were skipped for each reason, and where.

  Args:
    path: the file.
    skipped: messages `PATH, PLACE: REASON.` of skipped rows, from `data.read`.

  Returns:
    A line with the number of rows, and one for each reason with the first rows,
    the most frequent reason first; '' for no rows. Reasons that differ by a
    number are one reason.
  """
  if not skipped:
    return ''
  groups: dict[str, list[tuple[str, str]]] = {}
  for message in skipped:
    place, _, reason = message.removeprefix(f'{path}, ').partition(': ')
    groups.setdefault(re.sub(r'\d+', '0', reason), []).append((place, reason))
  lines = [f'{path}: rows skipped: {len(skipped)}.']
  ordered = sorted(groups.values(), key=len, reverse=True)
  for group in ordered[:REASONS]:
    more = f' and {len(group) - NAMED} more' if len(group) > NAMED else ''
    places = ', '.join(place for place, _ in group[:NAMED])
    lines.append(f'  {len(group)} in {places}{more}: {group[0][1]}')
  if further := sum(map(len, ordered[REASONS:])):
    lines.append(f'  {further} for other reasons.')
  return '\n'.join(lines)


def _list_rows(path: pathlib.Path) -> list[Row]:
  limit = checked_files.MOST_LIST
  parts, total = [], 0
  for part in checked_files.read_packed_lines(path, limit):
    parts.append(part)
    total += len(part)
    if total > limit:
      raise harness.DamagedDataError(
        f'{path}: a list has at most {limit:,} bytes: save it as .jsonl, with '
        'a line for each row.'
      )
  content = b''.join(parts)
  try:
    values = json_values.parse_json(content.decode('utf-8-sig'))
  except UnicodeDecodeError as error:
    line = error.object.count(b'\n', 0, error.start) + 1
    raise harness.UserError(
      f'{path}, line {line}: not UTF-8 ({error.reason}); save the file as '
      'UTF-8.'
    ) from error
  except ValueError as error:
    # `to_json` of datasets writes lines into files of this name, too.
    if content.lstrip(b'\xef\xbb\xbf \t\r\n').startswith(b'{'):
      return list(_line_rows(content.split(b'\n')))
    raise harness.UserError(f'{path}: invalid JSON: {error}.') from error
  if not isinstance(values, list):
    raise harness.UserError(
      f'{path} has one {_kind(values)}, expected a list of rows; name a file '
      'with one row per line .jsonl.'
    )
  return [
    _row(number, f'row {number} (from 0)', value)
    for number, value in enumerate(values)
  ]


def _line_rows(lines: Iterable[bytes]) -> Iterator[Row]:
  number = offset = 0
  for line, raw in enumerate(lines, 1):
    if raw.removeprefix(_MARK).strip():
      row = _parse(number, f'line {line} (row {number} from 0)', raw)
      yield row._replace(offset=offset)
      number += 1
    offset += len(raw)


def _parse(number: int, place: str, raw: bytes) -> Row:
  # Half a text would end in a line break, which has an error of its own.
  raw = raw.removeprefix(_MARK).rstrip(b'\r\n')
  try:
    value = json_values.parse_json(raw.decode('utf-8'))
    return _row(number, place, value)
  except UnicodeDecodeError as error:
    reason = f'not UTF-8 ({error.reason}); save the file as UTF-8'
  except json.JSONDecodeError as error:
    message = error.msg.removesuffix(' at')
    reason = f'invalid JSON: {message} at column {error.colno}'
  # A repeated key, deep nesting, or thousands of digits.
  except ValueError as error:
    reason = f'invalid JSON: {error}'
  return Row(number, place, None, reason)


def _row(number: int, place: str, value: Any) -> Row:
  if isinstance(value, dict):
    return Row(number, place, value)
  reason = f'the row is a {_kind(value)}, expected an object'
  return Row(number, place, None, reason)


def _kind(value: Any) -> str:
  """Name of a value's type in JSON."""
  names = {dict: 'object', list: 'list', str: 'text', bool: 'truth value'}
  return names.get(type(value), 'null' if value is None else 'number')
