"""School, SARCOS and Adult from their files, and regressions that are made up.

`multitask` in the data folder, or the folder itself, has `school.mat`
(MALSAR's), `sarcos_inv_test.mat` and `adult.csv.gz`.
"""

import csv
import gzip
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.io

from experiments import harness

TORQUES = 7


def find(data_dir: str | None, name: str) -> pathlib.Path:
  """A file of the data folder, or of its subfolder multitask."""
  for folder in ('', 'multitask'):
    if data_dir is not None:
      path = pathlib.Path(data_dir) / folder / name
      if path.is_file():
        return path
  where = 'no --data_dir is given' if data_dir is None else f'not in {data_dir}'
  raise harness.MissingDataError(
    f'{name} is missing ({where}): school.mat is in the data folder of the '
    'MALSAR package, sarcos_inv_test.mat at '
    'http://gaussianprocess.org/gpml/data, adult.csv is UCI Adult with a '
    'header; or take --datasets=made_up.'
  )


def standardise(inputs: np.ndarray, train: np.ndarray) -> np.ndarray:
  """Zero mean and unit variance on the training rows; constants stay zero."""
  mean, spread = inputs[train].mean(0), inputs[train].std(0)
  return (inputs - mean) / np.where(spread > 1e-6, spread, 1)


def shuffled_parts(count: int, seed: int = 0) -> list[np.ndarray]:
  """Rows for training (60 %), validation and test (20 % each)."""
  order = np.random.default_rng(seed).permutation(count)
  return np.split(order, [int(0.6 * count), int(0.8 * count)])


def as_parts(inputs: Any, targets: Any, rows: list[np.ndarray]) -> dict:
  """The three parts as float32 arrays on the device."""
  put = lambda x: jnp.asarray(x, jnp.float32)
  names = ('train', 'validation', 'test')
  return {n: (put(inputs[r]), put(targets[r])) for n, r in zip(names, rows)}


def read_sarcos(data_dir: str | None) -> dict[str, Any]:
  """21 joint states to 7 torques; only the public test part, split anew."""
  path = find(data_dir, 'sarcos_inv_test.mat')
  table = scipy.io.loadmat(path)['sarcos_inv_test']
  rows = shuffled_parts(len(table))
  table = standardise(table.astype(np.float64), rows[0])
  return as_parts(table[:, :-TORQUES], table[:, -TORQUES:], rows)


def make_up(count: int = 2_000) -> dict[str, Any]:
  """Regressions that share nonlinear features, of the shape of SARCOS."""
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(count, 21))
  hidden = np.tanh(inputs @ rng.normal(size=(21, 12)) / 3)
  targets = hidden @ rng.normal(size=(12, TORQUES))
  targets = targets + 0.1 * rng.normal(size=targets.shape)
  rows = shuffled_parts(count)
  return as_parts(inputs, standardise(targets, rows[0]), rows)


def read_adult(data_dir: str | None) -> dict[str, Any]:
  """Census features to (income above 50,000, sex); sex is no input."""
  path = find(data_dir, 'adult.csv.gz')
  with gzip.open(path, 'rt') as file:
    records = list(csv.DictReader(file))
  numbers = ('age', 'education-num', 'capital-gain', 'capital-loss')
  numbers += ('hours-per-week',)
  columns = [
    np.log1p([float(r[n]) for r in records])
    if n.startswith('capital')
    else np.array([float(r[n]) for r in records])
    for n in numbers
  ]
  for name in ('workclass', 'marital-status', 'occupation', 'race'):
    values = sorted({r[name] for r in records})
    columns += [np.array([r[name] == v for r in records]) for v in values]
  inputs = np.stack(columns, axis=1).astype(np.float64)
  income = [r['income-per-year'].strip().startswith('>') for r in records]
  sex = [r['sex'].strip() == 'Male' for r in records]
  rows = shuffled_parts(len(records))
  targets = np.stack([income, sex], axis=1)
  return as_parts(standardise(inputs, rows[0]), targets, rows)


def read_school(data_dir: str | None) -> dict[str, Any]:
  """Pupils of 139 schools to exam scores; arrays padded to the largest."""
  table = scipy.io.loadmat(find(data_dir, 'school.mat'))
  inputs = [np.asarray(x, np.float64) for x in table['X'][0]]
  scores = [np.asarray(y, np.float64).ravel() for y in table['Y'][0]]
  parts = [shuffled_parts(len(y), seed=i) for i, y in enumerate(scores)]
  train = np.concatenate([x[p[0]] for x, p in zip(inputs, parts)])
  mean, spread = train.mean(0), train.std(0)
  spread = np.where(spread > 1e-6, spread, 1)
  known = np.concatenate([y[p[0]] for y, p in zip(scores, parts)])
  data = {}
  for i, part in enumerate(('train', 'validation', 'test')):
    most = max(len(p[i]) for p in parts)
    x = np.zeros((len(scores), most, len(mean)), np.float32)
    y = np.zeros((len(scores), most), np.float32)
    size = np.array([len(p[i]) for p in parts], np.int32)
    for school, p in enumerate(parts):
      x[school, : size[school]] = (inputs[school][p[i]] - mean) / spread
      y[school, : size[school]] = (scores[school][p[i]] - known.mean()) / (
        known.std()
      )
    data[part] = tuple(map(jnp.asarray, (x, y, size)))
  return data


READ = {
  'sarcos': read_sarcos,
  'adult': read_adult,
  'school': read_school,
  'made_up': lambda data_dir: make_up(),
}
