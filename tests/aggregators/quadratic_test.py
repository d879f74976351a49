"""The small convex programs, against a solver of quadratic programs."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from bilevel_jax.aggregators import _quadratic


def draw(seed, rows, columns, kind):
  """Jacobians: random, with equal rows, of low rank, conflicting."""
  rng = np.random.default_rng(seed)
  matrix = rng.normal(size=(rows, columns))
  if kind == 'twins':
    matrix[-1] = matrix[0]
  elif kind == 'scales':
    matrix *= 10.0 ** rng.uniform(-2, 2, size=(rows, 1))
  elif kind == 'conflict':
    matrix = matrix - matrix.mean(0) + 0.01 * rng.normal(size=columns)
  return matrix


KINDS = ('random', 'twins', 'scales', 'conflict')


def shortest_by_qp(matrix):
  """The norm of the shortest convex combination, by SLSQP from many starts."""
  gramian = matrix @ matrix.T
  gramian = gramian / np.trace(gramian)
  size = len(gramian)
  best = np.inf
  for start in [np.full(size, 1 / size), *np.eye(size)]:
    found = scipy.optimize.minimize(
      lambda w: w @ gramian @ w,
      start,
      jac=lambda w: 2 * gramian @ w,
      bounds=[(0, 1)] * size,
      constraints={
        'type': 'eq',
        'fun': lambda w: w.sum() - 1,
        'jac': lambda w: np.ones(size),
      },
      method='SLSQP',
      options={'ftol': 1e-15, 'maxiter': 500},
    )
    best = min(best, found.fun)
  return best


@hypothesis.given(
  seed=st.integers(0, 10_000),
  rows=st.sampled_from([2, 3, 6]),
  columns=st.sampled_from([2, 9]),
  kind=st.sampled_from(KINDS),
)
def test_min_norm_is_that_of_a_qp_solver(seed, rows, columns, kind):
  matrix = draw(seed, rows, columns, kind)
  with jax.enable_x64(True):
    gramian = jnp.asarray(matrix @ matrix.T)
    weights = np.asarray(jax.jit(_quadratic.min_norm_weights)(gramian))
  assert weights.min() >= 0
  np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
  ours = weights @ (matrix @ matrix.T) @ weights / np.sum(matrix**2)
  assert ours <= shortest_by_qp(matrix) + 1e-8


@hypothesis.given(
  seed=st.integers(0, 10_000),
  rows=st.sampled_from([3, 6, 30]),
  kind=st.sampled_from(KINDS),
)
def test_min_norm_in_float32_is_optimal_by_its_slopes(seed, rows, kind):
  matrix = draw(seed, rows, 12, kind)
  gramian = matrix @ matrix.T
  gramian = gramian * rows / np.trace(gramian)
  weights = jax.jit(_quadratic.min_norm_weights)(
    jnp.asarray(gramian, 'float32')
  )
  slope = gramian @ np.asarray(weights, np.float64)
  value = weights @ slope
  assert slope.min() >= value - 2e-4


@hypothesis.given(
  seed=st.integers(0, 10_000), size=st.sampled_from([1, 2, 5, 20])
)
def test_nonnegative_qp_is_that_of_nnls(seed, size):
  rng = np.random.default_rng(seed)
  matrix, target = rng.normal(size=(size + 3, size)), rng.normal(size=size + 3)
  expected, _ = scipy.optimize.nnls(matrix, target)
  with jax.enable_x64(True):
    scale = np.sum(matrix**2) / size
    found = _quadratic.nonnegative_qp(
      jnp.asarray(matrix.T @ matrix / scale),
      jnp.asarray(matrix.T @ target / scale),
    )
  np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_batch_of_programs_equals_one_by_one():
  matrices = [draw(seed, 5, 7, 'conflict') for seed in range(6)]
  with jax.enable_x64(True):
    gramians = jnp.asarray([m @ m.T for m in matrices])
    together = jax.vmap(_quadratic.min_norm_weights)(gramians)
    for gramian, found in zip(gramians, together):
      np.testing.assert_allclose(
        found, _quadratic.min_norm_weights(gramian), atol=1e-12
      )


@pytest.mark.parametrize('size', [1, 2, 4])
def test_zero_gradients_are_weighed_equally(size):
  weights = _quadratic.min_norm_weights(jnp.zeros((size, size)))
  np.testing.assert_allclose(weights, np.full(size, 1 / size), rtol=1e-6)
