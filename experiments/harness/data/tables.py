"""Reads tables of numbers from LIBSVM and csv files."""

import array
import csv
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments.harness.app import errors
from experiments.harness.data import reading, sources
from experiments.harness.store import files

LABEL = 'label'
# A table of this many numbers is read in any case; in a larger one, at most
# this many numbers may be 0 for each that is not.
_ANY_SIZE, _MOST_SPARSE = 2**22, 1_000
_MORE = 'get it again, or give a file with samples'


class Table(NamedTuple):
  """A table of samples.

  Attributes:
    inputs: float64 (samples, features).
    targets: float64 (samples, targets).
    source: identity of the data.
  """

  inputs: np.ndarray
  targets: np.ndarray
  source: sources.Source


def read_table(
  path: files.Path,
  *,
  targets: Sequence[str] = (),
  header: bool | None = None,
  classes: bool = False,
) -> Table:
  """Reads a LIBSVM or csv file, whose format is detected from its lines.

  Args:
    path: the file; gzipped if its name ends in .gz.
    targets: names of the target columns; all others are inputs. Columns without
      a header are called 1, 2, ..., and those of a LIBSVM file label, 1, 2, ...
      Default: the last column, or the label.
    header: whether the first line of a csv file has the names; by default if it
      has no number.
    classes: whether the target has two classes: the larger becomes 1, the other
      -1.

  Returns:
    A `Table`.

  Raises:
    MissingDataError: if the file is missing.
    SettingsError: if the file lacks a column.
    DamagedDataError: if a cell is no finite number, lines have different
      lengths, or there are not two classes; names the file and the place.
  """
  path = pathlib.Path(path)
  words: tuple[str, ...] = ()
  if _is_libsvm(path):
    labels, inputs, lines = read_libsvm(path)
    if not labels.size:
      raise reading.damaged(path, 'it has no samples', _MORE)
    numbers = np.concatenate([labels[:, None], inputs], axis=1)
    names = (LABEL, *map(str, range(1, numbers.shape[1])))
    targets = tuple(targets) or names[:1]
  else:
    names, header = _column_names(path, header)
    targets = tuple(targets) or names[-1:]
    _check_columns(path, targets, names)
    words = targets if classes else ()
    names = tuple(name for name in names if name not in words)
    numbers, texts, lines = read_csv(path, names, words=words, header=header)
  _check_columns(path, targets, (*names, *words))
  if classes and len(targets) != 1:
    raise errors.SettingsError(f'{path}: two classes are in one target column.')
  places = {name: i for i, name in enumerate(names)}
  used = [places[name] for name in targets if name in places]
  values = numbers[:, used]
  inputs = np.delete(numbers, used, axis=1)
  if not inputs.size:
    raise reading.damaged(path, 'it has no samples with inputs', _MORE)
  if classes:
    column = texts[0] if words else values[:, 0]
    values = _signs(path, targets[0], column, lines)[:, None]
  text = f'{path.name}, {len(inputs):,} samples, {inputs.shape[1]} features'
  unknown = f'unknown table {path.name}'
  part = inputs, values
  return Table(*part, sources.identify_source(text, part, otherwise=unknown))


def _check_columns(path, wanted, names):
  known = frozenset(names)
  for name in wanted:
    if name not in known:
      columns = ', '.join(map(reading.shorten, names[:20]))
      raise errors.SettingsError(
        f'{path} has no column {reading.shorten(name)!r}; it has {columns}: '
        'name one of these, or get the file again.'
      )


def _is_libsvm(path):
  for line in reading.read_lines(path, 'table'):
    if any(mark in line for mark in ',;\t:'):
      return ':' in line and not any(mark in line for mark in ',;')
  return True


def _number(word: str) -> float:
  value = float(word)
  if not abs(value) <= reading.LARGEST or '_' in word:
    raise ValueError(f'{word!r} is no finite number')
  return value


def _check_size(path, numbers, entries):
  """Checks the numbers of a table, and that not nearly all of them are 0."""
  limit = max(_ANY_SIZE, _MOST_SPARSE * entries)
  limit = min(limit, reading.MOST_NUMBERS)
  if numbers > limit:
    raise reading.damaged(
      path,
      f'it makes a table of {numbers:,} numbers from {entries:,} entries; at '
      f'most {limit:,} are read',
      'correct the largest index, or give fewer columns',
    )


def read_libsvm(
  path: files.Path,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Reads lines of a label and index:value pairs, with ascending indices.

  Args:
    path: the file; gzipped if its name ends in .gz.

  Returns:
    Labels, float64 (samples,); features, float64 (samples, largest index); line
    numbers, (samples,).

  Raises:
    MissingDataError: if the file is missing.
    DamagedDataError: if a line is invalid; names the line and the entry.
  """
  path = pathlib.Path(path)
  labels, values = array.array('d'), array.array('d')
  lines, rows, columns = (array.array('q') for _ in range(3))
  features = longest = 0
  for number, line in enumerate(reading.read_lines(path, 'LIBSVM file'), 1):
    words = line.split('#')[0].split()
    last = 0
    for place, word in enumerate(words):
      try:
        if not place:
          labels.append(_number(word))
          lines.append(number)
          continue
        index, value = word.split(':')
        if not last < int(index) <= reading.MOST_NUMBERS or '_' in index:
          raise ValueError(f'index {index}')
        last = int(index)
        values.append(_number(value))
      except ValueError as error:
        kind = 'ascending index:finite number' if place else 'finite label'
        raise reading.damaged(
          f'{path}, line {number}, column {place + 1}',
          f'{word[:40]!r} is no {kind}',
          reading.CORRECT,
        ) from error
      rows.append(len(labels) - 1)
      columns.append(last - 1)
    if last > features:
      features, longest = last, number
    _check_size(
      f'{path}, line {longest}' if longest else path,
      max(len(labels) * features, len(labels), len(values)),
      len(labels) + len(values),
    )
  table = np.zeros((len(labels), features))
  table[np.array(rows), np.array(columns)] = values
  return np.array(labels), table, np.array(lines)


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
  """Yields the numbers and cells of the lines of a csv file."""
  lines = reading.read_lines(path, 'csv file')
  first = next(lines, '')
  rows = csv.reader(
    itertools.chain([first], lines),
    delimiter=max(',;\t', key=first.count),
    strict=True,
  )
  width = 0
  try:
    for fields in rows:
      width = width or len(fields)
      if fields and len(fields) != width:
        raise csv.Error(f'{len(fields)} columns instead of {width}')
      if fields:
        yield rows.line_num, fields
  except csv.Error as error:
    raise reading.damaged(
      f'{path}, line {rows.line_num}', error, reading.CORRECT
    ) from error


def _column_names(path, header):
  """Returns the names of the columns, and whether there is a header."""
  _, first = next(_csv_rows(path), (0, []))
  if not first:
    raise reading.damaged(path, 'it is empty')
  if header is None:
    header = not any(map(_is_number, first))
  names = tuple(
    field.strip() if header else str(place)
    for place, field in enumerate(first, 1)
  )
  if len(set(names)) < len(names):
    raise reading.damaged(
      f'{path}, line 1', 'two columns of the same name', reading.CORRECT
    )
  return names, header


def _is_number(word):
  try:
    return bool(float(word) or True)
  except ValueError:
    return False


def read_csv(
  path: files.Path,
  numbers: Sequence[str] | None = None,
  *,
  words: Sequence[str] = (),
  header: bool | None = None,
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
  """Reads columns of a csv file, separated by commas, semicolons or tabs.

  Args:
    path: the file; gzipped if its name ends in .gz.
    numbers: names of numeric columns; see `read_table` for names. None for all
      other columns.
    words: names of columns of text, such as classes.
    header: see `read_table`.

  Returns:
    Numbers, float64 (samples, columns); an object array (samples,) for each
    column of text; line numbers, (samples,).

  Raises:
    MissingDataError: if the file is missing.
    SettingsError: if the file lacks a column.
    DamagedDataError: if a line is invalid; names the line and the column.
  """
  path = pathlib.Path(path)
  names, header = _column_names(path, header)
  if numbers is None:
    numbers = [name for name in names if name not in words]
  _check_columns(path, (*numbers, *words), names)
  places = {name: i for i, name in enumerate(names)}
  values, lines = array.array('d'), array.array('q')
  texts: list[tuple[array.array, dict[str, int]]]
  texts = [(array.array('q'), {}) for _ in words]
  rows = _csv_rows(path)
  for line, fields in itertools.islice(rows, int(header), None):
    try:
      for name in numbers:
        values.append(_number(fields[places[name]]))
      for name, (codes, known) in zip(words, texts):
        word = fields[places[name]].strip()
        if word.lower().lstrip('+-') in ('', 'nan', 'inf', 'infinity'):
          raise ValueError(f'{word!r} is no class')
        codes.append(known.setdefault(word, len(known)))
    except ValueError as error:
      raise reading.damaged(
        f'{path}, line {line}, column {reading.shorten(name)}',
        f'{fields[places[name]][:40]!r} is no '
        f'{"class" if name in words else "finite number"}',
        reading.CORRECT,
      ) from error
    lines.append(line)
    entries = len(values) + len(lines) * len(words)
    _check_size(path, entries, entries)
  table = np.array(values).reshape(len(lines), len(numbers))
  columns = [
    np.array(list(known), object)[np.array(codes)] for codes, known in texts
  ]
  return table, columns, np.array(lines)


def _signs(path, column, values, lines):
  """Codes two classes as -1 and 1; the larger becomes 1."""
  classes, index, where = np.unique(
    values, return_index=True, return_inverse=True
  )
  if classes.dtype == object and all(map(_is_number, classes)):
    numbers = np.array([float(word) for word in classes])[where]
    return _signs(path, column, numbers, lines)
  if len(classes) > 2:
    third = np.sort(index)[2]
    raise reading.damaged(
      f'{path}, line {lines[third]}, column {reading.shorten(column)}',
      f'{reading.shorten(values[third])} is a third class; there should be two',
      reading.CORRECT,
    )
  if len(classes) < 2:
    raise reading.damaged(
      path,
      f'it has no samples of two classes in column {reading.shorten(column)}',
      'choose another column, or get the file again',
    )
  return 2.0 * where - 1
