"""Every broken file ends in one line that names the place and a remedy."""

import gzip
import pathlib
import time

import numpy as np
import pytest
import scipy.io

from experiments import harness
from experiments.harness.data import arrays, reading
from experiments.speech import audio, folder
from experiments.tracking import mot_files
from tests.faults.corpus import data, data_arrays, data_case, data_tracking

# Cases whose content has hundreds of megabytes.
LARGE = (
  'csv packed: zeros',
  'csv packed: e',
  'csv packed: many',
  'csv: 100,000',
  'csv: line of 17 MB',
  'idx packed: announced zeros',
  'idx packed: terabytes',
  'idx packed: more',
  'arpa packed',
  'sarcos: zeros',
  'school: deep',
  'tracker: zeros',
  'truth packed: e',
  'seqinfo: 40 MB',
  'flac: silence',
  'an4 archive: zeros',
  'an4 archive: long name',
  'an4 archive: attributes',
  'an4 archive: many',
)


def _marked(name):
  marks = [pytest.mark.slow] if name.startswith(LARGE) else []
  return pytest.param(name, marks=marks)


@pytest.mark.parametrize('name', [*map(_marked, data.CASES)])
def test_a_broken_file_ends_in_one_line(name, tmp_path):
  case = data.CASES[name]
  if case.package:
    pytest.importorskip(case.package)
  data.check(case, tmp_path)


def test_the_corpus_is_large():
  assert len(data.CASES) >= 220
  groups = {name.partition(':')[0] for name in data.CASES}
  assert len(groups) > 20


def test_a_limit_of_memory_is_not_a_pass(tmp_path):
  """The check fails for a loader that allocates what a file announces."""

  def read(path):
    try:
      return np.ones(2**27)
    except MemoryError as error:
      raise reading.damaged(path / 'a', 'too large') from error

  case = data_case.Case('a', 'a', lambda path: None, read)
  with pytest.raises(AssertionError, match='lack of memory'):
    data.check(case, tmp_path)
  with (
    pytest.raises(BaseException, match='more than 0'),
    data.limited(seconds=0.1),
  ):
    time.sleep(60)


def test_unusual_valid_files_are_read(tmp_path):
  table = tmp_path / 'a.csv'
  table.write_bytes(b'\xef\xbb\xbfa;b\r\n"1";2\r\n\r\n3;4\r\n')
  np.testing.assert_array_equal(harness.read_table(table).inputs, [[1], [3]])
  # A compressed file may be a link that the user made.
  packed = tmp_path / 'own' / 'b.csv.gz'
  packed.parent.mkdir()
  packed.write_bytes(gzip.compress(b'1,0\n' * 10_000))
  link = tmp_path / 'b.csv.gz'
  link.symlink_to(packed)
  assert harness.read_table(link).inputs.shape == (10_000, 1)
  # Arrays in Fortran order, without an axis, and without numbers.
  path = tmp_path / 'a.npz'
  wanted = {
    'weights/a': np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    'b': np.array('text'),
    'c': np.zeros((0, 3), np.int32),
  }
  np.savez(path, **wanted)
  for name, array in harness.read_npz(path, 'archive').items():
    np.testing.assert_array_equal(array, wanted[name], strict=True)


@pytest.mark.parametrize('packed', [False, True])
def test_matlab_files_are_read_as_by_scipy(tmp_path, packed):
  path, inner = tmp_path / 'a.mat', data_arrays.row(np.ones((2, 3)), 'wörd')
  variables = {
    'cells': data_arrays.row(inner, np.zeros((0, 3)), np.array(['ab', 'cd'])),
    'table': np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    'cube': np.arange(24, dtype=np.int16).reshape(2, 3, 4),
    'single': np.float32([[0.5]]),
    'truths': np.array([[True, False]]),
    'text': 'wörd',
  }
  path.write_bytes(data_arrays.mat(packed, other={'a': 1}, **variables))
  wanted = scipy.io.loadmat(path)

  def check(one, other):
    assert one.shape == other.shape
    if other.dtype.hasobject:
      assert one.dtype.hasobject
      for x, y in zip(one.ravel(), other.ravel(), strict=True):
        check(x, y)
    else:
      np.testing.assert_array_equal(one, other)

  for name, array in zip(
    variables, arrays.read_mat(path, *variables), strict=True
  ):
    check(array, wanted[name])
  with pytest.raises(harness.DamagedDataError, match='neither real numbers'):
    arrays.read_mat(path, 'other')


def test_a_name_of_a_sequence_is_no_reference(tmp_path):
  text = data_tracking.SEQUENCE.replace('name=A', 'name=%(seqLength)s 50%')
  (tmp_path / 'seqinfo.ini').write_text(text)
  assert mot_files.read_info(tmp_path).name == '%(seqLength)s 50%'


def test_links_within_a_folder_of_speech_are_followed(tmp_path):
  pytest.importorskip('soundfile')
  case = data.CASES['own audio: link out of the folder']
  case.make(tmp_path)
  own = tmp_path / 'me/0.wav'
  own.unlink()
  own.symlink_to('1.wav')
  corpus = folder.read(tmp_path, validation=0.25, test=0.25)
  names = [u.name for part in corpus[:3] for u in part]
  assert sorted(names) == [f'me/{i}.wav' for i in range(4)]
  # The whole folder may be a link.
  link = tmp_path.with_name(f'{tmp_path.name}_link')
  link.symlink_to(tmp_path)
  assert folder.read(link).source.digest


def test_audio_with_a_name_that_is_not_utf8_is_read(tmp_path):
  soundfile = pytest.importorskip('soundfile')
  plain, path = tmp_path / 'a.wav', tmp_path / 'a\udcff.wav'
  soundfile.write(plain, np.zeros(800), 8_000)
  try:
    plain.rename(path)
  except OSError:
    pytest.skip('the file system has names in UTF-8 only')
  part = audio.probe(path)
  assert (part.samples, part.rate) == (800, 8_000)


def test_messages_are_short_and_printable():
  error = reading.damaged('a\x1b[2J\nb' * 999, 'x\n' * 999, 'get it again')
  assert str(error).isprintable() and len(str(error)) < 1_000
  assert pathlib.Path(str(error)).name
