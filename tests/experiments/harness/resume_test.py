"""A run killed at any moment and started again ends as if left alone."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.harness.app import termination
from tests.experiments.harness import processes

SCRIPT = """
import pathlib, sys, time
import jax, jax.numpy as jnp, numpy as np, optax
import bilevel_jax as bj
from experiments import harness

workdir, pause = globals().get('ARGUMENTS') or sys.argv[1:]
pause = float(pause)
problem = bj.BilevelProblem(
  upper=lambda x, y, batch: jnp.sum((y - batch) ** 2),
  lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
)
trained = harness.train(
  bj.v_pbgd(
    problem, penalty=optax.linear_schedule(0.0, 10.0, 60),
    upper=optax.adam(0.1), lower=optax.adam(0.1)),
  harness.Task(
    lambda context: bj.BilevelParams(
      upper=jax.random.uniform(context.key, (2,)), lower=jnp.zeros(2)),
    lambda context: jax.random.uniform(context.key, (2,))),
  harness.Training(60, chunk=5, seeds=2, workdir=workdir, save_seconds=0),
  harness.Measure(
    lambda context, params, state: {
      'score': -jnp.sum(params.upper**2) + jax.random.uniform(context.key)},
    # Not to stop, but to leave time for the kill.
    stop_when=lambda history: time.sleep(pause), select='score'),
)
np.savez(
  workdir + '/result.npz', steps=trained.steps, upper=trained.params.upper,
  best=trained.best.params.upper, best_score=trained.best.score,
  **trained.history)
options = harness.Options(
  'tests', 'resume', 'quick', {}, workdir, None, (0, 1))
harness.write_results(
  options, metrics={'score': trained.history['score'][-1].mean()},
  seconds=trained.seconds)
"""


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  processes.run_here(SCRIPT, whole, 0)
  records = killed / 'run' / 'metrics.jsonl'
  start = lambda: processes.start(SCRIPT, killed, 0.3)[0]
  processes.kill_after(start(), records, 3)
  with records.open('a') as file:
    file.write('{"step": 99, "sco')  # A kill may leave half a line.
  # Then ended by a signal that leaves time to save.
  said = processes.kill_after(
    start(),
    records,
    5,
    by=signal.SIGTERM,
    status=termination.EXIT_STATUS,
  )
  steps = json.loads(records.read_text().splitlines()[-1])['step']
  assert f'terminated after step {steps}; the same command resumes' in said
  assert (killed / 'run' / 'checkpoints' / str(steps)).is_dir()
  processes.run_here(SCRIPT, killed, 0)

  assert records.read_bytes() == (whole / 'run' / 'metrics.jsonl').read_bytes()
  one, other = np.load(whole / 'result.npz'), np.load(killed / 'result.npz')
  assert set(one) == set(other)
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], strict=True)
  read = lambda folder: json.loads((folder / 'results.json').read_text())
  assert read(whole)['metrics'] == read(killed)['metrics']


def test_data_split_over_devices(tmp_path):
  """Equal to one device, and resumed exactly."""
  mesh = jax.make_mesh(
    (4,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:4],
  )
  rows = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
  split = jax.device_put(
    rows, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  )
  loss = lambda params, batch: jnp.mean((batch @ params - 1) ** 2)
  solver = optax.chain(bj.gradient(loss), optax.adam(0.1))

  def train(data, workdir, stop_when=None):
    return harness.train(
      solver,
      harness.Task(
        lambda context: jnp.zeros(5), lambda context: context.data, data=data
      ),
      harness.Training(20, chunk=5, seeds=2, workdir=workdir),
      harness.Measure(stop_when=stop_when),
    ).params

  train(split, tmp_path, lambda history: True)
  resumed = train(split, tmp_path)
  np.testing.assert_array_equal(resumed, train(split, None))
  np.testing.assert_allclose(resumed, train(rows, None), 1e-4)
