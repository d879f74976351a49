"""Tables of two classes: LIBSVM and csv files, and one packaged."""

import csv
import gzip
import pathlib
from typing import NamedTuple

import numpy as np
import sklearn.datasets

from experiments import harness


class Table(NamedTuple):
  """Samples of two classes.

  Attributes:
    inputs: float64 (samples, features).
    signs: float64 (samples,), -1 or 1.
    source: one line: where they come from.
  """

  inputs: np.ndarray
  signs: np.ndarray
  source: str


def read(name: str, data_dir: str | None) -> Table:
  """Reads a table by its name.

  Args:
    name: `a9a` (a LIBSVM file, 123 features), `magic` (UCI's MAGIC gamma
      telescope, a csv file, 10 features) or `breast_cancer` (in the package
      scikit-learn, 30 features).
    data_dir: a folder with the files, or whose subfolder tabular has them.

  Returns:
    A `Table`.

  Raises:
    SettingsError: if the name is unknown.
    MissingDataError: if a file is missing; says where to get it.
    DamagedDataError: if a file is not in its format; names it and the line.
  """
  if name == 'breast_cancer':
    found = sklearn.datasets.load_breast_cancer()
    source = "scikit-learn's breast cancer, 569 samples, 30 features."
    return Table(found.data, 2.0 * found.target - 1, source)
  if name == 'a9a':
    path = _find(data_dir, ('a9a', 'a9a.gz'))
    return read_libsvm(path, features=123)
  if name == 'magic':
    path = _find(data_dir, ('magic04.data', 'magic04.data.gz'))
    return read_csv(path, positive='g')
  raise harness.SettingsError(
    f'unknown table {name!r}; known: a9a, magic, breast_cancer.'
  )


def _find(data_dir, names):
  for folder in ('', 'tabular'):
    for name in names:
      if data_dir is not None:
        path = pathlib.Path(data_dir) / folder / name
        if path.is_file():
          return path
  where = 'no --data_dir is given' if data_dir is None else f'not in {data_dir}'
  raise harness.MissingDataError(
    f'{names[0]} is missing ({where}): a9a is among the LIBSVM data sets for '
    'binary classification, magic04.data is the MAGIC gamma telescope of the '
    'UCI repository; or take --tables=breast_cancer, which is packaged.'
  )


def _open(path):
  return (gzip.open if path.suffix == '.gz' else open)(path, 'rt')


def read_libsvm(path: str | pathlib.Path, *, features: int) -> Table:
  """Reads lines of a label and index:value pairs, indices from 1.

  Args:
    path: the file; gzipped if its name ends in .gz.
    features: how many there are: the last may be zero in all samples.

  Returns:
    A `Table`; labels above zero are one class.

  Raises:
    DamagedDataError: if a line is something else; names it.
  """
  path = pathlib.Path(path)
  rows, labels = [], []
  with _open(path) as file:
    for number, line in enumerate(file, 1):
      words = line.split('#')[0].split()
      if not words:
        continue
      row = np.zeros(features)
      try:
        labels.append(float(words[0]))
        for word in words[1:]:
          index, value = word.split(':')
          if int(index) < 1:
            raise IndexError(index)
          row[int(index) - 1] = float(value)
      except (ValueError, IndexError) as error:
        raise harness.DamagedDataError(
          f'{path}, line {number}: no LIBSVM line with indices 1 to {features} '
          f'({error}).'
        ) from error
      rows.append(row)
  return _table(path, rows, np.array(labels) > 0)


def read_csv(path: str | pathlib.Path, *, positive: str) -> Table:
  """Reads lines of numbers whose last column is the class, without a header.

  Args:
    path: the file; gzipped if its name ends in .gz.
    positive: the class that becomes 1.

  Returns:
    A `Table`.

  Raises:
    DamagedDataError: if a line is something else; names it.
  """
  path = pathlib.Path(path)
  rows, classes = [], []
  with _open(path) as file:
    for number, words in enumerate(csv.reader(file), 1):
      if not words:
        continue
      try:
        row = [float(word) for word in words[:-1]]
        if not row or (rows and len(row) != len(rows[0])):
          raise ValueError(f'{len(row)} numbers')
      except ValueError as error:
        raise harness.DamagedDataError(
          f'{path}, line {number}: not the same count of numbers and a class '
          f'({error}).'
        ) from error
      rows.append(row)
      classes.append(words[-1].strip())
  return _table(path, rows, np.array(classes) == positive)


def _table(path, rows, positive):
  if not rows or positive.all() or not positive.any():
    raise harness.DamagedDataError(f'{path} has no samples of two classes.')
  inputs = np.array(rows)
  source = f'{path.name}, {len(rows):,} samples, {inputs.shape[1]} features.'
  return Table(inputs, np.where(positive, 1.0, -1.0), source)
