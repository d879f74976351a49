"""The binary: switches between methods, resumption, and bad settings."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.harness import comparison
from experiments.harness import settings as settings_lib
from experiments.pbrl import (
  feedback,
  rlhf,
  rlhf_compiled,
  rlhf_games,
  rlhf_settings,
)
from experiments.pbrl import learner as learner_lib

SMALL = dataclasses.replace(
  rlhf_settings.PRESETS['smoke'],
  frames=1_200,
  environments=4,
  rollout=30,
  start_pairs=8,
  buffer=16,
  records=5,
)


def _train(suite, name, workdir, **more):
  hyper = {'rate': np.float32([2e-3])}
  keywords = {'name': name, 'seeds': (7,), 'hyper': hyper, 'settings': {}}
  keywords |= {'workdir': workdir, 'save_seconds': 1e9} | more
  job = comparison.Job(name, False, hyper, (7,), keywords)
  return suite.train(job)


def test_resumes_to_the_same_result(tmp_path):
  """Ended in the middle, it goes on to the same numbers, bit for bit."""
  suite = rlhf_compiled.Suite(rlhf_settings.resolve(SMALL))
  whole = _train(suite, 'pbrl', str(tmp_path / 'whole'))
  half = lambda history: len(history['return']) >= 2
  path = str(tmp_path / 'parts')
  assert _train(suite, 'pbrl', path, stop_when=half).step == 4
  parts = _train(suite, 'pbrl', path)
  assert whole.step == parts.step == 10
  for one, two in zip(
    jax.tree.leaves((whole.params, whole.history)),
    jax.tree.leaves((parts.params, parts.history)),
    strict=True,
  ):
    np.testing.assert_array_equal(one, two)
  labels = whole.history['count/labels'][:, 0]
  assert labels.tolist() == [8 + 8 * k for k in (2, 4, 6, 8, 10)]
  # Both policies' steps: two of two environments.
  steps = whole.history['count/steps/environment'][:, 0]
  assert steps.tolist() == [2 * 2 * 2 * 30 * k for k in range(1, 6)]


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


class _Linear:
  """An agent whose logits are linear in the observation."""

  @staticmethod
  def policy(actor, observation):
    return observation @ actor

  @staticmethod
  def value(critic, observation):
    return observation @ critic


def _learner(name, **weights):
  given = {'entropy': 0.01, 'penalty': 0.1, 'score': 0.05, 'reward_scale': 0.1}
  sampling = learner_lib.Sampling(5, 4, 20, 8, 2, 6, 1.0, jnp.float32)
  learner = learner_lib.make_learner(
    feedback.METHODS[name],
    _Linear,
    lambda x, observation: observation @ x,
    rates=feedback.Rates(1e-2, 1e-2, 1e-2, 1e9, 100),
    weights=feedback.Weights(**given | weights),
    sampling=sampling,
    advantages=bj.rl.Advantages(0.9),
  )
  return learner, learner_lib.nothing(_params().upper, sampling, (3,))


def _params():
  rng = np.random.default_rng(0)
  table = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  lower = bj.rl.ActorCriticParams(table(3, 2), table(3))
  return bj.BilevelParams(table(3, 2), lower)


def _step(name, **weights):
  learner, start = _learner(name, **weights)
  rng = np.random.default_rng(1)
  rollouts = {'lower': _rollout(rng)}
  other = _rollout(rng)
  if feedback.METHODS[name].second:
    rollouts['value'] = other

  @jax.jit
  def run(params, rollouts):
    state = learner.init(params, jax.random.key(3), start)
    return learner.step(params, state, rollouts, reward_epoch=True)

  return run(_params(), rollouts)


def test_methods_differ_by_their_terms():
  """PBRL without its terms is DRLHF; each of them moves what it should."""
  plain, _ = _step('drlhf')
  bare, _ = _step('pbrl', penalty=0.0, score=0.0)
  chex_equal = lambda a, b: jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a, b
  )
  chex_equal(bare, plain)
  # With a large penalty the reward falls at the second policy's steps, and
  # rises at the policy's: a step of Adam has this gradient's signs.
  moved, state = _step('pbrl', penalty=1e4, score=0.0)
  chex_equal(moved.lower, plain.lower)
  rng = np.random.default_rng(1)
  here, there = _rollout(rng), _rollout(rng)

  def mean(x, rollout):
    found = rollout.observations @ x
    return np.take_along_axis(
      np.asarray(found), np.asarray(rollout.actions)[..., None], 2
    ).mean()

  gap = lambda x: mean(x, there) - mean(x, here)
  assert gap(moved.upper) < gap(_params().upper)
  scored, _ = _step('pbrl', penalty=0.0, score=10.0)
  assert np.any(np.abs(scored.lower.actor - plain.lower.actor) > 1e-4)
  chex_equal(scored.lower.critic, plain.lower.critic)
  assert int(bj.counts(state)['labels']) == 4
  oracle, after = _step('oracle')
  chex_equal(oracle.upper, _params().upper)
  assert int(bj.counts(after)['labels']) == 0


def test_a_file_of_labels_is_learnt_from(options, results, tmp_path):
  """Pairs are exported, labelled by a rule, and trained on; then a report."""
  settings = dataclasses.replace(
    SMALL, frames=240, records=1, methods=('drlhf',)
  )
  given = options(settings, paper='pbrl', binary='rlhf', seeds=(0,))
  rlhf.export(given)
  path = tmp_path / 'pairs.jsonl'
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert len(lines) == 8
  for line in lines:  # Longer is better.
    one, two = (len(line[side]['actions']) for side in ('first', 'second'))
    line['label'] = 0.5 if one == two else int(two > one)
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  settings = dataclasses.replace(settings, labels=str(path))
  rlhf.main(given._replace(settings=settings))
  metrics = results()['metrics']
  assert metrics['drlhf/labels'] == 8
  assert metrics['drlhf/policy_steps'] == 240 + 60 and (
    5 < metrics['drlhf/true_return'] < 60
  )
  for name in ('policy_drlhf.npz', 'policy.gif', 'returns.png', 'table.md'):
    assert (tmp_path / name).exists()
  # Of another environment, by the shapes.
  other = dataclasses.replace(settings, env='Acrobot-v1')
  with pytest.raises(harness.DamagedDataError, match='line 1: first'):
    rlhf_compiled.file_buffer(rlhf_settings.resolve(other))


BAD = {
  'did you mean CartPole-v1': {'env': 'CartPole'},
  'continuous actions': {'env': 'Pendulum-v1'},
  'a fragment is a part of a rollout': {'fragment': 31},
  'unknown method': {'methods': ('ppo',)},
  'draws labels of its own': {
    'methods': ('control/random_labels',),
    'labels': 'x',
  },
  'an even number': {'environments': 5},
  'hold the 32 pairs': {'pairs': 32},
  'at most the steps of a rollout': {'reward_steps': 31},
}


def test_settings_that_cannot_be():
  for said, changes in BAD.items():
    with pytest.raises(harness.SettingsError, match=said):
      rlhf_settings.check(dataclasses.replace(SMALL, **changes))
  with pytest.raises(harness.SettingsError, match='tau is above 0'):
    settings_lib.check(settings_lib.override(SMALL, {'tau': '0'}))


def test_games_in_python_go_on(options):
  """A cart-pole that is stepped in Python: SIGKILL's effect is a lost tail."""
  settings = dataclasses.replace(
    SMALL, suite='atari', env='CartPole', frames=240, methods=('pbrl',)
  )
  settings = rlhf_settings.resolve(settings)
  given = options(settings, seeds=(0,), save_seconds=0.0)
  run = rlhf_games.Run(settings, 'pbrl')
  _, first = run.train(given, 0)
  longer = dataclasses.replace(settings, frames=480)
  assert first['count/labels'][-1, 0] == 8 + 2 * 8
  run.settings = longer
  with pytest.raises(harness.OtherRunError, match='frames'):
    run.train(given, 0)
  run.settings = settings
  _, again = run.train(given, 0)  # Finished: read from its checkpoint.
  assert again['return'].tolist() == first['return'].tolist()


@pytest.mark.slow
def test_cart_pole_from_preferences(options, results):
  settings = dataclasses.replace(rlhf_settings.PRESETS['quick'])
  rlhf.main(options(settings, seeds=(0, 1)))
  metrics = results()['metrics']
  assert metrics['pbrl/true_return'] > 450 < metrics['drlhf/true_return']
  assert metrics['control/random_labels/true_return'] < 200
