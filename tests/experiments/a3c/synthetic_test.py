"""The synthetic experiment, small: speedups, results and settings."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.a3c import claims, synthetic, synthetic_runs
from experiments.harness.app import errors
from experiments.harness.app import settings as settings_lib

SETTINGS = synthetic.Settings(
  process=synthetic_runs.Process(
    states=12, actions=3, features=4, discount=0.9
  ),
  workers=(1, 4),
  steps=3_000,
  block=20,
  window=400,
  tuning=synthetic.Tuning(actor_scales=(5.0,), critic_scales=(1.0,), seeds=1),
  seeds=4,
)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('synthetic')
  options = harness.Options(
    paper='a3c',
    binary='synthetic',
    preset='quick',
    settings=SETTINGS,
    workdir=str(workdir),
    data_dir=None,
    seeds=(0, 1, 2, 3),
  )
  report = harness.execute(synthetic.main, options)
  return workdir, report.results.metrics()


@pytest.mark.slow
def test_speedups_and_delays(finished):
  _, metrics = finished
  for sampling in ('iid', 'markov'):
    assert metrics[f'speedup/{sampling}/workers=1'] == 1
    assert metrics[f'speedup/{sampling}/workers=4'] > 2
    assert metrics[f'policy_share/{sampling}/workers=4'] > SETTINGS.share
  assert metrics['largest_delay_error'] == 0
  assert metrics['worst_critic_error'] < 0.7
  assert metrics['policy_return/best'] > metrics['policy_return/uniform']


def test_writes_results(finished):
  workdir, metrics = finished
  results = json.loads((workdir / 'results.json').read_text())
  assert set(results['metrics']) == set(metrics)
  assert [row['c1'] for row in results['choices']] == [5.0]
  assert (workdir / 'curves.png').stat().st_size > 5000
  table = (workdir / 'table.md').read_text()
  assert '| control/large_step | 4 ' in table


def test_claims_use_metrics_of_all_presets():
  workers = synthetic.PRESETS['quick'].workers
  assert {1, 4, *claims._WORKERS} <= set(workers)
  assert synthetic.PRESETS['paper'].workers == workers


@pytest.mark.slow
def test_block_equals_single_updates():
  problem = synthetic_runs.make_problem(SETTINGS.process, 0)
  solver = bj.solvers.a3c_td0(
    problem.mdp, problem.features, workers=3, key=0,
    actor=optax.sgd(1.0), critic=optax.sgd(0.1),
  )  # fmt: skip
  start = bj.sequences(actor=jnp.zeros((12, 3)), critic=jnp.zeros(4))

  @jax.jit
  def one_by_one(params, state):
    rewards = []
    for _ in range(5):
      updates, state = solver.update(None, state, params)
      params = bj.apply_updates(params, updates)
      rewards.append(bj.values(state)['reward'])
    return params, jnp.stack(rewards)

  several = synthetic_runs.blocks(solver, 5)
  expected, rewards = one_by_one(start, solver.init(start))
  updates, state = jax.jit(several.update)(None, several.init(start), start)
  params = bj.apply_updates(start, updates)
  for actual, desired in zip(params, expected, strict=True):
    np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-6)
  values = bj.values(state)
  np.testing.assert_allclose(values['mean_reward'], rewards.mean(), rtol=1e-6)
  assert (values['min_delay'], values['max_delay']) == (0, 2)


def test_reference_rewards():
  """No random policy exceeds the optimal one."""
  problem = synthetic_runs.make_problem(SETTINGS.process, 0)
  logits = 5 * jax.random.normal(jax.random.key(0), (100, 12, 3))

  @jax.jit
  @jax.vmap
  def step(z):
    visits = bj.rl.visits(problem.mdp, jax.nn.softmax(z))
    return jnp.sum(visits * problem.mdp.rewards)

  rewards = np.asarray(step(logits))
  assert rewards.max() < problem.best + 1e-5
  assert rewards.min() < problem.uniform < problem.best
  flat = step(jnp.zeros((1, 12, 3)))[0]
  np.testing.assert_allclose(flat, problem.uniform, rtol=1e-4)


def test_wrong_settings():
  for changed, message in (
    ({'steps': 1_010}, 'a multiple of --block=20'),
    ({'window': 30}, 'a multiple of --block=20'),
    ({'workers': (2, 4)}, 'start with 1'),
    ({'workers': (1,)}, 'at least one other'),
    ({'steps': 40, 'window': 20}, 'at least four --block'),
  ):
    with pytest.raises(ValueError, match=message):
      synthetic.check(dataclasses.replace(SETTINGS, **changed))
  for changed, message in (
    ({'process.discount': 1.0}, 'discount'),
    ({'share': 1.5}, 'share'),
  ):
    with pytest.raises(errors.SettingsError, match=message):
      settings_lib.check(harness.replaced(SETTINGS, changed))
