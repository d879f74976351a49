"""Broken files of language models: one line with the file and the cause."""

import contextlib
import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest

from experiments import harness
from experiments.lm import tokenizer, weights
from tests.faults.corpus import (
  models,
  models_adapters,
  models_config,
  models_gguf,
  models_rows,
  models_tokenizer,
  models_weights,
)

ROOT = pathlib.Path(__file__).parents[2]
PARTS = (
  models_adapters,
  models_config,
  models_gguf,
  models_rows,
  models_tokenizer,
  models_weights,
)
CASES = {name: case for part in PARTS for name, case in part.CASES.items()}
MEBIBYTE = 2**20


@contextlib.contextmanager
def bounds(mebibytes=512, seconds=120):
  """Fails, instead of filling the machine, beyond these limits.

  The time is generous: it ends a loader that would run for ever.
  """

  def stop(*_):
    raise TimeoutError(f'not done in {seconds} s')

  status = pathlib.Path('/proc/self/status')
  limits = resource.getrlimit(resource.RLIMIT_DATA)
  if status.exists():
    size = status.read_text().partition('VmData:')[2].split()[0]
    most = int(size) * 1024 + 2 * mebibytes * MEBIBYTE
    resource.setrlimit(resource.RLIMIT_DATA, (most, limits[1]))
  handler = signal.signal(signal.SIGALRM, stop)
  signal.alarm(seconds)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_DATA, limits)
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert grown < mebibytes * 1024


def check(name, folder):
  case = CASES[name]
  models.make(case, folder)
  with (
    bounds(),
    pytest.raises(harness.UserError, match=case.cause or '.') as caught,
  ):
    models.LOADERS[case.loader](folder)
  text = str(caught.value)
  assert case.file in text and '\n' not in text and len(text) < 1_000


def test_there_are_many_cases():
  assert len(CASES) == sum(len(part.CASES) for part in PARTS) > 550


@pytest.mark.parametrize('loader', models.LOADERS)
def test_valid_files_are_read(loader, tmp_path):
  models.copy_valid(loader, tmp_path)
  assert models.LOADERS[loader](tmp_path)


@pytest.mark.parametrize('name', [n for n in CASES if not CASES[n].heavy])
def test_a_broken_file_ends_in_one_line(name, tmp_path):
  check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in CASES if CASES[n].heavy])
def test_a_file_without_end_ends_in_one_line(name, tmp_path):
  check(name, tmp_path)


def test_a_snapshot_of_the_cache_of_hugging_face_is_read(tmp_path):
  """Its files are links to blobs beside the snapshots."""
  folder = tmp_path / 'models--a--b' / 'snapshots' / '0123'
  blobs = tmp_path / 'models--a--b' / 'blobs'
  blobs.mkdir(parents=True)
  models.copy_valid('model', folder)
  for path in sorted(folder.iterdir()):
    path.rename(blobs / path.name)
    path.symlink_to(os.path.relpath(blobs / path.name, folder))
  assert models.LOADERS['model'](folder)
  secret = tmp_path / 'secret.json'
  secret.write_text('{}')
  (folder / 'config.json').unlink()
  (folder / 'config.json').symlink_to(secret)
  with pytest.raises(harness.DamagedDataError, match='outside of its folder'):
    weights.load(folder)


def test_texts_are_not_cut_or_padded_by_the_file_of_a_tokeniser(tmp_path):
  models.copy_valid('model', tmp_path)
  loaded = tokenizer.load(tmp_path)
  loaded.inner.enable_truncation(2)
  loaded.inner.enable_padding(length=100)
  loaded.inner.save(str(tmp_path / 'tokenizer.json'))
  assert len(tokenizer.load(tmp_path).encode('abcd')) == 4


def test_a_pattern_that_backtracks_for_ever_is_named(tmp_path):
  models.copy_valid('model', tmp_path)
  path = tmp_path / 'tokenizer.json'
  pattern = {'type': 'Split', 'pattern': {'Regex': '(a+)+$'}}
  pattern |= {'behavior': 'Isolated', 'invert': False}
  models.fields('tokenizer.json', {'pre_tokenizer': pattern})(tmp_path)
  loaded = tokenizer.load(tmp_path)
  with pytest.raises(harness.DamagedDataError, match=f'{path}.*retry-limit'):
    loaded.encode(60 * 'a' + 'b')


@pytest.mark.slow
def test_a_binary_prints_one_line(tmp_path):
  case = CASES['config.json: rope_theta is 0']
  models.make(case, tmp_path / 'model')
  command = [sys.executable, '-m', 'experiments.seal.rank', '--preset=smoke']
  flags = [f'--model={tmp_path}/model', f'--workdir={tmp_path}/run']
  ended = subprocess.run(
    [*command, *flags], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert ended.returncode == 1 and 'Traceback' not in ended.stderr
  assert 'config.json has rope_theta=0' in ended.stderr.splitlines()[-1]
