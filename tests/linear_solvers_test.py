"""Linear solvers against dense solutions; their products; their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax import linear_solvers

RNG = np.random.default_rng(0)
ROOT = RNG.normal(size=(6, 6))
MATRIX = ROOT @ ROOT.T / 6 + np.eye(6) / 2
RIGHT = RNG.normal(size=6)
LARGEST = float(np.linalg.eigvalsh(MATRIX)[-1])


def as_tree(vector):
  return {'a': vector[:4].reshape(2, 2), 'b': vector[4:]}


def as_vector(tree):
  return jnp.concatenate([tree['a'].ravel(), tree['b']])


def operator(tree):
  return as_tree(jnp.asarray(MATRIX) @ as_vector(tree))


def solve(solver, start=None, key=None):
  """Solution and products in float64, on a pytree."""
  with jax.enable_x64(True):
    right = as_tree(jnp.asarray(RIGHT))
    if start is not None:
      start = as_tree(jnp.asarray(start))
    run = jax.jit(lambda right: solver.solve(operator, right, start, key))
    solution, products = run(right)
    return np.asarray(as_vector(solution)), int(products)


@pytest.mark.parametrize(
  ('solver', 'products', 'tolerance'),
  [
    (bj.linear_solvers.dense_solve(), 6, 1e-12),
    (bj.linear_solvers.conjugate_gradient(6), 6, 1e-10),
    (bj.linear_solvers.conjugate_gradient(20), 20, 1e-12),
    (bj.linear_solvers.conjugate_gradient(20, unroll=20), 20, 1e-12),
    (bj.linear_solvers.gmres(6), 6, 1e-12),
    (bj.linear_solvers.gmres(9), 9, 1e-12),
    (bj.linear_solvers.neumann(600, 1 / LARGEST), 600, 1e-12),
    (bj.linear_solvers.nystrom(6, 1e-7), 6, 5e-6),
    (bj.linear_solvers.nystrom(9, 1e-7), 6, 5e-6),
  ],
)
def test_solves(solver, products, tolerance):
  solution, spent = solve(solver)
  expected = np.linalg.solve(MATRIX, RIGHT)
  np.testing.assert_allclose(solution, expected, atol=tolerance)
  assert spent == products


def test_starts():
  exact = np.linalg.solve(MATRIX, RIGHT)
  near = exact + 0.01 * RIGHT
  for solver in (
    bj.linear_solvers.conjugate_gradient(2),
    bj.linear_solvers.gmres(2),
    bj.linear_solvers.neumann(3, 1 / LARGEST),
  ):
    cold, cold_products = solve(solver)
    warm, products = solve(solver, near)
    assert np.linalg.norm(warm - exact) < 0.3 * np.linalg.norm(cold - exact)
    assert products - cold_products in (0, 1)
    np.testing.assert_allclose(solve(solver, exact)[0], exact, atol=1e-12)


def test_conjugate_gradients_end_at_the_tolerance():
  solution, products = solve(
    bj.linear_solvers.conjugate_gradient(50, tolerance=1e-3)
  )
  residual = np.linalg.norm(MATRIX @ solution - RIGHT)
  assert products < 6
  assert residual <= 1e-3 * np.linalg.norm(RIGHT)


def test_neumann_is_the_truncated_series():
  solution, _ = solve(bj.linear_solvers.neumann(3, 0.2))
  shrink = np.eye(6) - 0.2 * MATRIX
  powers = sum(np.linalg.matrix_power(shrink, n) for n in range(4))
  np.testing.assert_allclose(solution, 0.2 * powers @ RIGHT, atol=1e-12)


def test_random_neumann_has_the_series_as_its_mean_and_counts_its_length():
  solver, bound = bj.linear_solvers.random_neumann(4, 0.2), 4
  shrink = np.eye(6) - 0.2 * MATRIX
  terms = [
    0.2 * bound * np.linalg.matrix_power(shrink, n) @ RIGHT
    for n in range(bound)
  ]
  seen = set()
  with jax.enable_x64(True):
    right = as_tree(jnp.asarray(RIGHT))
    run = jax.jit(lambda key: solver.solve(operator, right, None, key))
    drawn = [run(jax.random.key(seed)) for seed in range(20)]
  for tree, length in drawn:
    solution, length = np.asarray(as_vector(tree)), int(length)
    np.testing.assert_allclose(solution, terms[length], atol=1e-12)
    seen.add(length)
  # Each of the terms is as likely: their mean is the sum of four.
  assert seen == {0, 1, 2, 3}
  exact, _ = solve(bj.linear_solvers.neumann(bound - 1, 0.2))
  np.testing.assert_allclose(np.mean(terms, axis=0), exact, atol=1e-12)


def test_samples_are_taken_in_turn():
  sampled = linear_solvers.SampledOperator(
    lambda v: v, lambda v, t: v * (1 + t).astype(v.dtype)
  )
  # v <- v + (1 - (1 + t) v) / 4, from 1/4.
  q = bj.linear_solvers.neumann(2, 0.25)(sampled, jnp.float32(1.0))
  first = 0.25 + (1 - 0.25) / 4
  np.testing.assert_allclose(q, first + (1 - 2 * first) / 4, rtol=1e-6)


def test_nystrom_inverts_the_damped_matrix_and_low_ranks():
  solution, _ = solve(bj.linear_solvers.nystrom(6, 0.3))
  expected = np.linalg.solve(MATRIX + 0.3 * np.eye(6), RIGHT)
  np.testing.assert_allclose(solution, expected, atol=1e-10)
  low = RNG.normal(size=(8, 2))
  matrix, right = jnp.asarray(low @ low.T), jnp.asarray(RNG.normal(size=8))
  found = bj.linear_solvers.nystrom(3, 0.1)(lambda v: matrix @ v, right)
  expected = np.linalg.solve(np.asarray(matrix) + 0.1 * np.eye(8), right)
  np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_gmres_needs_no_symmetry():
  matrix = np.array([[1.0, 2.0], [-3.0, 0.5]])
  found = bj.linear_solvers.gmres(2)(
    lambda v: jnp.asarray(matrix) @ v, jnp.array([1.0, -1.0])
  )
  np.testing.assert_allclose(found, np.linalg.solve(matrix, [1, -1]), rtol=1e-5)


@pytest.mark.parametrize(
  'solver',
  [
    bj.linear_solvers.conjugate_gradient(3),
    bj.linear_solvers.gmres(3),
    bj.linear_solvers.dense_solve(),
    bj.linear_solvers.nystrom(2, 0.1),
  ],
)
def test_a_zero_right_hand_side_and_a_singular_matrix_stay_finite(solver):
  zero = solver(lambda v: v, jnp.zeros(3))
  np.testing.assert_allclose(zero, 0, atol=1e-7)
  part = solver(
    lambda v: v * jnp.array([1.0, 1.0, 0.0]), jnp.array([1.0, 0, 0])
  )
  assert np.all(np.isfinite(part))


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: bj.linear_solvers.conjugate_gradient(0), 'steps >= 1, got 0'),
    (lambda: bj.linear_solvers.neumann(-1, 0.1), 'steps >= 0'),
    (lambda: bj.linear_solvers.random_neumann(0, 0.1), 'terms >= 1'),
    (lambda: bj.linear_solvers.gmres(0), 'steps >= 1'),
    (lambda: bj.linear_solvers.nystrom(0, 0.1), 'columns >= 1'),
    (lambda: bj.linear_solvers.nystrom(3, 0.0), 'damping is positive'),
    (lambda: bj.linear_solvers.random_neumann(2, 0.1)(lambda v: v, 1.0), 'key'),
  ],
)
def test_arguments_out_of_range(make, match):
  with pytest.raises(ValueError, match=match):
    make()
