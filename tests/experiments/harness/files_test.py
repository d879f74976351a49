"""Tests of writing: locks, and disks that are full or not writable."""

import contextlib
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest

from experiments import harness
from experiments.harness.store import files

ROOT = pathlib.Path(__file__).parents[3]
HOLD = """
import sys
from experiments.harness.store import files
with files.locked(sys.argv[1]):
  print('held', flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def small_files():
  """A limit on the size of files, which fails as a full disk does."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_another_process_in_the_folder_is_named_until_it_ends(train, tmp_path):
  folder = files.make_folder(tmp_path / 'run')
  holder = subprocess.Popen(
    [sys.executable, '-c', HOLD, str(folder)],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert holder.stdout.readline() == 'held\n'
  with pytest.raises(harness.BusyError) as error:
    train(steps=10)
  assert f'(pid {holder.pid}) is using {folder}' in str(error.value)
  assert not (folder / 'metrics.jsonl').exists()
  holder.kill()
  holder.communicate()
  assert train(steps=10).step == 10


def test_a_lock_is_free_after_its_run(tmp_path):
  for _ in range(2):
    with files.locked(tmp_path):
      assert (tmp_path / '.lock').read_text() == f'pid {os.getpid()}'


def test_records_on_a_full_disk(tmp_path, small_files):
  writer = harness.MetricsWriter(tmp_path)
  with pytest.raises(harness.WriteError, match=r'cannot write to .*--workdir'):
    for step in range(100):
      writer.write(step, {'loss': np.float32([step, step])})
  with contextlib.suppress(harness.WriteError):
    writer.close()  # What could not be written is still in its buffer.


def test_the_board_on_a_full_disk(tmp_path, small_files):
  """An event takes more bytes than a line, so the board is full first."""
  writer = harness.MetricsWriter(tmp_path)
  with pytest.raises(harness.WriteError):
    for step in range(100):
      writer.write(step, {name: np.float32([0]) for name in 'abcdefgh'})
  with contextlib.suppress(harness.WriteError):
    writer.close()
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert sum(map(len, lines)) < 2_000


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_folder_that_is_read_only(train, tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(harness.WriteError, match='Permission denied'):
    train()
  tmp_path.chmod(0o700)


def test_results_where_a_folder_is_in_the_way(tmp_path):
  (tmp_path / 'table.md').mkdir()
  with pytest.raises(harness.WriteError, match=r'table\.md: it is a folder'):
    harness.write_table(tmp_path, [{'a': 1}])
