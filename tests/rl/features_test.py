"""Linear critics: the mean increment, its root, dependent features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from tests import problems
from tests.rl import reference

GAMMA = 0.9


def make_problem(dtype, size=2):
  moves, rewards, first, policy = reference.process()
  features = np.random.default_rng(5).normal(size=(5, size))
  cast = lambda x: jnp.asarray(x, dtype)
  mdp = bj.rl.MDP(cast(moves), cast(rewards), cast(GAMMA), cast(first))
  return mdp, cast(policy), cast(features)


@pytest.mark.parametrize('restart', [False, True])
@pytest.mark.parametrize('dtype', ['float64', 'float32'])
def test_td_system_and_fixed_point_match_the_mean_increment(restart, dtype):
  moves, rewards, first, policy = reference.process()
  state_weights = reference.visits(moves, first, policy, GAMMA)
  after = GAMMA * moves + (1 - GAMMA) * first if restart else moves
  with jax.enable_x64(dtype == 'float64'):
    mdp, pi, features = make_problem(dtype)
    matrix, right = bj.rl.td_system(
      mdp, pi, features, bootstrap_restarts=restart
    )
    root = bj.rl.td_fixed_point(mdp, pi, features, bootstrap_restarts=restart)
    assert root.dtype == jnp.dtype(dtype)
  matrix, right = np.asarray(matrix), np.asarray(right)
  increment = lambda omega: reference.td_increment(
    after,
    rewards,
    policy,
    np.asarray(features, np.float64),
    state_weights,
    GAMMA,
    omega,
  )
  for omega in np.eye(2):
    np.testing.assert_allclose(
      matrix @ omega + right, increment(omega), rtol=1e-4, atol=1e-5
    )
  atol = 1e-10 if dtype == 'float64' else 1e-5
  np.testing.assert_allclose(
    increment(np.asarray(root, np.float64)), 0, atol=atol
  )


def test_a_table_of_features_gives_the_values(x64):
  mdp, pi, _ = make_problem(jnp.float64)
  values = bj.rl.state_values(mdp, pi)
  actual = bj.rl.td_fixed_point(mdp, pi, jnp.eye(5))
  np.testing.assert_allclose(actual, values, rtol=1e-9)
  even = bj.rl.td_fixed_point(mdp, pi, jnp.eye(5), weights=jnp.full(5, 0.2))
  np.testing.assert_allclose(even, values, rtol=1e-9)


@pytest.mark.parametrize('dtype', ['float64', 'float32'])
def test_dependent_features_give_the_fixed_point_of_least_norm(dtype):
  """TD(0) from zero converges to it; the weight of a zero feature is zero."""
  with jax.enable_x64(dtype == 'float64'):
    mdp, pi, features = make_problem(dtype)
    wide = jnp.hstack([features, features[:, :1], jnp.zeros((5, 1), dtype)])
    actual = bj.rl.td_fixed_point(mdp, pi, wide)
    matrix, right = bj.rl.td_system(mdp, pi, wide)
    omega = jnp.zeros(4, dtype)
    walk = lambda _, z: z + 0.5 * (matrix @ z + right)
    omega = np.asarray(jax.lax.fori_loop(0, 20_000, walk, omega))
    actual = np.asarray(actual)
  rtol = 1e-8 if dtype == 'float64' else 1e-3
  np.testing.assert_allclose(actual, omega, rtol=rtol, atol=rtol)
  assert actual[3] == 0


def test_derivative_of_the_fixed_point(x64):
  mdp, _, features = make_problem(jnp.float64)
  logits = jax.random.normal(jax.random.key(0), (5, 3))

  def first(z):
    return bj.rl.td_fixed_point(mdp, jax.nn.softmax(z), features)[0]

  np.testing.assert_allclose(
    jax.jit(jax.grad(first))(logits),
    problems.by_differences(first, logits),
    atol=1e-6,
  )


def test_random_features_and_errors():
  features = bj.rl.random_features(0, states=50, size=4)
  lengths = np.linalg.norm(features, axis=1)
  np.testing.assert_allclose(lengths.max(), 1, rtol=1e-6)
  assert features.min() >= 0
  with pytest.raises(ValueError, match='features >= 1'):
    bj.rl.random_features(0, size=0)
  mdp, pi, features = make_problem(jnp.float32)
  with pytest.raises(ValueError, match='row for each of 5 states'):
    bj.rl.td_system(mdp, pi, features[:3])
  with pytest.raises(ValueError, match=r'weights have the shape \(5,\)'):
    bj.rl.td_fixed_point(mdp, pi, features, weights=jnp.ones(3))
