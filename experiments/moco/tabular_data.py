"""Loads School, SARCOS, Adult, synthetic regressions or a user's table."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import harness

TORQUES = 7
_NUMBERS = (
  *('age', 'education-num', 'capital-gain', 'capital-loss', 'hours-per-week'),
)
_WORDS = ('workclass', 'marital-status', 'occupation', 'race')
Parts = dict[str, Any]


def _find(data_dir, *names):
  return harness.find(
    data_dir,
    names,
    folders=('', 'multitask'),
    advice='school.mat is in the data folder of the MALSAR package, '
    'sarcos_inv_test.mat at http://gaussianprocess.org/gpml/data, adult.csv '
    'is UCI Adult with a header; any other name is that of a LIBSVM or csv '
    'file; --datasets=made_up needs no file',
  )


def standardise(inputs: np.ndarray, train: np.ndarray) -> np.ndarray:
  """Standardises by the training rows; constant columns become zero."""
  mean, spread = inputs[train].mean(0), inputs[train].std(0)
  return (inputs - mean) / np.where(spread > 1e-6, spread, 1)


def shuffled_parts(count: int, seed: int = 0) -> list[np.ndarray]:
  """Shuffles rows into training (60 %), validation and test (20 % each)."""
  order = np.random.default_rng(seed).permutation(count)
  return np.split(order, [int(0.6 * count), int(0.8 * count)])


def as_parts(inputs: Any, targets: Any, rows: list[np.ndarray]) -> Parts:
  """Converts the three parts to float32 arrays on the device."""
  f32 = lambda x: jnp.asarray(x, jnp.float32)
  names = ('train', 'validation', 'test')
  return {n: (f32(inputs[r]), f32(targets[r])) for n, r in zip(names, rows)}


def _regressions(inputs: np.ndarray, targets: np.ndarray) -> Parts:
  """Splits a table into parts with standardised columns."""
  rows = shuffled_parts(len(inputs))
  both = (standardise(z, rows[0]) for z in (inputs, targets))
  return as_parts(*both, rows)


def read_sarcos(data_dir: str | None) -> tuple[Parts, harness.Source]:
  """Reads SARCOS, 21 joint states to 7 torques; splits its public test part."""
  path = _find(data_dir, 'sarcos_inv_test.mat')
  (table,) = harness.read_mat(path, 'sarcos_inv_test')
  with harness.parsing(path, 'table of SARCOS'):
    if table.ndim != 2 or table.shape[1] != 21 + TORQUES or len(table) < 5:
      raise ValueError(f'its shape is {table.shape}')
    table = harness.check_finite(path, table.astype(np.float64))
  words = f'{path.name}, {len(table):,} rows, split again'
  source = harness.identify_source(words, (table,), otherwise='unknown torques')
  return _regressions(table[:, :-TORQUES], table[:, -TORQUES:]), source


def make_up(count: int = 2_000) -> tuple[Parts, harness.Source]:
  """Draws regressions with shared nonlinear features, shaped like SARCOS."""
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(count, 21))
  hidden = np.tanh(inputs @ rng.normal(size=(21, 12)) / 3)
  targets = hidden @ rng.normal(size=(12, TORQUES))
  targets = targets + 0.1 * rng.normal(size=targets.shape)
  words = 'synthetic, in the shape of SARCOS; --data_dir reads real data'
  rows = shuffled_parts(count)
  return as_parts(
    inputs, standardise(targets, rows[0]), rows
  ), harness.identify_source(words, (inputs,), otherwise='made-up regressions')


def read_adult(data_dir: str | None) -> tuple[Parts, harness.Source]:
  """Reads Adult: census features without sex to (income above 50,000, sex)."""
  path = _find(data_dir, 'adult.csv', 'adult.csv.gz')
  numbers, words, _ = harness.read_csv(
    path, _NUMBERS, words=(*_WORDS, 'income-per-year', 'sex'), header=True
  )
  *categories, income, sex = words
  columns = [numbers]
  columns += [values[:, None] == np.unique(values) for values in categories]
  inputs = np.concatenate(columns, axis=1).astype(np.float64)
  income = [word.startswith('>') for word in income]
  targets = np.stack([income, sex == 'Male'], axis=1)
  words, arrays = f'{path.name}, {len(inputs):,} people', (inputs, targets)
  source = harness.identify_source(words, arrays, otherwise='unknown census')
  capital = [i for i, name in enumerate(_NUMBERS) if 'capital' in name]
  with harness.parsing(path, 'file of Adult'):
    if len(inputs) < 5 or inputs[:, capital].min() < 0:
      raise ValueError('it has fewer than 5 rows or a negative capital')
  inputs[:, capital] = np.log1p(inputs[:, capital])
  rows = shuffled_parts(len(inputs))
  return as_parts(standardise(inputs, rows[0]), targets, rows), source


def read_school(data_dir: str | None) -> tuple[Parts, harness.Source]:
  """Reads School: exam scores of 139 schools, padded to the largest one."""
  path = _find(data_dir, 'school.mat')
  tables = harness.read_mat(path, 'X', 'Y')
  with harness.parsing(path, 'file of schools'):
    inputs, scores = (
      [harness.check_finite(path, np.array(z, np.float64)) for z in table[0]]
      for table in tables
    )
    scores = [y.ravel() for y in scores]
    if not inputs or len(inputs) != len(scores):
      raise ValueError(f'{len(inputs)} schools, {len(scores)} lists of scores')
    if any(len(y) != len(x) or len(y) < 5 for x, y in zip(inputs, scores)):
      raise ValueError('a school has fewer than 5 pupils or missing scores')
    if any(x.ndim != 2 for x in inputs):
      raise ValueError('the features of a school are no table')
    together = np.concatenate(inputs), np.concatenate(scores)
  parts = [shuffled_parts(len(y), seed=i) for i, y in enumerate(scores)]
  train = np.concatenate([x[p[0]] for x, p in zip(inputs, parts)])
  mean, spread = train.mean(0), train.std(0)
  spread = np.where(spread > 1e-6, spread, 1)
  labels = np.concatenate([y[p[0]] for y, p in zip(scores, parts)])
  centre, scale = labels.mean(), labels.std() if np.ptp(labels) > 1e-6 else 1
  data = {}
  for i, part in enumerate(('train', 'validation', 'test')):
    width = max(len(p[i]) for p in parts)
    x = np.zeros((len(scores), width, len(mean)), np.float32)
    y = np.zeros((len(scores), width), np.float32)
    size = np.array([len(p[i]) for p in parts], np.int32)
    for school, p in enumerate(parts):
      x[school, : size[school]] = (inputs[school][p[i]] - mean) / spread
      y[school, : size[school]] = (scores[school][p[i]] - centre) / scale
    data[part] = tuple(map(jnp.asarray, (x, y, size)))
  words = f"MALSAR's School, {len(scores)} schools, {len(together[1]):,} pupils"
  return data, harness.identify_source(
    words, together, otherwise='unknown schools'
  )


READ = {
  'sarcos': read_sarcos,
  'adult': read_adult,
  'school': read_school,
  'made_up': lambda data_dir: make_up(),
}


def read(
  name: str,
  data_dir: str | None,
  *,
  targets: Sequence[str] = (),
  header: bool | None = None,
) -> tuple[Parts, harness.Source]:
  """Reads a data set by its name.

  Args:
    name: school, sarcos or adult, with files in the data folder or its
      subfolder multitask; made_up; or the name of a LIBSVM or csv file.
    data_dir: folder of data sets, or None.
    targets: two or more targets of other files, see `harness.read_table`.
    header: whether other files have a header, see `harness.read_table`.

  Returns:
    The parts train, validation and test, and their source.

  Raises:
    MissingDataError: if a file is missing; tells where to get it.
    DamagedDataError: if a file has an invalid format.
    SettingsError: if there are fewer than two targets.
  """
  if name in READ:
    return READ[name](data_dir)
  folder = '' if pathlib.Path(name).is_file() else data_dir
  path = _find(folder, name, f'{name}.gz')
  if len(targets) < 2:
    raise harness.SettingsError(
      f'{path} needs two or more target columns, one per task: set --targets.'
    )
  table = harness.read_table(path, targets=targets, header=header)
  if len(table.inputs) < 5:
    raise harness.DamagedDataError(f'{path} has fewer than 5 rows: give more.')
  return _regressions(table.inputs, table.targets), table.source
