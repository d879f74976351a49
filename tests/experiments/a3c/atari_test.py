"""Asynchronous threads: training, resumption and failing workers."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.a3c import atari, threads
from experiments.harness.store import files, loading
from experiments.rl import games, networks

ROOT = pathlib.Path(__file__).parents[3]
SETTINGS = atari.Settings(
  env='CartPole', workers=3, frames=1_200, throughput_gradients=3, record=10
)


class Fatal(games.CartPole):
  """Fails in the fourth episode of a worker."""

  episodes = 0

  def reset(self):
    self.episodes += 1
    if self.episodes > 4:
      raise RuntimeError('the machine is on fire\nand more')
    return super().reset()


@pytest.mark.slow
def test_runs_and_continues(options, results):
  """Each gradient is applied once; with more frames, the run continues."""
  given = options(SETTINGS, seeds=(0,), save_seconds=1e6)
  harness.execute(atari.main, given)
  first = results()['metrics']
  assert first['frames'] == 1_200 and first['updates'] == 60
  shares = [v for k, v in first.items() if k.startswith('delay_share/')]
  np.testing.assert_allclose(sum(shares), 1)
  assert 0 < first['mean_delay'] < 30 and first['speedup'] > 0
  assert first['training_return'] > 5
  longer = given._replace(settings=dataclasses.replace(SETTINGS, frames=1_800))
  run = atari.train(longer, 0, games.make)
  assert run.version == 90 and run.frames == 1_800
  assert run.throughputs['one'] == first['throughput/one']
  assert sum(run.progress.delays.values()) == 90
  records = harness.read_records(
    pathlib.Path(given.workdir) / 'seed_0' / 'metrics.jsonl'
  )
  assert [r['step'] for r in records] == list(range(10, 91, 10))


@pytest.mark.slow
def test_evaluation_plays_the_newest_checkpoint(options, tmp_path):
  """Agrees with a plain loop, after half a run and after all of it.

  Evaluation does not change the run; sampled actions have another mean.
  """
  settings = harness.replaced(
    SETTINGS,
    {'frames': 600, 'throughput_gradients': 0, 'evaluation.episodes': 4},
  )
  given = options(settings, seeds=(0, 1))
  with pytest.raises(
    harness.MissingDataError, match=r"no checkpoint .* 'seed_0"
  ):
    harness.execute(atari.evaluate, given)
  assert not (tmp_path / 'seed_0').exists()
  runs = [atari.train(given, seed, games.make) for seed in given.seeds]
  agent, means = networks.agent((4,), 2), []
  act = jax.jit(lambda actor, x: jnp.argmax(agent.policy(actor, x)))
  for frames in (600, 1_200):
    longer = dataclasses.replace(settings, frames=frames)
    if frames > 600:
      given = given._replace(settings=longer)
      runs = [atari.train(given, seed, games.make) for seed in given.seeds]
    before = stored(tmp_path)
    harness.execute(atari.evaluate, given)
    assert stored(tmp_path) == before
    report = evaluated(tmp_path)
    metrics, per_seed = report['metrics'], report['per_seed']
    assert metrics['updates'] == frames // 20
    for seed, run in enumerate(runs):
      rng = np.random.default_rng((seed, zlib.crc32(b'evaluation')))
      game, scores = games.CartPole(rng), []
      for _ in range(4):
        observation, over, score = game.reset(), False, 0
        while not over:
          after = game.step(int(act(run.params.actor, observation)))
          observation, score = after.observation, score + 1
          over = after.terminated or after.truncated
        scores.append(score)
      mean = per_seed['evaluation_return'][seed]
      assert mean == pytest.approx(np.mean(scores))
      means.append(mean)
    assert metrics['evaluation_return'] == pytest.approx(np.mean(means[-2:]))
  sampled = harness.replaced(settings, {'evaluation.policy': 'sampled'})
  for _ in range(2):
    harness.execute(atari.evaluate, given._replace(settings=sampled))
    drawn = evaluated(tmp_path, 'sampled')['metrics']['evaluation_return']
    means.append(drawn)
  assert means[-1] == means[-2] != metrics['evaluation_return']
  with pytest.raises(
    harness.MissingDataError, match='there are seed_0, seed_1'
  ):
    harness.execute(atari.evaluate, given._replace(seeds=(0, 1, 2)))


def test_policies_of_another_game(options, tmp_path):
  settings = dataclasses.replace(SETTINGS, frames=60, throughput_gradients=0)
  given = options(settings, seeds=(0,))
  atari.train(given, 0, games.make)
  path = tmp_path / 'seed_0' / 'settings.json'
  settings = files.unseal(path.read_bytes())
  path.write_text(files.seal({**settings, 'env': 'Seaquest'}))
  with pytest.raises(harness.OtherRunError, match='set --env=Seaquest'):
    harness.execute(atari.evaluate, given)


def stored(workdir):
  """Modification times of the seeds' files."""
  return {
    path: path.stat().st_mtime_ns
    for path in workdir.glob('seed_*/**/*')
    if path.is_file()
  }


def evaluated(workdir, policy='greedy'):
  path = workdir / 'evaluation' / policy / 'results.json'
  return json.loads(path.read_text())


class TwoLives(games.CartPole):
  """A game of two lives: its score continues after the first fall."""

  def __init__(self, rng):
    super().__init__(rng)
    self.lengths = []

  def step(self, action):
    step = super().step(action)
    if step.game_over:
      self.lengths.append(self._time)
    return step._replace(
      game_over=step.game_over and len(self.lengths) % 2 == 0
    )


def test_training_returns_are_of_all_lives(options):
  """Episodes end with a life; scores cover whole games."""
  settings = dataclasses.replace(SETTINGS, throughput_gradients=0, rollout=300)
  game = TwoLives(np.random.default_rng(0))
  make_game = lambda name, rng, conventions: game
  run = atari.Run(options(settings, seeds=(0,)), 0, make_game)
  with run.start(1) as pool:
    scores, lengths = pool.next().scores, list(game.lengths)
  assert len(scores) == len(lengths) // 2 > 2
  np.testing.assert_array_equal(scores, np.add(lengths[:-1:2], lengths[1::2]))


def test_failing_worker_is_named_and_the_run_saved(options, tmp_path):
  settings = dataclasses.replace(SETTINGS, throughput_gradients=0)
  given = options(settings, seeds=(0,))
  make_game = lambda name, rng, conventions: Fatal(rng)
  with pytest.raises(threads.WorkerError) as caught:
    atari.train(given, 0, make_game)
  message = str(caught.value)
  assert 'failed: RuntimeError: the machine is on fire. The run' in message
  step = max(loading.saved_steps(tmp_path / 'seed_0' / 'checkpoints'))
  assert f'at update {step} and is saved' in message and step > 0
  # It resumes with games that do not fail.
  run = atari.train(given, 0, games.make)
  assert run.version == 60


def test_gradient_uses_the_copied_parameters():
  """Gradients are at the published parameters, not at newer ones."""
  run = atari.Run(
    harness.Options('a3c', 'atari', 'smoke', SETTINGS, '', None, (0,)),
    0,
    games.make,
  )
  with run.start(2) as pool:
    first = pool.next()
    moved = jax.tree.map(lambda x: x + 1, run.params)
    pool.published = threads.Published(moved, 1)
    first.applied.set()
    for _ in range(6):
      later = pool.next()
      later.applied.set()
  assert first.version == 0 and later.version == 1
  assert first.steps == SETTINGS.rollout
  norm = lambda tree: sum(float(np.sum(x**2)) for x in jax.tree.leaves(tree))
  assert norm(later.gradient) != norm(first.gradient)


def test_progress_keeps_the_last_episodes():
  sent = threads.Contribution(0, 3, None, {}, 20, [1.0, 2.0], None)
  progress = threads.Progress(scores=(9.0,)).after(sent, 5, 0.5, keep=2)
  progress = progress.after(sent, 5, 0.5, keep=2)
  assert progress == threads.Progress(40, 1.0, {'2': 2}, (1.0, 2.0), 4)


def test_delays_of_all_runs_are_counted():
  counts = atari.count_delays([{'0': 1, '2': 1}, {'2': 2}])
  assert counts.tolist() == [1, 0, 3]


def _command(workdir, *more):
  return [
    sys.executable,
    '-m',
    'experiments.a3c.atari',
    '--preset=smoke',
    '--throughput_gradients=0',
    '--save_seconds=0',
    f'--workdir={workdir}',
    *more,
  ]


@pytest.mark.slow
def test_resumes_after_sigkill_and_sigterm(tmp_path):
  """SIGKILL, then SIGTERM with status 75, then to the end."""
  checkpoints = tmp_path / 'seed_0' / 'checkpoints'
  steps = []
  for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
    process = subprocess.Popen(
      _command(tmp_path), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    before = max(loading.saved_steps(checkpoints), default=0)
    deadline = time.monotonic() + 600
    while max(loading.saved_steps(checkpoints), default=0) <= before + 2:
      assert time.monotonic() < deadline and process.poll() is None
      time.sleep(0.1)
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == status
    steps.append(max(loading.saved_steps(checkpoints)))
  subprocess.run(_command(tmp_path), cwd=ROOT, check=True, timeout=900)
  metrics = json.loads((tmp_path / 'results.json').read_text())['metrics']
  assert 0 < steps[0] < steps[1] < metrics['updates']
  assert metrics['frames'] == 8_000


def test_unknown_game():
  pytest.importorskip('ale_py')
  with pytest.raises(harness.SettingsError, match='no environment'):
    atari.check(atari.Settings(env='Sekwest'))


def test_conventions_reach_the_game(options):
  """CartPole refuses conventions; a resumed run refuses other ones."""
  assert atari.Settings().conventions == games.DEFAULT
  conventions = games.Conventions(0.25, True, True)
  changed = dataclasses.replace(
    SETTINGS, frames=60, throughput_gradients=0, conventions=conventions
  )
  with pytest.raises(harness.SettingsError, match='require an Atari game'):
    atari.check(changed)
  used = []

  def make_game(name, rng, conventions):
    used.append(conventions)
    return games.CartPole(rng)

  atari.train(options(changed, seeds=(0,)), 0, make_game)
  assert set(used) == {conventions}
  plain = dataclasses.replace(SETTINGS, frames=60, throughput_gradients=0)
  with pytest.raises(
    harness.OtherRunError, match=r'sticky_actions: 0\.25 -> 0'
  ):
    atari.train(options(plain, seeds=(0,)), 0, games.make)
