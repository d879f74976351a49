"""Damaged files: a valid result or one line that names the file, always."""

import contextlib
import gzip
import io
import pathlib
import resource
import struct
import tempfile
import tracemalloc
import zlib

import hypothesis
import jax
import numpy as np
import pytest
import scipy.io
from hypothesis import strategies as st

from experiments import harness, vision
from experiments.harness.data import arrays, tables
from experiments.moco import tabular_data
from experiments.stsa import tables as two_classes
from experiments.vision import digits

RNG = np.random.default_rng(0)
ADULT = (
  'age,workclass,education-num,marital-status,occupation,race,sex,'
  'capital-gain,capital-loss,hours-per-week,income-per-year\n'
) + ''.join(
  f'{20 + i},{"AB"[i % 2]},{i},M,O,R,{("Male", "Female")[i % 2]},{i},0,40,'
  f'{("<=50K", ">50K")[i % 2]}\n'
  for i in range(8)
)


def idx(array):
  header = struct.pack(f'>I{array.ndim}I', 0x800 + array.ndim, *array.shape)
  return header + array.astype(np.uint8).tobytes()


def saved(save, *args, **how):
  file = io.BytesIO()
  save(file, *args, **how)
  return file.getvalue()


def mat(variables, packed):
  return saved(scipy.io.savemat, variables, do_compression=packed)


def cells(*tables):
  """A row of cells, as MATLAB has it."""
  row = np.empty((1, len(tables)), object)
  row[0] = tables
  return row


IMAGES = idx(RNG.integers(0, 256, (6, 28, 28)))
LABELS = idx(np.arange(6) % 10)
SCHOOL = {
  'X': cells(RNG.normal(size=(6, 3)), RNG.normal(size=(7, 3))),
  'Y': cells(RNG.normal(size=(6, 1)), RNG.normal(size=(7, 1))),
}
LIBSVM = b'-1 1:1 3:0.5\n+1 2:2 3:-1e-3 # said\n-1 1:0.25\n'
CSV = b'a,b,"c"\n1.5,2,no\n-3,4e1,yes\n2,2,no\n0,1,yes\n5,5,no\n6,1,no\n'
PLAIN = b'1,2,3\n4,5,6\n7,8,9\n1,0,1\n2,2,2\n'


def digits_with(name):
  """Reads digits from a folder in which one file is under test."""

  def read(folder):
    for kind, content in (('images-idx3', IMAGES), ('labels-idx1', LABELS)):
      path = folder / f'train-{kind}-ubyte'
      if path.name != name.removesuffix('.gz'):
        path.write_bytes(content)
    return vision.load_digits(folder, {'train': None})[0]

  return read


def of_table(name, **how):
  return lambda folder: harness.read_table(folder / name, **how)[:2]


# The file under test, its valid content, and what reads it.
PARSERS = {
  'idx images': (
    'train-images-idx3-ubyte',
    IMAGES,
    digits_with('train-images-idx3-ubyte'),
  ),
  'idx labels': (
    'train-labels-idx1-ubyte.gz',
    gzip.compress(LABELS),
    digits_with('train-labels-idx1-ubyte.gz'),
  ),
  'libsvm': ('table', LIBSVM, of_table('table', classes=True)),
  'libsvm numbers': ('table', LIBSVM, of_table('table')),
  'libsvm packed': ('t.gz', gzip.compress(LIBSVM), of_table('t.gz')),
  'csv': ('table', CSV, of_table('table', classes=True)),
  'csv numbers': ('table', PLAIN, of_table('table', targets=('1', '3'))),
  'csv packed': (
    't.gz',
    gzip.compress(CSV),
    of_table('t.gz', targets=('c',), classes=True),
  ),
  'magic': (
    'magic04.data',
    b'1,2,g\n3,4,h\n',
    lambda folder: two_classes.read('magic', str(folder))[:2],
  ),
  'own regressions': (
    'mine.csv',
    PLAIN,
    lambda folder: tabular_data.read(
      'mine.csv', str(folder), targets=('1', '2')
    )[0],
  ),
  'adult': (
    'adult.csv',
    ADULT.encode(),
    lambda folder: tabular_data.read_adult(str(folder))[0],
  ),
  'sarcos': (
    'sarcos_inv_test.mat',
    mat({'sarcos_inv_test': RNG.normal(size=(5, 28))}, True),
    lambda folder: tabular_data.read_sarcos(str(folder))[0],
  ),
  'school': (
    'school.mat',
    mat(SCHOOL, False),
    lambda folder: tabular_data.read_school(str(folder))[0],
  ),
}
# What parsers stumble over.
WORDS = b'nan -inf 1e999 1e39 1_0 -1 " , : ; 0x1 99999999999999999999'.split()
PIECES = st.binary(min_size=1, max_size=4) | st.sampled_from(
  [*WORDS, b'\r', b'\n', b' ', b'\t', b'\x00' * 4, b'\xff' * 4]
)


@st.composite
def damaged(draw, valid):
  """A file with bits flipped, pieces cut out or put in; or nothing of it."""
  if draw(st.integers(0, 9)) == 0:
    return draw(st.binary(max_size=200))
  content = bytearray(valid)
  for _ in range(draw(st.integers(1, 3))):
    at = draw(st.integers(0, max(0, len(content) - 1)))
    kind = draw(st.sampled_from(['flip', 'cut', 'end', 'put']))
    if kind == 'flip' and content:
      content[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == 'cut':
      del content[at : at + draw(st.integers(1, 16))]
    elif kind == 'end':
      del content[at:]
    else:
      content[at:at] = draw(PIECES)
  return bytes(content)


@contextlib.contextmanager
def within(mebibytes):
  """Fails if the most memory that this process had grows by more."""
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  yield
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert after - before < mebibytes * 1024


def check(name, content):
  """Reads one content: finite arrays, or an error of one line."""
  file, _, read = PARSERS[name]
  with tempfile.TemporaryDirectory() as made:
    folder = pathlib.Path(made)
    (folder / file).write_bytes(content)
    try:
      found = jax.tree.leaves(read(folder))
    except (
      harness.DamagedDataError,
      harness.MissingDataError,
      harness.SettingsError,
    ) as error:
      text = str(error)
      assert '\n' not in text and len(text) < 1_000
      assert text.startswith(made) or 'is missing' in text
      return
  assert found
  for array in found:
    assert np.isfinite(np.asarray(array)).all()


@pytest.mark.parametrize('name', PARSERS)
def test_a_valid_file_is_read(name, tmp_path):
  file, content, read = PARSERS[name]
  (tmp_path / file).write_bytes(content)
  assert jax.tree.leaves(read(tmp_path))


@pytest.mark.parametrize('name', PARSERS)
def test_damage_ends_in_one_line(name):
  with within(100):
    hypothesis.given(damaged(PARSERS[name][1]))(
      lambda content: check(name, content)
    )()


@pytest.mark.slow
@pytest.mark.parametrize('name', PARSERS)
def test_much_damage_ends_in_one_line(name):
  many = hypothesis.settings(
    max_examples=1_500,
    derandomize=False,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  with within(200):
    hypothesis.given(damaged(PARSERS[name][1]))(
      many(lambda content: check(name, content))
    )()


def bomb(start, mebibytes, wbits=31):
  """A start and many zeros, packed; by default as gzip does."""
  pack = zlib.compressobj(1, wbits=wbits)
  pieces = [pack.compress(start)]
  pieces += [pack.compress(bytes(2**20)) for _ in range(mebibytes)]
  return b''.join([*pieces, pack.flush()])


def mat_bomb(monkeypatch):
  monkeypatch.setattr(arrays, 'MOST_MAT', 2**24)
  packed = bomb(b'', 300, wbits=15)
  return (
    b' ' * 124 + b'\x00\x01IM' + struct.pack('<II', 15, len(packed)) + packed
  )


BOMBS = {
  'more than the header says': (
    'i.gz',
    lambda _: bomb(IMAGES, 300),
    digits.read_idx,
    (3,),
  ),
  'a header of terabytes': (
    'i.gz',
    lambda _: bomb(struct.pack('>4I', 0x803, 2**20, 2**20, 4), 300),
    digits.read_idx,
    (3,),
  ),
  'a line without an end': (
    't.gz',
    lambda _: bomb(b'1,', 300),
    harness.read_table,
    (),
  ),
  'a LIBSVM index of billions': (
    't',
    b'1 4000000000:1\n',
    tables.read_libsvm,
    (),
  ),
  'a MATLAB file': ('m.mat', mat_bomb, harness.read_mat, ('X',)),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', BOMBS)
def test_what_unpacks_to_much_takes_little_memory(name, tmp_path, monkeypatch):
  file, content, read, args = BOMBS[name]
  path = tmp_path / file
  path.write_bytes(content(monkeypatch) if callable(content) else content)
  tracemalloc.start()
  try:
    with pytest.raises(harness.DamagedDataError, match=str(path)):
      read(path, *args)
    assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
  finally:
    tracemalloc.stop()
