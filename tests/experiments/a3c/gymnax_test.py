"""The binary: learns a little, resumes to the same result, bad settings."""

import json

import jax
import numpy as np
import pytest

from experiments import harness
from experiments.a3c import gymnax

SETTINGS = gymnax.Settings(
  workers=2, environments=4, frames=1_600, records=5, episodes=10
)


def test_a_run_and_its_resumption(options, results, tmp_path, monkeypatch):
  """Ended after half of the records, it goes on to the same numbers."""
  whole = options(SETTINGS, paper='a3c', binary='gymnax')
  gymnax.main(whole)
  found = results()
  metrics = found['metrics']
  assert metrics['frames'] == 1_600 and metrics['worst_return'] > 5
  assert metrics['delay/1'] == (2 * 10 - 1) / 20
  assert metrics['mean_return/half_width'] >= 0
  assert 15 < metrics['control/random_return'] < 30
  for name in ('policy.npz', 'policy.gif', 'return.png', 'table.md'):
    assert (tmp_path / name).exists()
  train = harness.train

  def half(*args, **keywords):
    stop = lambda history: len(history['return']) >= 2
    return train(*args, **keywords, stop_when=stop)

  other = whole._replace(workdir=str(tmp_path / 'other'))
  with monkeypatch.context() as patch:
    patch.setattr(harness, 'train', half)
    assert gymnax.train(other, gymnax.Clock()).step == 4
  gymnax.main(other)
  again = json.loads((tmp_path / 'other' / 'results.json').read_text())
  same = lambda m: {k: v for k, v in m.items() if 'second' not in k}
  assert same(again['metrics']) == same(metrics)


def test_environments_that_cannot_be():
  with pytest.raises(harness.SettingsError, match='did you mean CartPole-v1'):
    gymnax.check(gymnax.Settings(env='CartPole'))


def test_rounds_are_of_all_workers():
  assert gymnax.rounds_of(gymnax.Settings(frames=2_560 * 7 + 3)) == 7
  assert gymnax.rounds_of(gymnax.Settings(frames=1)) == 1


@pytest.mark.slow
def test_cart_pole_is_solved(options, results):
  gymnax.main(options(gymnax.Settings(), seeds=(0, 1, 2)))
  metrics = results()['metrics']
  assert metrics['mean_return'] >= 475 and metrics['worst_return'] >= 450


def test_continuous_actions_are_learnt_too():
  """Pendulum compiles and gives finite gradients."""
  settings = gymnax.Settings(env='Pendulum-v1', workers=2, environments=2)
  agent, solver = gymnax.make_solver(settings, jax.random.key(0))
  params = agent.init(jax.random.key(1))
  updates, _ = jax.jit(solver.update)(None, solver.init(params), params)
  leaves = jax.tree.leaves(updates)
  assert all(np.isfinite(x).all() for x in leaves)
  assert any(np.any(x != 0) for x in leaves)
