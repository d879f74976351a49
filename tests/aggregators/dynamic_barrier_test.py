"""The dynamic barrier: its defining property, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from tests.aggregators import references

A = bj.aggregators


@jax.jit
def directions(rows, eta):
  """Directions and multipliers of many pairs of rows, each with a rate."""

  def one(pair, eta):
    link = A.dynamic_barrier(eta)
    direction, state = link.update(bj.Jacobian(pair), link.init(pair[0]))
    return direction, state.multiplier

  return jax.vmap(one)(rows, eta)


def test_gives_the_nearest_direction_that_decreases_the_penalty():
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(200, 2, 2))
  rows[0] = [[1.0, 1.0], [0.0, -2.0]]
  rows[1] = [
    [2.0, 1.0],
    [1.0, 0.0],
  ]  # The penalty decreases fast enough, so the direction does not change.
  rows[2, 1] = 0
  rows[3, 0] = 0
  rows[4, 1] = rows[4, 0]
  rows[5, 1] = -rows[5, 0]
  eta = np.append([0.5, 0.5], rng.uniform(0, 3, size=198))
  direction, multiplier = directions(*map(jnp.float32, (rows, eta)))
  expected = [references.dynamic_barrier(*pair) for pair in zip(rows, eta)]
  np.testing.assert_allclose(direction, expected, rtol=2e-5, atol=2e-5)
  np.testing.assert_array_equal(direction[1], [2.0, 1.0])
  np.testing.assert_allclose(multiplier[:3], [0.5 + 2 / 4, 0, 0], rtol=1e-6)


def test_finite_and_bounded_for_any_gradient_of_the_penalty():
  sizes = np.float32([0.0, 1e-38, 1e-30, 1e-20, 1e18, 1e30])
  rows = np.float32(
    [[[3.0, -4.0], [-0.6 * size, 0.8 * size]] for size in sizes]
  )
  direction, _ = directions(rows, np.full(6, 0.5, np.float32))
  bound = 5 + 0.5 * np.float64(sizes)
  norms = np.linalg.norm(np.float64(direction), axis=1)
  assert np.all(norms <= bound * (1 + 1e-5))
  np.testing.assert_array_equal(direction[0], [3.0, -4.0])
  # The penalty decreases at half its squared gradient norm.
  along = np.float64(direction[2:4]) @ [-0.6, 0.8]
  np.testing.assert_allclose(along, 0.5 * sizes[2:4], atol=1e-6)


def test_products_use_all_sequences_and_rest_does_not_change():
  rows = bj.sequences(
    a=jnp.array([[1.0], [1.0]]), b={'w': jnp.array([[-3.0], [1.0]])}, c=None
  )
  link = A.dynamic_barrier(1.0)
  params = bj.sequences(a=jnp.zeros(1), b={'w': jnp.zeros(1)}, c=jnp.zeros(1))
  jacobian = bj.Jacobian(rows, {'c': jnp.array([7.0])})
  updates, state = link.update(jacobian, link.init(params), params)
  np.testing.assert_allclose(state.multiplier, 1 + 2 / 2, rtol=1e-6)
  np.testing.assert_allclose(updates.a, [3.0], rtol=1e-6)
  np.testing.assert_allclose(updates.b['w'], [-1.0], rtol=1e-6)
  assert updates.c == 7.0


def test_errors():
  with pytest.raises(ValueError, match='eta is a weight >= 0'):
    A.dynamic_barrier(-1.0)
  link = A.dynamic_barrier()
  with pytest.raises(ValueError, match='2 rows, but the Jacobian has 3'):
    link.update(bj.Jacobian(jnp.ones((3, 2))), link.init(jnp.ones(2)))
