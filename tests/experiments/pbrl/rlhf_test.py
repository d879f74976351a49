"""The binary: methods, resumption, files of labels, invalid settings."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.harness.app import settings as settings_lib
from experiments.harness.store import loading
from experiments.pbrl import learner as learner_lib
from experiments.pbrl import (
  rlhf,
  rlhf_compiled,
  rlhf_games,
  rlhf_settings,
)

SMALL = harness.replaced(
  rlhf_settings.PRESETS['smoke'],
  {
    'frames': 1_200,
    'rollouts.environments': 4,
    'rollouts.steps': 30,
    'preferences.start_pairs': 8,
    'preferences.buffer': 16,
    'records': 5,
  },
)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['drlhf', 'pbrl'])
def test_resumes_to_the_same_result(
  name, options, results, tmp_path, monkeypatch
):
  """A killed run resumes to the same results, bit for bit."""
  monkeypatch.setattr(rlhf, 'render', lambda options: None)
  settings = dataclasses.replace(SMALL, methods=(name,))
  run_options = options(settings, paper='pbrl', binary='rlhf', save_seconds=0.0)
  run_options = run_options._replace(seeds=(7, 8))
  harness.execute(rlhf.main, run_options)
  metrics = results()['metrics']
  for file in (f'policy_{name}.npz', 'returns.png', 'table.md'):
    assert (tmp_path / file).exists()
  # Labels of the start and of ten epochs; steps of all policies, and those of
  # the first one.
  assert metrics[f'labels/{name}'] == 8 + 10 * 8
  assert metrics[f'policy_steps/{name}'] == 10 * 4 * 30 + 2 * 30
  assert 5 < metrics[f'true_return/{name}'] < 60
  # The state after a kill before the last checkpoint.
  checkpoints = tmp_path / name / 'checkpoints'
  steps = sorted(loading.saved_steps(checkpoints))
  assert steps == [8, 10]
  shutil.rmtree(checkpoints / '10')
  (tmp_path / 'results.json').unlink()
  harness.execute(rlhf.main, run_options)
  assert results()['metrics'] == metrics
  assert sorted(loading.saved_steps(checkpoints)) == [8, 10]


def _rollout(rng, steps=12, count=4):
  at = rng.normal(size=(steps, count, 3)).astype(np.float32)
  return jax.tree.map(
    jnp.asarray,
    bj.rl.Rollout(
      at,
      rng.integers(0, 2, (steps, count)),
      rng.normal(size=(steps, count)).astype(np.float32),
      rng.random((steps, count)) < 0.1,
      np.zeros((steps, count), bool),
      rng.normal(size=(steps, count, 3)).astype(np.float32),
    ),
  )


class Linear:
  """An agent whose logits are linear in the observation."""

  @staticmethod
  def policy(actor, observation):
    return observation @ actor

  @staticmethod
  def value(critic, observation):
    return observation @ critic


# A hundred updates of the policy.
TINY = rlhf_settings.Settings(
  methods=('pbrl',),
  frames=4 * 12 * 100,
  rollouts=rlhf_settings.Rollouts(4, 12, 1),
  preferences=rlhf_settings.Preferences(5, 4, 4, 20, 8),
  reward=rlhf_settings.RewardModel(warm_up=1, steps=2, batch=6, rate=1e-2),
  discount=0.9,
)


def _learner(name, **weights):
  changes = {f'weights.{name}': value for name, value in weights.items()}
  settings = harness.replaced(TINY, changes)
  learner = learner_lib.Learner(
    rlhf_settings.METHODS[name],
    Linear,
    lambda x, observation: observation @ x,
    settings,
    1e-2,
    jnp.float32,
  )
  return learner, learner.empty_start(_params().upper, (3,))


def _params():
  rng = np.random.default_rng(0)
  table = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  lower = bj.rl.ActorCriticParams(table(3, 2), table(3))
  return bj.BilevelParams(table(3, 2), lower)


def _step(name, *weights):
  """One update per pair of a penalty and a weight of the score."""
  rng = np.random.default_rng(1)
  rollouts = {'lower': _rollout(rng)}
  if rlhf_settings.METHODS[name].second_policy:
    rollouts['value'] = _rollout(rng)

  @jax.jit
  def run(params, rollouts, penalty, score):
    learner, start = _learner(name, penalty=penalty, score=score)
    state = learner.init(params, jax.random.key(3), start)
    return learner.step(params, state, rollouts, reward_epoch=True)

  return [run(_params(), rollouts, *each) for each in weights]


@pytest.mark.slow
def test_methods_differ_by_their_terms():
  """PBRL without its terms is DRLHF; each term moves its own params."""
  ((plain, _),) = _step('drlhf', (0.1, 0.05))
  (bare, _), (moved, state), (scored, _) = _step(
    'pbrl', (0.0, 0.0), (1e4, 0.0), (0.0, 10.0)
  )
  same = lambda a, b: jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a, b
  )
  same(bare, plain)
  # With a large penalty the reward falls at the second policy's steps, and
  # rises at the policy's: a step of Adam has this gradient's signs.
  same(moved.lower, plain.lower)
  rng = np.random.default_rng(1)
  here, there = _rollout(rng), _rollout(rng)

  def mean(x, rollout):
    rewards = rollout.observations @ x
    return np.take_along_axis(
      np.asarray(rewards), np.asarray(rollout.actions)[..., None], 2
    ).mean()

  gap = lambda x: mean(x, there) - mean(x, here)
  assert gap(moved.upper) < gap(_params().upper)
  assert np.any(np.abs(scored.lower.actor - plain.lower.actor) > 1e-4)
  same(scored.lower.critic, plain.lower.critic)
  assert int(bj.counts(state)['labels']) == 4
  ((oracle, after),) = _step('oracle', (0.1, 0.05))
  same(oracle.upper, _params().upper)
  assert int(bj.counts(after)['labels']) == 0


@pytest.mark.slow
def test_a_constant_reward_is_the_true_one_on_cart_pole(
  options, results, monkeypatch
):
  """CartPole cannot show learning from preferences.

  Its returns are lengths: the control learns the same as from the true reward,
  bit for bit, and orders all untied pairs.
  """
  monkeypatch.setattr(rlhf, 'render', lambda options: None)
  control = 'control/constant_reward'
  settings = dataclasses.replace(SMALL, methods=('oracle', control))
  harness.execute(rlhf.main, options(settings, paper='pbrl', binary='rlhf'))
  stored = results()
  metrics = stored['metrics']
  assert metrics[f'accuracy/{control}'] == 1
  assert metrics[f'labels/{control}'] == 0
  for name in ('true_return', 'area', 'policy_steps'):
    assert metrics[f'{name}/{control}'] == metrics[f'{name}/oracle']
  lead = harness.paired_interval(stored, 'area/oracle', f'area/{control}')
  assert (lead.mean, lead.half_width) == (0, 0)


def test_a_file_of_labels(options, tmp_path):
  """Pairs are exported, labelled by a rule, and read for training."""
  given = options(SMALL, paper='pbrl', binary='rlhf', seeds=(0,))
  rlhf.export(given)
  path = tmp_path / 'pairs.jsonl'
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert len(lines) == 8
  for line in lines:  # Longer is better.
    one, two = (len(line[side]['actions']) for side in ('first', 'second'))
    line['label'] = 0.5 if one == two else int(two > one)
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  settings = harness.replaced(
    SMALL, {'labels': str(path), 'preferences.buffer': 8}
  )
  settings = rlhf_settings.resolve(settings)
  buffer = rlhf_compiled.file_buffer(settings)
  assert int(buffer.count) == 8
  longer = buffer.pairs.second.mask.sum(1) > buffer.pairs.first.mask.sum(1)
  assert (buffer.pairs.labels[longer] == 1).all()
  # The shapes are those of another environment.
  other = dataclasses.replace(settings, env='Acrobot-v1')
  with pytest.raises(harness.DamagedDataError, match='line 1, first'):
    rlhf_compiled.file_buffer(rlhf_settings.resolve(other))


BAD = {
  'did you mean CartPole-v1': {'env': 'CartPole'},
  'continuous actions': {'env': 'Pendulum-v1'},
  'a fragment is longer than a rollout': {'preferences.fragment': 31},
  'random labels do not go with': {
    'methods': ('control/random_labels',),
    'labels': 'x',
  },
  'an even number': {'rollouts.environments': 5},
  'smaller than the 32 pairs': {'preferences.pairs': 32},
  'at most the 30 steps of a rollout': {'reward.steps': 31},
}


def test_settings_that_contradict_each_other():
  for match, changes in BAD.items():
    with pytest.raises(harness.SettingsError, match=match):
      rlhf_settings.check(harness.replaced(SMALL, changes))
  with pytest.raises(harness.SettingsError, match='tau must be above 0'):
    settings_lib.check(settings_lib.override(SMALL, {'weights.tau': '0'}))
  with pytest.raises(harness.SettingsError, match='methods knows oracle, '):
    settings_lib.check(dataclasses.replace(SMALL, methods=('ppo',)))


@pytest.mark.slow
def test_games_in_python_resume(options):
  """A cart-pole that Python steps; a finished run is read again."""
  settings = dataclasses.replace(
    SMALL, suite='atari', env='CartPole', frames=240, methods=('drlhf',)
  )
  settings = rlhf_settings.resolve(settings)
  given = options(settings, seeds=(0,), save_seconds=0.0)
  run = rlhf_games.Run(settings, 'drlhf')
  _, _, first = run.train(given, 0)
  longer = dataclasses.replace(settings, frames=480)
  assert first['count/labels'][-1, 0] == 8 + 2 * 8
  run.settings = longer
  with pytest.raises(harness.OtherRunError, match='frames'):
    run.train(given, 0)
  run.settings = settings
  _, _, again = run.train(given, 0)  # Finished: read from its checkpoint.
  assert again['return'].tolist() == first['return'].tolist()


@pytest.mark.slow
def test_learns_from_a_file(options, results, tmp_path):
  rlhf.export(options(SMALL, paper='pbrl', binary='rlhf', seeds=(0,)))
  path = tmp_path / 'pairs.jsonl'
  path.write_text(path.read_text().replace('null', '1'))
  settings = dataclasses.replace(SMALL, labels=str(path))
  harness.execute(
    rlhf.main, options(settings, paper='pbrl', binary='rlhf', seeds=(0,))
  )
  metrics = results()['metrics']
  assert metrics['labels/drlhf'] == metrics['labels/pbrl'] == 8


@pytest.mark.slow
def test_cart_pole_from_preferences(options, results):
  quick = rlhf_settings.PRESETS['quick']
  harness.execute(rlhf.main, options(quick, seeds=(0, 1)))
  metrics = results()['metrics']
  assert metrics['true_return/pbrl'] > 450 < metrics['true_return/drlhf']
  assert metrics['true_return/control/random_labels'] < 200
