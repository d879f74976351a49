"""Any damage to a run's own files: the same numbers, or a warning.

Never a traceback, and never other numbers without a word.
"""

import os
import pathlib
import resource
import shutil
import tempfile
import warnings

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import bilevel_jax as bj
from experiments import harness

COUNTS = hypothesis.settings(max_examples=30)
# `data` damages the file, at a place and in a way that are drawn.
KINDS = st.sampled_from(['flip', 'cut', 'insert', 'zero', 'empty', 'remove'])


def train(workdir):
  loss = lambda params, batch: jnp.sum((params - batch) ** 2)
  return harness.train(
    optax.chain(bj.gradient(loss), optax.adam(0.1)),
    harness.Task(
      lambda context: jnp.zeros(3),
      lambda context: jax.random.uniform(context.key, (3,)),
    ),
    harness.Training(
      steps=4,
      chunk=1,
      seeds=2,
      workdir=workdir,
      save_seconds=0,
      settings={'name': 'damage'},
    ),
  )


def damage(data, path):
  content = bytearray(path.read_bytes())
  kind = data.draw(KINDS)
  if kind == 'remove':
    path.unlink()
    return
  at = data.draw(st.integers(0, max(len(content) - 1, 0)))
  if kind == 'flip' and content:
    content[at] ^= 1 << data.draw(st.integers(0, 7))
  elif kind == 'cut':
    del content[at:]
  elif kind == 'insert':
    content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
  elif kind == 'zero':
    content[at : at + 16] = bytes(len(content[at : at + 16]))
  elif kind == 'empty':
    content.clear()
  path.write_bytes(content)


def files_of(folder):
  return sorted(
    path.relative_to(folder)
    for path in folder.rglob('*')
    if path.is_file() and path.name != '.lock'
  )


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A finished run: its folder, and what it returned."""
  folder = tmp_path_factory.mktemp('run')
  return folder, train(folder)


@pytest.fixture(scope='module')
def by_step(run):
  """The params of its two checkpoints."""
  folder, _ = run
  shutil.copytree(folder, copy := folder.with_name('before'))
  shutil.rmtree(copy / 'run' / 'checkpoints' / '4')
  loaded = harness.load(folder), harness.load(copy)
  return {each.step: np.asarray(each.params) for each in loaded}


@COUNTS
@hypothesis.given(data=st.data())
def test_what_is_loaded_is_what_was_saved(run, by_step, data):
  folder, _ = run
  with tempfile.TemporaryDirectory() as place:
    copy = pathlib.Path(shutil.copytree(folder, f'{place}/run'))
    newest = copy / 'run' / 'checkpoints' / '4'
    damage(data, newest / data.draw(st.sampled_from(files_of(newest))))
    with warnings.catch_warnings(record=True) as said:
      warnings.simplefilter('always')
      loaded = harness.load(copy)
  assert loaded.step == 4 or [w for w in said if 'damaged' in str(w.message)]
  np.testing.assert_array_equal(loaded.params, by_step[loaded.step])


@pytest.mark.slow
@hypothesis.settings(max_examples=100)
@hypothesis.given(data=st.data())
def test_a_damaged_run_goes_on(run, data):
  folder, whole = run
  with tempfile.TemporaryDirectory() as place:
    copy = pathlib.Path(shutil.copytree(folder, f'{place}/run'))
    damage(data, copy / data.draw(st.sampled_from(files_of(copy))))
    with warnings.catch_warnings(record=True) as said:
      warnings.simplefilter('always')
      again = train(copy)
    kept = list((copy / 'run').glob('damaged/*'))
  assert again.step == 4
  np.testing.assert_array_equal(again.params, whole.params)
  for name, values in again.history.items():
    rows = np.isin(whole.steps, again.steps)
    np.testing.assert_array_equal(values, whole.history[name][rows])
  if len(again.steps) < len(whole.steps):
    assert [w for w in said if 'gap' in str(w.message)]
  if [w for w in said if 'moved' in str(w.message)]:
    assert kept


SPECIAL = {
  'a folder': pathlib.Path.mkdir,
  'a named pipe': os.mkfifo,
  'a device': lambda path: path.symlink_to('/dev/zero'),
}


@pytest.mark.parametrize('kind', SPECIAL)
def test_special_files_are_put_aside(run, tmp_path, kind):
  folder, whole = run
  copy = shutil.copytree(folder, tmp_path / 'copy')
  for name in ('metrics.jsonl', 'settings.json', 'program.json'):
    path = copy / 'run' / name
    path.unlink()
    SPECIAL[kind](path)
  with pytest.warns(RuntimeWarning, match=kind) as said:
    again = train(copy)
  assert len([w for w in said if 'moved' in str(w.message)]) == 3
  np.testing.assert_array_equal(again.params, whole.params)
  assert len(list((copy / 'run' / 'damaged').iterdir())) == 3
  assert (copy / 'run' / 'metrics.jsonl').is_file()


@pytest.mark.slow
def test_a_line_of_a_gibibyte_takes_no_memory(run, tmp_path):
  folder, _ = run
  path = shutil.copy(folder / 'run' / 'metrics.jsonl', tmp_path)
  with open(path, 'ab') as file:
    file.truncate(2**30)  # Takes no space on the disk.
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  records = harness.read_records(path, until=4)
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert [record['step'] for record in records] == [1, 2, 3, 4]
  assert grown < 2**19  # KiB
