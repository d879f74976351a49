"""Tables: both formats, columns by name; what is wrong, by its place."""

import gzip

import numpy as np
import pytest

from experiments import harness
from experiments.harness.data import reading


@pytest.fixture
def table(tmp_path):
  """Reads a table from a text; gzipped if the name says so."""

  def read(text, name='table', **how):
    path = tmp_path / name
    with (gzip.open if name.endswith('.gz') else open)(path, 'wb') as file:
      file.write(text.encode() if isinstance(text, str) else text)
    return harness.read_table(path, **how)

  return read


def test_libsvm_features_are_inferred(table):
  found = table('-1 1:1 3:0.5\n+1 2:2 # said\n\n', classes=True)
  np.testing.assert_array_equal(found.inputs, [[1, 0, 0.5], [0, 2, 0]])
  np.testing.assert_array_equal(found.targets, [[-1], [1]])
  found = table('7.5 2:3\n8', targets=('label', '1'))
  np.testing.assert_array_equal(found.inputs, [[3], [0]])
  np.testing.assert_array_equal(found.targets, [[7.5, 0], [8, 0]])


@pytest.mark.parametrize('mark', [',', ';', '\t'])
@pytest.mark.parametrize('name', ['mine.csv', 'mine.csv.gz'])
def test_csv_with_names(table, mark, name):
  text = '\ufeffa,b,"c",d\n1.5,2,no,3\n\n-3,4e1,yes,5\n'.replace(',', mark)
  found = table(text, name, targets=('c',), classes=True)
  np.testing.assert_array_equal(found.inputs, [[1.5, 2, 3], [-3, 40, 5]])
  np.testing.assert_array_equal(found.targets, [[-1], [1]])
  assert found.source.words == f'{name}, 2 samples, 3 features'
  with pytest.raises(harness.DamagedDataError, match='line 2, column c'):
    table(text, name, targets=('a', 'd'))


def test_csv_with_classes_of_words(tmp_path):
  path = tmp_path / 'mine.csv'
  path.write_text('a,kind,b\n1,red,2\n3,blue,4\n5,red,6\n')
  numbers, (kinds,), lines = harness.read_csv(path, words=('kind',))
  np.testing.assert_array_equal(numbers, [[1, 2], [3, 4], [5, 6]])
  assert kinds.tolist() == ['red', 'blue', 'red']
  assert lines.tolist() == [2, 3, 4]


def test_csv_without_names(table):
  found = table('1,2,9\n3,4,9\n')
  np.testing.assert_array_equal(found.targets, [[9], [9]])
  found = table('1,2,9\n3,4,9\n', targets=('3', '1'))
  np.testing.assert_array_equal(found.targets, [[9, 1], [9, 3]])
  found = table('1,2,9\n3,4,9\n', targets=('2',), header=True)
  np.testing.assert_array_equal(found.inputs, [[3, 9]])
  with pytest.raises(harness.SettingsError, match="no column 'x'; it has 1, 2"):
    table('1,2,9\n3,4,9\n', targets=('x',))


def test_the_greater_class_is_1(table):
  for low, high in (('2', '10'), ('1.0', '2'), ('g', 'h'), ('-1', '+1')):
    found = table(f'0,{high}\n0,{low}\n1,{low}\n', classes=True)
    np.testing.assert_array_equal(found.targets, [[1], [-1], [-1]])


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('1 1:1\n1 0:1', "line 2, column 2: '0:1'"),
    ('1 1:1\n1 2:1 2:3', "line 2, column 3: '2:3'"),
    ('1 1:1\nx 1:1', "line 2, column 1: 'x' is no finite label"),
    ('1 1:1\nnan 1:1', "line 2, column 1: 'nan'"),
    ('1 1:1\n-1 1:inf', "line 2, column 2: '1:inf'"),
    ('1 1:1\n1 1', "line 2, column 2: '1'"),
    ('1 1:1\n2 1:2\n3 1:3', 'line 3, column label: 3.0 is a third class'),
    ('1 1:1\n1 1:2', 'no samples of two classes in column label'),
    ('1 1:1\n-1 99999999:1', 'line 2, column 2'),
    ('1 1:1\n' + '-1 9999999:1\n' * 9, 'makes a table of 19,999,998 numbers'),
    ('1,2,g\n1,g', 'line 2: 2 columns instead of 3'),
    ('1,2,g\n1,two,h', "line 2, column 2: 'two' is no finite number"),
    ('1,2,g\n1,nan,h', "line 2, column 2: 'nan'"),
    ('1,2,g\n1,1_0,h', "line 2, column 2: '1_0'"),
    ('1,2,g\n1,3,', "line 2, column 3: '' is no class"),
    ('1,2,g\n1,3,h\n1,4,i', 'line 3, column 3: i is a third class'),
    ('1,2,g\n1,3,g', 'no samples of two classes'),
    ('a,a\n1,2', 'two columns of the same name'),
    ('1,"2', 'line 1: unexpected end'),
    ('', 'has no samples'),
    (b'1,2,g\n1,\xff,h', 'line 2: not UTF-8'),
  ],
)
def test_what_is_damaged_is_named(table, text, said):
  with pytest.raises(harness.DamagedDataError, match=said):
    table(text, classes=True)


def test_a_file_that_is_missing_or_empty_is_said_to_be(table, tmp_path):
  for name in ('none', 'none.csv.gz'):
    with pytest.raises(harness.MissingDataError, match=f'no file .*{name}'):
      harness.read_table(tmp_path / name, targets=('kind',))
  for text in ('', '\n\n'):
    with pytest.raises(harness.DamagedDataError, match='has no samples'):
      table(text, targets=('kind',))


@pytest.mark.parametrize('limit', ['MOST_TEXT', 'MOST_LINE', 'MOST_NUMBERS'])
def test_a_file_that_unpacks_to_too_much(table, limit, monkeypatch):
  monkeypatch.setattr(reading, limit, 1_000)
  text = '1' + ',0' * 1_000 if limit == 'MOST_LINE' else '1,0\n' * 1_000
  with pytest.raises(harness.DamagedDataError, match='1,000'):
    table(text, 'bomb.csv.gz')
