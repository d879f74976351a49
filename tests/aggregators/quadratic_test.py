"""Small quadratic programs and products of rows, against general solvers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import bilevel_jax as bj
from bilevel_jax.aggregators import _quadratic, _rows
from tests.aggregators import references

SEEDS = 20


@pytest.mark.parametrize('size', [1, 12])
def test_nonnegative_qp_matches_nnls(size, x64):
  rng = np.random.default_rng(size)
  matrix = rng.normal(size=(SEEDS, size + 3, size))
  target = rng.normal(size=(SEEDS, size + 3))
  expected = [scipy.optimize.nnls(a, b)[0] for a, b in zip(matrix, target)]
  scale = np.sum(matrix**2, axis=(1, 2)) / size
  gramian = np.einsum('sij,sik->sjk', matrix, matrix) / scale[:, None, None]
  linear = np.einsum('sij,si->sj', matrix, target) / scale[:, None]
  actual = jax.jit(jax.vmap(_quadratic.nonnegative_qp))(gramian, linear)
  np.testing.assert_allclose(actual, expected, atol=1e-9)


def test_min_norm_of_thirty_rows_satisfies_optimality():
  """In float32, also for equal rows, cancelling rows and different lengths."""
  rng = np.random.default_rng(0)
  matrix = rng.normal(size=(SEEDS, 30, 12))
  matrix[5:10, -1] = matrix[5:10, 0]
  matrix[10:15] -= matrix[10:15].mean(1, keepdims=True)
  matrix[15:] *= 10.0 ** rng.uniform(-2, 2, size=(5, 30, 1))
  run = lambda rows: _quadratic.min_norm_weights(
    _rows.gramian(bj.Jacobian(rows))
  )
  weights = jax.jit(jax.vmap(run))(jnp.asarray(matrix, 'float32'))
  weights = np.asarray(weights, np.float64)
  np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
  assert weights.min() >= 0
  points = np.einsum('sm,smn->sn', weights, matrix)
  slopes = np.einsum('smn,sn->sm', matrix, points)
  values = np.sum(points**2, axis=1, keepdims=True)
  sizes = np.linalg.norm(matrix, axis=2)
  parts = np.sum(weights * sizes, axis=1, keepdims=True)
  assert np.min((slopes - values) / (sizes * parts)) > -1e-4


def test_zero_gradients_are_weighed_equally():
  run = lambda rows: _quadratic.min_norm_weights(
    _rows.gramian(bj.Jacobian(rows))
  )
  for size in (1, 3):
    weights = jax.jit(run)(jnp.zeros((size, 2)))
    np.testing.assert_allclose(weights, np.full(size, 1 / size), rtol=1e-6)


def test_nearest_point_of_the_simplex():
  rng = np.random.default_rng(0)
  points = np.concatenate(
    [rng.normal(size=(50, 4)), rng.integers(-1, 2, size=(50, 4))]
  )
  actual = jax.jit(jax.vmap(_quadratic.onto_simplex))(jnp.asarray(points))
  expected = [references.simplex(point) for point in points]
  np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize('rows', [2, 3])
def test_gram_matrix_of_long_rows_equals_one_product(rows, x64):
  draw = np.random.default_rng(0)
  columns = 2 * _rows.CHUNK + 77
  left, right_rows = draw.normal(size=(2, rows, columns))
  tree = lambda x: {'a': jnp.asarray(x), 'b': jnp.asarray(x[:, :4])}
  actual = _rows.products(tree(left), tree(right_rows))
  expected = left @ right_rows.T + left[:, :4] @ right_rows[:, :4].T
  np.testing.assert_allclose(actual, expected, rtol=1e-10)
  # Also in chunks if squares overflow.
  actual = _rows.gramian(bj.Jacobian(tree(1e200 * left)))
  both = np.hstack([left, left[:, :4]])
  np.testing.assert_allclose(
    actual.lengths, 1e200 * np.linalg.norm(both, axis=1), rtol=1e-12
  )
  unit = references.unit(both)
  np.testing.assert_allclose(actual.cosines, unit @ unit.T, atol=1e-12)


def _products_outside_of_loops(compiled):
  """The number of matrix products in a program's main computation."""
  name, blocks = '', {}
  for line in compiled.as_text().splitlines():
    if line.endswith('{'):
      name = 'ENTRY' if line.startswith('ENTRY') else line.split(' ', 1)[0]
    blocks.setdefault(name, []).append(line)
  is_product = lambda line: ' dot(' in line or 'matmul' in line
  with_product = {
    n for n, block in blocks.items() if any(map(is_product, block))
  }
  called = lambda line: set(re.findall(r'calls=(%[^\s,]+)', line))
  return sum(
    is_product(line) or bool(called(line) & with_product)
    for line in blocks['ENTRY']
  )


def test_mapped_seeds_in_range_multiply_their_rows_once():
  """A seed out of range does not affect the others."""
  one = lambda rows: _rows.gramian(bj.Jacobian(rows))[:2]
  actual = jax.jit(jax.vmap(one))
  rows = np.random.default_rng(0).normal(size=(4, 3, 1000)).astype(np.float32)
  assert _products_outside_of_loops(actual.lower(rows).compile()) == 1
  assert _products_outside_of_loops(jax.jit(one).lower(rows[0]).compile()) == 1
  scales = np.float32([1, 1e-25, 1e25, 0])[:, None, None]
  lengths, cosines = actual(rows * scales)
  np.testing.assert_array_equal(lengths[0], actual(rows)[0][0])
  wanted = np.linalg.norm(np.float64(rows), axis=2) * scales[..., 0]
  np.testing.assert_allclose(lengths, wanted, rtol=1e-5)
  unit = references.unit(np.float64(rows[0]))
  np.testing.assert_allclose(cosines[0], unit @ unit.T, atol=1e-5)
  np.testing.assert_allclose(cosines[3], 0)
  # Lengths in range are differentiable.
  slopes = jax.jit(jax.grad(lambda rows: one(rows)[0].sum()))(rows[0])
  wanted = rows[0] / np.linalg.norm(rows[0], axis=1, keepdims=True)
  np.testing.assert_allclose(slopes, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_powers_of_two_scale_without_rounding(dtype, x64):
  info, rng = np.finfo(dtype), np.random.default_rng(0)
  exponents = rng.integers(info.minexp, -info.minexp, size=1_000)
  numbers = np.ldexp(rng.uniform(1, 2, size=1_000).astype(dtype), exponents)
  edges = [0, info.smallest_subnormal, info.tiny, info.max, np.inf, np.nan]
  numbers = np.append(numbers, np.asarray(edges, dtype))
  powers = np.ldexp(dtype(1), np.frexp(numbers)[1] - 1)
  expected = np.where(numbers == 0, 0, powers)
  expected = np.where(np.isfinite(numbers), expected, np.inf)
  expected = np.clip(expected, info.tiny, 1 / info.tiny)
  actual = np.asarray(jax.jit(_rows.power_of_two)(numbers))
  np.testing.assert_array_equal(actual, expected)
  assert actual.dtype == dtype
  assert np.all(np.isfinite(1 / actual)) and np.all(1 / actual >= info.tiny)
