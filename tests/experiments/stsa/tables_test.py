"""Tables: both formats, written here; what is missing or damaged is named."""

import gzip
import os

import numpy as np
import pytest

from experiments import harness
from experiments.stsa import tables


def test_libsvm(tmp_path):
  path = tmp_path / 'a9a'
  path.write_text('-1 1:1 3:0.5\n+1 2:2 # said\n\n')
  found = tables.read_libsvm(path, features=4)
  np.testing.assert_array_equal(found.inputs, [[1, 0, 0.5, 0], [0, 2, 0, 0]])
  np.testing.assert_array_equal(found.signs, [-1, 1])


def test_csv_gzipped_and_found_in_the_subfolder(tmp_path):
  (tmp_path / 'tabular').mkdir()
  path = tmp_path / 'tabular' / 'magic04.data.gz'
  with gzip.open(path, 'wt') as file:
    file.write('1.5,2,g\n-3,4e1,h\n')
  found = tables.read('magic', str(tmp_path))
  np.testing.assert_array_equal(found.inputs, [[1.5, 2], [-3, 40]])
  np.testing.assert_array_equal(found.signs, [1, -1])
  assert '2 samples' in found.source


@pytest.mark.parametrize('line', ['1 0:1', '1 5:1', 'x 1:1', '1 1', '-1 one:2'])
def test_damaged_libsvm(tmp_path, line):
  path = tmp_path / 'a9a'
  path.write_text(f'1 1:1\n{line}\n')
  with pytest.raises(harness.DamagedDataError, match='line 2'):
    tables.read_libsvm(path, features=4)


@pytest.mark.parametrize('line', ['1,g', '1,2,3,g', '1,two,h'])
def test_damaged_csv(tmp_path, line):
  path = tmp_path / 'magic04.data'
  path.write_text(f'1,2,g\n{line}\n')
  with pytest.raises(harness.DamagedDataError, match='line 2'):
    tables.read_csv(path, positive='g')


def test_one_class_is_no_table(tmp_path):
  path = tmp_path / 'magic04.data'
  path.write_text('1,2,g\n2,3,g\n')
  with pytest.raises(harness.DamagedDataError, match='two classes'):
    tables.read_csv(path, positive='g')


def test_missing_and_unknown(tmp_path):
  with pytest.raises(harness.MissingDataError, match='LIBSVM'):
    tables.read('a9a', str(tmp_path))
  with pytest.raises(harness.MissingDataError, match='no --data_dir'):
    tables.read('magic', None)
  with pytest.raises(harness.SettingsError, match='known: a9a'):
    tables.read('iris', None)


def test_packaged():
  found = tables.read('breast_cancer', None)
  assert found.inputs.shape == (569, 30)
  assert set(found.signs) == {-1, 1}


def test_real_files():
  folder = os.environ.get('BILEVEL_JAX_DATA')
  if not folder:
    pytest.skip('BILEVEL_JAX_DATA names no folder with a9a and magic04.data.')
  assert tables.read('a9a', folder).inputs.shape == (32_561, 123)
  assert tables.read('magic', folder).inputs.shape == (19_020, 10)
