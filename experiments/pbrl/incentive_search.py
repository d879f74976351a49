"""Incentives without gradients: by hand, and by random search."""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments.pbrl import zero_sum
from experiments.pbrl.incentives import METRIC, Condition, Incentives

_SWEEPS, _MATRIX_STEPS = 2, 20
# A candidate follows the equilibrium by sweeps, and is evaluated there.
PAIRS = _SWEEPS + 1
# Strengths of incentives by hand: multiples of the logits of `by_hand`.
STRENGTHS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 3.0)


def by_hand(game: bj.rl.MarkovGame) -> chex.Array:
  """Favours the designer's best pair of actions in each state.

  The first player pays more unless it takes the designer's best action, and the
  second player receives more if it does. No player prefers a state by these
  incentives.

  Args:
    game: of both players; its first reward is that of the designer.

  Returns:
    Logits of incentives, (states, actions, actions): near -7, 0 or 7.
  """
  states, one, two, _ = game.transitions.shape
  joint = bj.rl.MDP(
    game.transitions.reshape(states, one * two, states),
    game.rewards[0].reshape(states, one * two),
    game.discount,
    game.initial,
  )
  pairs = bj.rl.optimal(joint).policy.reshape(states, one, two)
  best_a, best_b = pairs.sum(axis=2), pairs.sum(axis=1)
  share = (1 - best_a[:, :, None] + best_b[:, None, :]) / 2
  return jnp.log(share + 1e-3) - jnp.log(1 - share + 1e-3)


def random_search(incentives: Incentives, hyper: Any) -> bj.descent.Solver:
  """Makes a search that keeps the best point and changes entries at random.

  Args:
    incentives: the problem.
    hyper: `rate`, the deviation of a change, and `changed`, the share of
      changed entries.
  """

  def follow(x, y):
    step = lambda _, y: zero_sum.follow(
      incentives.game,
      incentives.costs(x),
      y,
      temperature=incentives.temperature,
      steps=_MATRIX_STEPS,
    )
    return jax.lax.fori_loop(0, _SWEEPS, step, y)

  def fn(params, key, best):
    x, y = params.upper, params.lower
    one, two = jax.random.split(key)
    changed = jax.random.bernoulli(one, hyper['changed'], x.shape)
    change = hyper['rate'] * jax.random.normal(two, x.shape, x.dtype)
    candidate = x + jnp.where(changed, change, 0)
    after = follow(candidate, y)
    loss = incentives.loss(candidate, after)
    better = loss < best
    moves = jax.tree.map(
      lambda old, new: jnp.where(better, old - new, 0),
      (x, y),
      (candidate, after),
    )
    slopes = params._replace(upper=moves[0], lower=moves[1])
    return (loss,), slopes, jnp.where(better, loss, best)

  oracle = bj.oracle(
    fn,
    ('upper',),
    lambda params: jnp.asarray(jnp.inf, params.upper.dtype),
    counts={'gradients/lower': PAIRS},
    moves=('upper', 'lower'),
  )
  return bj.descend(oracle, upper=optax.sgd(1.0), lower=optax.sgd(1.0))


def measure_controls(
  settings: Any, condition: Condition, seeds: Sequence[int]
) -> dict[str, dict[str, np.ndarray]]:
  """Measures incentives by hand at several strengths, and none.

  Args:
    settings: of the run.
    condition: of the comparison.
    seeds: of the games.

  Returns:
    Metrics (seeds,) by control. The best strength of each reported game counts,
    in favour of the control.
  """
  games = condition.draw_games(settings.game, seeds)

  def one(game):
    incentives = Incentives(
      game, condition.bound, settings.cost, settings.game.temperature
    )
    base = by_hand(game)
    return jax.lax.map(
      lambda strength: incentives.measure(strength * base),
      jnp.array(STRENGTHS),
    )

  every = jax.device_get(jax.jit(jax.vmap(one))(games))
  best = np.argmax(every[METRIC], axis=1)
  at = np.arange(len(seeds))
  return {
    'no_intervention': {k: v[:, 0] for k, v in every.items()},
    'by_hand': {k: v[at, best] for k, v in every.items()},
  }
