"""Asynchronous threads: they learn, go on after a kill, and say who died."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import harness
from experiments.a3c import atari, threads
from experiments.harness import saved
from experiments.rl import games

ROOT = pathlib.Path(__file__).parents[3]
SETTINGS = atari.Settings(
  env='CartPole', workers=3, frames=1_200, compared=3, record=10
)


class Fatal(games.CartPole):
  """Fails in the fourth episode of a worker."""

  episodes = 0

  def reset(self):
    self.episodes += 1
    if self.episodes > 4:
      raise RuntimeError('the machine is on fire\nand more')
    return super().reset()


def test_runs_and_goes_on(options, results):
  """Every gradient is applied once; more frames go on from what there is."""
  given = options(SETTINGS, seeds=(0,), save_seconds=1e6)
  atari.main(given)
  first = results()['metrics']
  assert first['frames'] == 1_200 and first['updates'] == 60
  shares = [
    v for k, v in first.items() if k[:6] == 'delay/' and k[6:].isdigit()
  ]
  np.testing.assert_allclose(sum(shares), 1)
  assert 0 < first['delay/mean'] < 30 and first['speedup'] > 0
  assert first['mean_return'] > 5
  longer = given._replace(settings=dataclasses.replace(SETTINGS, frames=1_800))
  run = atari.train(longer, 0, games.make)
  assert run.version == 90 and run.frames == 1_800
  assert run.throughputs['one'] == first['throughput/one']
  assert sum(run.progress.delays.values()) == 90
  records = harness.read_records(
    pathlib.Path(given.workdir) / 'seed_0' / 'metrics.jsonl'
  )
  assert [r['step'] for r in records] == list(range(10, 91, 10))


def test_a_worker_that_dies_is_named_and_the_run_is_kept(options, tmp_path):
  settings = dataclasses.replace(SETTINGS, compared=0)
  given = options(settings, seeds=(0,))
  make_game = lambda name, rng: Fatal(rng)
  with pytest.raises(threads.WorkerError) as caught:
    atari.train(given, 0, make_game)
  said = str(caught.value)
  assert 'died: RuntimeError: the machine is on fire. The run stop' in said
  step = max(saved.saved_steps(tmp_path / 'seed_0' / 'checkpoints'))
  assert f'at update {step}, and what it had learnt' in said and step > 0
  # It goes on from there with games that do not fail.
  run = atari.train(given, 0, games.make)
  assert run.version == 60


def test_a_gradient_is_that_of_the_copy():
  """Against the oracle at the published parameters, not at newer ones."""
  run = atari.Run(
    harness.Options('a3c', 'atari', 'smoke', SETTINGS, '', None, (0,)),
    0,
    games.make,
  )
  with run.start(2) as pool:
    found = pool.next()
    moved = jax.tree.map(lambda x: x + 1, run.params)
    pool.published = threads.Published(moved, 1)
    found.applied.set()
    for _ in range(6):
      later = pool.next()
      later.applied.set()
  assert found.version == 0 and later.version == 1
  assert found.steps == SETTINGS.rollout
  # One is larger: weights that are moved by 1 are other functions.
  norm = lambda tree: sum(float(np.sum(x**2)) for x in jax.tree.leaves(tree))
  assert norm(later.gradient) != norm(found.gradient)


def test_progress_keeps_the_last_episodes():
  found = threads.Contribution(0, 3, None, {}, 20, [1.0, 2.0], None)
  progress = threads.Progress(scores=(9.0,)).after(found, 5, 0.5, keep=2)
  progress = progress.after(found, 5, 0.5, keep=2)
  assert progress == threads.Progress(40, 1.0, {'2': 2}, (1.0, 2.0), 4)


def test_histogram():
  counts, words = atari.histogram({'0': 1, '2': 3})
  assert counts.tolist() == [1, 0, 3]
  assert '75.0%' in words and words.count('\n') == 2


def _command(workdir, *more):
  return [
    sys.executable,
    '-m',
    'experiments.a3c.atari',
    '--preset=smoke',
    '--compared=0',
    '--save_seconds=0',
    f'--workdir={workdir}',
    *more,
  ]


@pytest.mark.slow
def test_killed_and_terminated_it_goes_on(tmp_path):
  """SIGKILL, then SIGTERM with status 75, then to the end."""
  checkpoints = tmp_path / 'seed_0' / 'checkpoints'
  steps = []
  for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
    process = subprocess.Popen(
      _command(tmp_path), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    before = max(saved.saved_steps(checkpoints), default=0)
    deadline = time.monotonic() + 600
    while max(saved.saved_steps(checkpoints), default=0) <= before + 2:
      assert time.monotonic() < deadline and process.poll() is None
      time.sleep(0.1)
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == status
    steps.append(max(saved.saved_steps(checkpoints)))
  subprocess.run(_command(tmp_path), cwd=ROOT, check=True, timeout=900)
  metrics = json.loads((tmp_path / 'results.json').read_text())['metrics']
  assert 0 < steps[0] < steps[1] < metrics['updates']
  assert metrics['frames'] == 8_000


def test_a_game_that_is_not_there():
  pytest.importorskip('ale_py')
  with pytest.raises(harness.SettingsError, match='no environment'):
    atari.check(atari.Settings(env='Sekwest'))
