"""Reads files of JSON rows and reports each invalid row.

`.jsonl` files have one object per line, `.json` files a list of objects or one
object per line; both may be compressed (`.gz`). An invalid row has a reason, so
that a caller can raise an error or skip it.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from experiments import harness
from experiments.harness.data import json_values
from experiments.lm import checked_files

SUPPORTED = (
  'files of rows are .jsonl (one JSON object per line) or .json (a list of '
  'objects), also with .gz'
)
# Numbers of rows per reason and of reasons that `describe` lists.
NAMED, REASONS = 3, 8


class Row(NamedTuple):
  """A row of a file.

  Attributes:
    number: row number from 0, without blank lines.
    place: description of the place, with the line if each line is a row.
    value: the object; None if the row is invalid.
    reason: reason why the row is invalid; '' if it is valid.
  """

  number: int
  place: str
  value: dict[str, Any] | None
  reason: str = ''


def scan(path: str | pathlib.Path) -> list[Row]:
  """Reads all rows of a file, valid or not.

  Args:
    path: the file.

  Returns:
    The rows in order.

  Raises:
    UserError: if the file is missing, unreadable, empty or of another format.
  """
  path = pathlib.Path(path)
  name = path.name.removesuffix('.gz')
  if os.path.isdir(path):
    raise harness.UserError(
      f'{path} is a folder, expected a file of rows, .jsonl or .json: give one '
      'of the files in it.'
    )
  if not name.endswith(('.json', '.jsonl')):
    missing = '' if os.path.exists(path) else ' The file does not exist either.'
    raise harness.UserError(
      f'{path}: {SUPPORTED}. Convert other formats, such as parquet and csv, '
      f'by `to_json` of the package datasets.{missing}'
    )
  if not checked_files.exists(path):
    raise harness.MissingDataError(f'there is no file {path}.')
  if name.endswith('.json'):
    rows = _list_rows(path)
  else:
    rows = _line_rows(checked_files.read_packed_lines(path))
  if not rows:
    raise harness.UserError(f'{path} has no rows.')
  return rows


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
  """Describes in one line how many rows were skipped, where and why.

  Args:
    path: the file.
    skipped: messages `PATH, PLACE: REASON.` of skipped rows, from `data.read`.

  Returns:
    The line, with the first rows of each reason; '' for no rows.
  """
  if not skipped:
    return ''
  places: dict[str, list[str]] = {}
  for message in skipped:
    place, _, reason = message.removeprefix(f'{path}, ').partition(': ')
    places.setdefault(reason.removesuffix('.'), []).append(place)
  parts = []
  for reason, rows in list(places.items())[:REASONS]:
    more = f' and {len(rows) - NAMED} more' if len(rows) > NAMED else ''
    parts.append(f'{", ".join(rows[:NAMED])}{more}: {reason}')
  further = sum(map(len, list(places.values())[REASONS:]))
  if further:
    parts.append(f'{further} more for other reasons')
  return f'{path}: rows skipped: {len(skipped)}. {"; ".join(parts)}.'


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
      return _line_rows(content.split(b'\n'))
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


def _line_rows(lines: Iterable[bytes]) -> list[Row]:
  rows: list[Row] = []
  for line, raw in enumerate(lines, 1):
    # The byte order mark; concatenated files have it inside.
    raw = raw.removeprefix(b'\xef\xbb\xbf')
    if raw.strip():
      number = len(rows)
      rows.append(_parse(number, f'line {line} (row {number} from 0)', raw))
  return rows


def _parse(number: int, place: str, raw: bytes) -> Row:
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
