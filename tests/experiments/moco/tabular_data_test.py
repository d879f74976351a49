"""Missing files, standardisation and splits of tabular data."""

import os

import numpy as np
import pytest

from experiments import harness
from experiments.moco import tabular_data


def test_missing_data(tmp_path):
  with pytest.raises(harness.MissingDataError, match='MALSAR'):
    tabular_data.read_school(str(tmp_path))
  with pytest.raises(harness.MissingDataError, match='any other name'):
    tabular_data.read('other', None)


def test_synthetic_targets_are_standardised_and_parts_disjoint():
  data, source = tabular_data.make_up(200)
  assert source.name == 'made-up regressions'
  assert [len(data[part][0]) for part in data] == [120, 40, 40]
  inputs, targets = data['train']
  assert targets.shape == (120, tabular_data.TORQUES)
  np.testing.assert_allclose(targets.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(targets.std(0), 1, rtol=1e-5)
  assert not np.isin(data['test'][0][:, 0], inputs[:, 0]).any()


def test_table_of_a_user(tmp_path):
  path = tmp_path / 'mine.csv'
  rows = np.random.default_rng(0).normal(size=(50, 4)).round(3).tolist()
  path.write_text(
    '\n'.join(['a,b,c,d'] + [','.join(map(str, r)) for r in rows])
  )
  data, source = tabular_data.read(
    'mine.csv', str(tmp_path), targets=('b', 'd')
  )
  inputs, targets = data['train']
  assert (inputs.shape, targets.shape) == ((30, 2), (30, 2))
  np.testing.assert_allclose(targets.std(0), 1, rtol=1e-5)
  assert source.name == 'unknown table mine.csv'
  with pytest.raises(harness.SettingsError, match='two or more'):
    tabular_data.read(str(path), None, targets=('b',))


@pytest.mark.parametrize('name', ['sarcos', 'adult', 'school'])
def test_real_files(name):
  folder = os.environ.get('BILEVEL_JAX_DATA')
  if not folder:
    pytest.skip('BILEVEL_JAX_DATA names no folder with these files.')
  data, source = tabular_data.read(name, folder)
  assert source.name == name
  assert set(data) == {'train', 'validation', 'test'}
