"""The policy's gradient of the upper loss, and the gate of the penalty."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments.pbrl import preferences
from tests.experiments.pbrl import queries_test

MARGIN = 6.0  # Model reward of a win less that of a loss.


def _pair_loss(wins, losses):
  """Mean loss of a pair of wins or losses, in NumPy; ties have log 2."""
  clear = np.log1p(np.exp(-MARGIN))
  tied = wins**2 + losses**2
  return tied * np.log(2) + 2 * wins * losses * clear


def _chance(logit):
  return 1 / (1 + np.exp(-logit))


def test_the_upper_loss_prefers_untied_pairs():
  """The expected score function is the slope of the exact loss.

  A policy wins with the probability sigmoid(logit). Two independent pairs are
  enumerated, so that the baseline, the other pair's loss, is covered.
  """
  outcomes = np.array(list(itertools.product((0, 1), repeat=4)))
  first, second = outcomes[:, ::2], outcomes[:, 1::2]
  labels = np.where(first == second, 0.5, second > first)
  costs = preferences.bradley_terry(
    MARGIN * jnp.asarray(second - first, jnp.float32),
    jnp.asarray(labels, jnp.float32),
  )

  def score(logit, costs, first, second):
    log = lambda won: jax.nn.log_sigmoid(jnp.where(won, logit, -logit))
    return bj.rl.score_function_loss(costs, log(first) + log(second))

  slopes = jax.jit(jax.vmap(jax.grad(score), (None, 0, 0, 0)))
  for logit in (-1.0, 0.3, 2.0):
    won = outcomes.sum(axis=1)
    chance = _chance(logit)
    weights = chance**won * (1 - chance) ** (4 - won)
    mean = weights @ np.asarray(slopes(logit, costs, first, second))
    exact = lambda x: _pair_loss(_chance(x), 1 - _chance(x))
    want = (exact(logit + 1e-5) - exact(logit - 1e-5)) / 2e-5
    np.testing.assert_allclose(mean, want, rtol=1e-4)
    # A step against the slope leads to a chance of 1/2, not to wins.
    assert mean * logit > 0


def test_only_a_large_multiplier_keeps_the_optimal_policy():
  """F + lambda p is least at a sure win from 2 (log 2 - loss) / gap on."""
  gap = 0.7  # Return of a win less that of a loss.
  wins = np.linspace(0, 1, 100_001)
  threshold = 2 * (np.log(2) - np.log1p(np.exp(-MARGIN))) / gap
  for factor, optimal in ((0.5, False), (0.98, False), (1.02, True)):
    penalised = _pair_loss(wins, 1 - wins) + factor * threshold * gap * (
      1 - wins
    )
    best = wins[np.argmin(penalised)]
    np.testing.assert_allclose(best, 1 if optimal else (1 + factor) / 2)


def _regularised_gap(rollouts, params, tau):
  """Sub-optimality under normalised rewards, up to a positive factor."""
  weights = np.asarray(params.upper, np.float64)
  means = {}
  for name, rollout in rollouts.items():
    observations = np.asarray(rollout.observations, np.float64)
    actions = np.asarray(rollout.actions)[..., None]
    rewards = np.take_along_axis(np.tanh(observations @ weights.T), actions, 2)
    logits = observations @ np.asarray(params.lower.actor, np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = -(chances * np.log(chances)).sum(-1).mean()
    means[name] = rewards.mean(), np.abs(rewards).mean(), entropy
  unit = 0.1 / means['lower'][1]
  regularised = {n: unit * m + tau * h for n, (m, _, h) in means.items()}
  return regularised['value'] - regularised['lower']


def test_the_penalty_is_never_negative():
  """Exchanged rollouts change the sign of the gap, and so the gate."""
  gaps, moves = [], []
  for exchanged in (False, True):
    steps = [
      queries_test.make_step('pbrl', changes, exchanged=exchanged)
      for changes in (
        {'weights.multiplier': 0.3, 'weights.nonnegative': True},
        {'weights.penalty': 0.0, 'weights.score': (1 - 0.9) / 0.3},
      )
    ]
    rollouts, params, joint, state = steps[0]
    gaps.append(_regularised_gap(rollouts, params, 0.01))
    np.testing.assert_allclose(
      bj.values(state)['suboptimality'], gaps[-1] / (1 - 0.9), rtol=1e-4
    )
    moves.append(np.abs(joint.upper - steps[1][2].upper).max())
  assert gaps[0] * gaps[1] < 0
  for gap, moved in zip(gaps, moves, strict=True):
    assert (moved > 1e-4) == (gap > 0)
