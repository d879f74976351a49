"""Equilibria of small zero-sum games."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments.pbrl import zero_sum

TAU = 0.1


@pytest.mark.slow
def test_learning_players_reach_the_equilibrium():
  game = bj.rl.random_game(1, states=4, actions=(3, 2), rewards=1)
  costs = game.rewards[0]
  draw = np.random.default_rng(0).normal
  y = (jnp.asarray(draw(size=(4, 3))), jnp.asarray(draw(size=(4, 2))))

  @jax.jit
  def solve(y):
    learn = lambda _, y: zero_sum.learn(
      game, costs, y, temperature=TAU, rate=0.03
    )
    nash = zero_sum.nash(game, costs, temperature=TAU)
    return nash, jax.lax.fori_loop(0, 2_000, learn, y)

  nash, far = solve(y)
  error = lambda y: zero_sum.equilibrium_error(game, costs, y, TAU)
  assert error(nash) < 1e-4 < 0.1 < error(y)
  for one, two in zip(far, nash, strict=True):
    np.testing.assert_allclose(
      jax.nn.softmax(one), jax.nn.softmax(two), atol=2e-3
    )


def test_matching_pennies():
  """Uniform policies in a single state."""
  costs = jnp.array([[[1.0, -1.0], [-1.0, 1.0]]])
  game = bj.rl.make_game(jnp.ones((1, 2, 2, 1)), costs[None], discount=0.0)
  for policy in zero_sum.nash(game, costs, temperature=TAU):
    np.testing.assert_allclose(jax.nn.softmax(policy), 0.5, atol=1e-6)
