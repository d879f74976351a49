"""The dynamic barrier: by hand, by its defining property, and at its limits."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import bilevel_jax as bj


def direction(objective, penalty, eta=0.5):
  rows = jnp.stack([jnp.asarray(objective), jnp.asarray(penalty)])
  link = bj.aggregators.dynamic_barrier(eta)
  params = jnp.zeros_like(rows[0])
  return link.update(bj.Jacobian(rows), link.init(params), params)


def test_by_hand():
  updates, state = direction([1.0, 1.0], [0.0, -2.0])
  np.testing.assert_allclose(state.multiplier, 0.5 + 2 / 4, rtol=1e-6)
  np.testing.assert_allclose(updates, [1.0, -1.0], rtol=1e-6)


def test_a_penalty_that_falls_fast_enough_is_left_alone():
  updates, state = direction([2.0, 1.0], [1.0, 0.0])
  np.testing.assert_array_equal(updates, [2.0, 1.0])
  assert state.multiplier == 0


vectors = st.lists(
  st.floats(-10, 10, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3),
  min_size=3,
  max_size=3,
)


@hypothesis.given(vectors, vectors, st.floats(0, 3))
def test_nearest_direction_with_a_decrease(objective, penalty, eta):
  updates, state = direction(objective, penalty, eta)
  f, q, d = map(np.float64, (objective, penalty, updates))
  assert d @ q >= eta * q @ q - 1e-4 * (1 + np.abs(f) @ np.abs(q) + q @ q)
  np.testing.assert_allclose(
    d, f + float(state.multiplier) * q, rtol=1e-4, atol=1e-4
  )
  # Tight, unless the multiplier is zero.
  slack = d @ q - eta * q @ q
  assert min(abs(slack), state.multiplier) <= 1e-3 * (1 + np.abs(f) @ np.abs(q))


@pytest.mark.parametrize('size', [0.0, 1e-20, 1e-30, 1e-38, 1e18])
def test_finite_and_bounded_whatever_the_slope_of_the_penalty(size):
  penalty = np.float32(size) * np.array([-0.6, 0.8], np.float32)
  updates, _ = direction([3.0, -4.0], penalty)
  bound = 5 + 0.5 * np.linalg.norm(penalty.astype(np.float64))
  assert np.linalg.norm(np.float64(updates)) <= bound * (1 + 1e-5)
  if size == 0:
    np.testing.assert_array_equal(updates, [3.0, -4.0])


def test_products_run_over_all_sequences():
  rows = bj.BilevelParams(
    jnp.array([[1.0], [1.0]]), {'w': jnp.array([[-3.0], [1.0]])}
  )
  link = bj.aggregators.dynamic_barrier(1.0)
  params = jax.tree.map(lambda r: r[0], rows)
  updates, state = link.update(bj.Jacobian(rows), link.init(params), params)
  np.testing.assert_allclose(state.multiplier, 1 + 2 / 2, rtol=1e-6)
  np.testing.assert_allclose(updates.upper, [3.0], rtol=1e-6)
  np.testing.assert_allclose(updates.lower['w'], [-1.0], rtol=1e-6)


def test_rest_is_untouched():
  params = bj.BilevelParams(jnp.zeros(1), jnp.zeros(1))
  rows = bj.BilevelParams(jnp.array([[1.0], [-1.0]]), None)
  jacobian = bj.Jacobian(rows, {'lower': jnp.array([7.0])})
  link = bj.aggregators.dynamic_barrier()
  updates, _ = link.update(jacobian, link.init(params), params)
  assert updates.lower == 7.0


def test_errors():
  with pytest.raises(ValueError, match='eta is a weight >= 0'):
    bj.aggregators.dynamic_barrier(-1.0)
  with pytest.raises(TypeError, match='dynamic_barrier weighs the rows'):
    bj.aggregators.dynamic_barrier().update(
      jnp.ones(2),
      bj.aggregators.dynamic_barrier().init(jnp.ones(2)),
      jnp.ones(2),
    )
  with pytest.raises(ValueError, match='two rows'):
    bj.aggregators.dynamic_barrier().update(
      bj.Jacobian(jnp.ones((3, 2))),
      bj.aggregators.dynamic_barrier().init(jnp.ones(2)),
      jnp.ones(2),
    )
