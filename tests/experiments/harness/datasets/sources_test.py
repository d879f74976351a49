"""What stands in for published data; files are found or it is said where."""

import json

import numpy as np
import pytest

from experiments import harness
from experiments.harness.data import sources


def source(name):
  return harness.Source(name, f'some {name}', 'abc')


@pytest.mark.parametrize(
  ('read', 'published', 'said'),
  [
    (('MNIST',), ('MNIST',), ''),
    (('MNIST', 'a9a'), ('a9a',), ''),
    (('unknown images',), ('MNIST',), 'unknown images'),
    (('a9a', 'mine.csv'), ('a9a', 'magic'), 'mine.csv'),
    (('a9a',), ('a9a', 'magic'), 'a part of the data'),
    ((), (), ''),
  ],
)
def test_only_what_was_read_is_published(
  options, results, read, published, said
):
  harness.write_results(
    options(),
    metrics={},
    seconds=0,
    data=tuple(map(source, read)),
    published=published,
  )
  assert results()['substituted'] == said
  assert results()['data'] == '; '.join(f'some {name}' for name in read)
  assert json.dumps(results()['data_digests']).count('abc') == len(read)


def test_data_are_named_by_all_of_their_parts(monkeypatch):
  one, two = np.arange(3), np.arange(4.0)
  digest = sources.identify_source('', (one,), otherwise='').digest
  monkeypatch.setattr(sources, '_KNOWN', {digest: 'ours'})
  name = lambda *parts: (
    sources.identify_source('', *parts, otherwise='new').name
  )
  assert name((one,)) == name((one,), (one,)) == 'ours'
  assert name((one + 0.0,)) == name((one, two)) == name((one,), (two,)) == 'new'


def test_the_first_of_names_and_folders_is_found(tmp_path):
  (tmp_path / 'in' / 'a').mkdir(parents=True)
  (tmp_path / 'in' / 'b').write_text('')
  find = lambda *names, **how: harness.find(
    tmp_path, names, folders=('', 'in'), advice='get it', **how
  )
  assert find('a', 'b') == tmp_path / 'in' / 'b'
  assert find('b', 'a', is_folder=True) == tmp_path / 'in' / 'a'
  with pytest.raises(harness.MissingDataError, match=r'a or c is .*: get it\.'):
    find('a', 'c', 'd')


def test_the_first_value_that_is_not_finite_is_named():
  assert harness.check_finite('f', np.ones(2)).sum() == 2
  for value in (np.nan, -np.inf, 1e39):
    array = np.ones((3, 2))
    array[1, 1] = value
    with pytest.raises(harness.DamagedDataError, match='f, row 2, column 2'):
      harness.check_finite('f', array)
