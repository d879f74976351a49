"""Queries by disagreement, ties and counts of pairs against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.pbrl import feedback, preferences, queries, rlhf_settings
from experiments.pbrl import learner as learner_lib
from tests.experiments.pbrl import rlhf_test

MEMBERS, ACTIONS, LENGTH, SHAPE = 4, 3, 5, (2,)


def _member(weights, observation):
  return jnp.tanh(weights @ observation)


def _fragments(rng, *lead):
  return preferences.Fragments(
    jnp.asarray(rng.normal(size=(*lead, LENGTH, *SHAPE)), jnp.float32),
    jnp.asarray(rng.integers(0, ACTIONS, (*lead, LENGTH))),
    jnp.asarray(np.arange(LENGTH) < rng.integers(1, 6, (*lead, 1))),
    jnp.asarray(rng.integers(0, 3, lead), jnp.float32),
  )


def _weights(rng):
  return rng.normal(size=(MEMBERS, ACTIONS, *SHAPE)).astype(np.float32)


def _total(weights, fragments, *at):
  """Model reward of a fragment, step by step."""
  steps = int(np.sum(fragments.mask[at]))
  return sum(
    np.tanh(
      weights[int(fragments.actions[at][t])]
      @ np.asarray(fragments.observations[at][t], np.float64)
    )
    for t in range(steps)
  )


def test_selects_the_pairs_of_largest_variance():
  rng = np.random.default_rng(0)
  weights, pair = _weights(rng), _fragments(rng, 20, 2)
  variances = []
  for i in range(20):
    chances = []
    for member in weights.astype(np.float64):
      margin = _total(member, pair, i, 1) - _total(member, pair, i, 0)
      chances.append(1 / (1 + np.exp(-margin)))
    variances.append(np.var(chances))
  select = jax.jit(
    lambda weights, pair: queries.select_disagreed(_member, weights, pair, 6)
  )
  chosen = select(weights, pair)
  best = np.argsort(variances)[::-1][:6]
  np.testing.assert_array_equal(chosen.observations, pair.observations[best])
  np.testing.assert_array_equal(chosen.returns, pair.returns[best])


def test_an_ensemble_has_the_mean_reward_and_the_sum_of_losses():
  rng = np.random.default_rng(1)
  weights = _weights(rng)
  network = queries.as_ensemble(harness.Network(None, _member), MEMBERS)
  at = rng.normal(size=SHAPE).astype(np.float32)
  want = np.mean([np.tanh(w @ at) for w in weights], axis=0)
  np.testing.assert_allclose(network.apply(weights, at), want, rtol=1e-5)
  labels = rng.choice([0, 0.5, 1], (MEMBERS, 6))
  pairs = preferences.Pairs(
    _fragments(rng, MEMBERS, 6),
    _fragments(rng, MEMBERS, 6),
    jnp.asarray(labels, jnp.float32),
  )
  want = 0.0
  for m, i in np.ndindex(MEMBERS, 6):
    margin = _total(weights[m], pairs.second, m, i) - _total(
      weights[m], pairs.first, m, i
    )
    chance = 1 / (1 + np.exp(-margin))
    label = labels[m, i]
    want -= (label * np.log(chance) + (1 - label) * np.log(1 - chance)) / 6
  loss = feedback.preference_loss(network.apply, weights, pairs, _member)
  np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_ties_are_half_and_the_others_as_before():
  pair = _fragments(np.random.default_rng(2), 60, 2)
  key, returns = jax.random.key(0), np.asarray(pair.returns)
  tied = returns[:, 0] == returns[:, 1]
  drawn = np.asarray(preferences.label(key, pair, 0.3).labels)
  half = np.asarray(preferences.label(key, pair, 0.3, half_ties=True).labels)
  assert 10 < tied.sum() < 50
  assert (half[tied] == 0.5).all() and set(drawn[tied]) == {0.0, 1.0}
  np.testing.assert_array_equal(half[~tied], drawn[~tied])


def test_counts_of_informative_pairs():
  pairs = preferences.label(
    jax.random.key(3), _fragments(np.random.default_rng(3), 50, 2), 0.7
  )
  untied = orders = right = 0
  for i in range(50):
    ahead = float(pairs.second.returns[i] - pairs.first.returns[i])
    longer = int(pairs.second.mask[i].sum()) - int(pairs.first.mask[i].sum())
    untied += ahead != 0
    orders += ahead * longer > 0
    right += (float(pairs.labels[i]) - 0.5) * ahead > 0
  counts = np.asarray(jax.jit(preferences.count_informative)(pairs))
  assert counts.tolist() == [50, untied, orders, right]
  assert 0 < orders < right < untied < 50


def _rollout(rng, steps=12, count=4):
  shape = (steps, count)
  return bj.rl.Rollout(
    jnp.asarray(rng.normal(size=(*shape, *SHAPE)), jnp.float32),
    jnp.asarray(rng.integers(0, ACTIONS, shape)),
    jnp.asarray(rng.integers(0, 2, shape), jnp.float32),
    jnp.asarray(rng.random(shape) < 0.1),
    jnp.zeros(shape, bool),
    jnp.asarray(rng.normal(size=(*shape, *SHAPE)), jnp.float32),
  )


def make_step(name, changes=(), *, exchanged=False):
  """An update with the rollouts, params and state before and after."""
  settings = rlhf_settings.Settings(
    frames=4 * 12 * 100,
    rollouts=rlhf_settings.Rollouts(4, 12, 1),
    preferences=rlhf_settings.Preferences(LENGTH, 4, 4, 20, 8, ties='half'),
    reward=rlhf_settings.RewardModel(warm_up=1, steps=2, batch=6, rate=1e-2),
    discount=0.9,
  )
  settings = harness.replaced(settings, dict(changes))
  method, rng = rlhf_settings.METHODS[name], np.random.default_rng(4)
  weights = _weights(rng)
  reward = lambda x, observation: _member(x, observation)
  if method.ensemble:
    settings = harness.replaced(settings, {'reward.members': MEMBERS})
    reward = queries.as_ensemble(harness.Network(None, _member), MEMBERS).apply
  learner = learner_lib.Learner(
    method, rlhf_test.Linear, reward, settings, 1e-2, jnp.float32, _member
  )
  upper = jnp.asarray(weights if method.ensemble else weights[0])
  actor = rng.normal(size=(*SHAPE, ACTIONS)).astype(np.float32)
  lower = bj.rl.ActorCriticParams(jnp.asarray(actor), jnp.zeros(SHAPE))
  params = bj.BilevelParams(upper, lower)
  rollouts = {'lower': _rollout(rng)}
  if method.second_policy:
    rollouts['value'] = _rollout(rng)
    if exchanged:
      rollouts = dict(zip(rollouts, reversed(rollouts.values()), strict=True))
  start = learner.empty_start(upper, SHAPE)
  state = learner.init(params, jax.random.key(5), start)
  run = jax.jit(lambda *args: learner.step(*args, reward_epoch=True))
  after, state = run(params, state, rollouts)
  return rollouts, params, after, state


def test_a_step_measures_entropy_and_counts_labels():
  rollouts, params, _, state = make_step('drlhf')
  logits = np.asarray(rollouts['lower'].observations, np.float64) @ np.asarray(
    params.lower.actor, np.float64
  )
  chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  want = -(chances * np.log(chances)).sum(-1).mean()
  np.testing.assert_allclose(bj.values(state)['entropy'], want, rtol=1e-5)
  counts, stored = bj.counts(state), state.buffer.pairs
  labels = np.asarray(stored.labels)[:4]
  tied = np.asarray(stored.first.returns == stored.second.returns)[:4]
  assert (labels[tied] == 0.5).all() and (labels[~tied] != 0.5).all()
  assert [int(counts[n]) for n in ('labels', 'untied')] == [4, sum(~tied)]


def test_an_ensemble_moves_each_member_and_a_constant_none():
  _, params, after, state = make_step('ensemble')
  moved = np.abs(after.upper - params.upper).max(axis=(1, 2))
  assert (moved > 1e-3).all()
  assert int(bj.counts(state)['labels']) == 4


def test_a_multiplier_weighs_both_terms():
  """Of f + lambda p, divided by lambda / (1 - discount) for the policy."""
  rollouts, params, joint, _ = make_step('pbrl', {'weights.multiplier': 0.3})
  weights = np.asarray(params.upper, np.float64)
  rewards = np.tanh(np.asarray(rollouts['lower'].observations) @ weights.T)
  actions = np.asarray(rollouts['lower'].actions)[..., None]
  scale = np.abs(np.take_along_axis(rewards, actions, 2)).mean()
  changes = {
    'weights.penalty': float(0.3 / (1 - 0.9) * 0.1 / scale),
    'weights.score': (1 - 0.9) / 0.3,
  }
  _, _, separate, _ = make_step('pbrl', changes)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    joint,
    separate,
  )
  _, _, other, _ = make_step('pbrl', changes | {'weights.penalty': 0.0})
  assert np.abs(other.upper - joint.upper).max() > 1e-4
