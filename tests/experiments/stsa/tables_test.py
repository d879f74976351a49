"""Tables by name: published, packaged, or a user's file."""

import gzip
import os

import numpy as np
import pytest

from experiments import harness
from experiments.stsa import tables


def test_subfolder(tmp_path):
  (tmp_path / 'tabular').mkdir()
  path = tmp_path / 'tabular' / 'magic04.data.gz'
  with gzip.open(path, 'wt') as file:
    file.write('1.5,2,g\n-3,4e1,h\n')
  table = tables.read('magic', str(tmp_path))
  np.testing.assert_array_equal(table.inputs, [[1.5, 2], [-3, 40]])
  np.testing.assert_array_equal(table.targets, [[-1], [1]])
  # A part of the file is not recognised.
  assert table.source.name == 'unknown table magic04.data.gz'


def test_missing(tmp_path):
  with pytest.raises(harness.MissingDataError, match='LIBSVM'):
    tables.read('a9a', str(tmp_path))
  with pytest.raises(harness.MissingDataError, match='no --data_dir'):
    tables.read('magic', None)
  with pytest.raises(
    harness.MissingDataError, match=r'iris.*LIBSVM or csv file, or a9a'
  ):
    tables.read('iris', None)


def test_packaged():
  table = tables.read('breast_cancer', None)
  assert table.inputs.shape == (569, 30)
  assert set(table.targets.ravel()) == {-1, 1}


def test_real_files():
  folder = os.environ.get('BILEVEL_JAX_DATA')
  if not folder:
    pytest.skip('BILEVEL_JAX_DATA names no folder with a9a and magic04.data.')
  for name, shape in (('a9a', (32_561, 123)), ('magic', (19_020, 10))):
    table = tables.read(name, folder)
    assert (table.inputs.shape, table.source.name) == (shape, name)
