"""Tables of numbers: LIBSVM and csv files, a user's own among them."""

import array
import csv
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments.harness.app import errors
from experiments.harness.data import sources
from experiments.harness.store import files

LABEL = 'label'


class Table(NamedTuple):
  """Samples of numbers.

  Attributes:
    inputs: float64 (samples, features).
    targets: float64 (samples, targets).
    source: where they come from.
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
  """Reads a LIBSVM or csv file, told apart by the first line that can tell.

  Args:
    path: the file; gzipped if its name ends in .gz.
    targets: names of the columns to be predicted; all others are inputs.
      Columns without a header are called 1, 2, ... and of LIBSVM files label,
      1, 2, ...; by default the last one, or the label.
    header: whether the first line of a csv file has the names; by default if
      it has no number.
    classes: whether the target is one of two classes, of which the greater
      becomes 1 and the other -1.

  Returns:
    A `Table`.

  Raises:
    MissingDataError: if there is no such file.
    SettingsError: if the file has no such columns.
    DamagedDataError: if something is no finite number, or lines are of other
      lengths, or there are not two classes; names the file and the place.
  """
  path = pathlib.Path(path)
  words: tuple[str, ...] = ()
  if _is_libsvm(path):
    labels, inputs, lines = read_libsvm(path)
    if not labels.size:
      raise errors.DamagedDataError(f'{path} has no samples.')
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
  used = [names.index(name) for name in targets if name in names]
  values = numbers[:, used]
  inputs = np.delete(numbers, used, axis=1)
  if not inputs.size:
    raise errors.DamagedDataError(f'{path} has no samples with inputs.')
  if classes:
    column = texts[0] if words else values[:, 0]
    values = _signs(path, targets[0], column, lines)[:, None]
  said = f'{path.name}, {len(inputs):,} samples, {inputs.shape[1]} features'
  found = (inputs, values)
  return Table(
    *found,
    sources.source_of(said, found, otherwise=f'unknown table {path.name}'),
  )


def _check_columns(path, wanted, names):
  for name in wanted:
    if name not in names:
      raise errors.SettingsError(
        f'{path} has no column {name!r}; it has {", ".join(names[:20])}.'
      )


def _is_libsvm(path):
  for line in sources.read_lines(path, 'table'):
    if any(mark in line for mark in ',;\t:'):
      return ':' in line and not any(mark in line for mark in ',;')
  return True


def _number(word: str) -> float:
  value = float(word)
  if not abs(value) <= sources.LARGEST or '_' in word:
    raise ValueError(f'{word!r} is no finite number')
  return value


def _check_size(path, numbers):
  if numbers > sources.MOST_NUMBERS:
    raise errors.DamagedDataError(
      f'{path} makes a table of {numbers:,} numbers; at most '
      f'{sources.MOST_NUMBERS:,} are read.'
    )


def read_libsvm(
  path: files.Path,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Reads lines of a label and index:value pairs, indices from 1, ascending.

  Args:
    path: the file; gzipped if its name ends in .gz.

  Returns:
    Labels, float64 (samples,); features, float64 (samples, features), as many
    as the greatest index; the lines that they were on, (samples,).

  Raises:
    MissingDataError: if there is no such file.
    DamagedDataError: if a line is something else; names it and the word.
  """
  path = pathlib.Path(path)
  labels, values = array.array('d'), array.array('d')
  lines, rows, columns = (array.array('q') for _ in range(3))
  features = 0
  for number, line in enumerate(sources.read_lines(path, 'LIBSVM file'), 1):
    words = line.split('#')[0].split()
    last = 0
    for place, word in enumerate(words):
      try:
        if not place:
          labels.append(_number(word))
          lines.append(number)
          continue
        index, value = word.split(':')
        if not last < int(index) <= sources.MOST_NUMBERS or '_' in index:
          raise ValueError(f'index {index}')
        last = int(index)
        values.append(_number(value))
      except ValueError as error:
        raise errors.DamagedDataError(
          f'{path}, line {number}, column {place + 1}: {word[:40]!r} is no '
          + ('finite label' if not place else 'ascending index:finite number')
          + '.'
        ) from error
      rows.append(len(labels) - 1)
      columns.append(last - 1)
    features = max(features, last)
    _check_size(path, max(len(labels) * features, len(labels), len(values)))
  table = np.zeros((len(labels), features))
  table[np.array(rows), np.array(columns)] = values
  return np.array(labels), table, np.array(lines)


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
  """Lines of a csv file with their numbers, all with as many columns."""
  lines = sources.read_lines(path, 'csv file')
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
    raise errors.DamagedDataError(
      f'{path}, line {rows.line_num}: {error}.'
    ) from error


def _column_names(path, header):
  """Names of the columns, and whether the first line has them."""
  _, first = next(_csv_rows(path), (0, []))
  if not first:
    raise errors.DamagedDataError(f'{path} is empty.')
  if header is None:
    header = not any(map(_is_number, first))
  names = tuple(
    field.strip() if header else str(place)
    for place, field in enumerate(first, 1)
  )
  if len(set(names)) < len(names):
    raise errors.DamagedDataError(f'{path} has two columns of one name.')
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
  """Reads columns of a csv file; between them is a comma, semicolon or tab.

  Args:
    path: the file; gzipped if its name ends in .gz.
    numbers: names of columns of numbers; see `read_table` for names. None for
      all that are not of words.
    words: names of columns of words, such as classes.
    header: see `read_table`.

  Returns:
    The numbers, float64 (samples, columns); an array (samples,) of objects for
    each column of words; the lines that samples were on, (samples,).

  Raises:
    MissingDataError: if there is no such file.
    SettingsError: if the file has no such columns.
    DamagedDataError: if a line is something else; names it and the column.
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
      raise errors.DamagedDataError(
        f'{path}, line {line}, column {name}: {fields[places[name]][:40]!r} is '
        f'no {"class" if name in words else "finite number"}.'
      ) from error
    lines.append(line)
    _check_size(path, len(values) + len(lines) * len(words))
  table = np.array(values).reshape(len(lines), len(numbers))
  columns = [
    np.array(list(known), object)[np.array(codes)] for codes, known in texts
  ]
  return table, columns, np.array(lines)


def _signs(path, column, values, lines):
  """-1 and 1 for two classes, the greater of which is 1."""
  classes, index, where = np.unique(
    values, return_index=True, return_inverse=True
  )
  if classes.dtype == object and all(map(_is_number, classes)):
    numbers = np.array([float(word) for word in classes])[where]
    return _signs(path, column, numbers, lines)
  if len(classes) > 2:
    third = np.sort(index)[2]
    raise errors.DamagedDataError(
      f'{path}, line {lines[third]}, column {column}: {values[third]} is a '
      'third class; there should be two.'
    )
  if len(classes) < 2:
    raise errors.DamagedDataError(
      f'{path} has no samples of two classes in column {column}.'
    )
  return 2.0 * where - 1
