import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import problems

# f = |y - c|^2 / 2 + |x|^2 / 2, g = (y - M x)' H (y - M x) / 2.
M = np.array([[1.0, 0.5], [-0.3, 2.0]])
H = np.array([[2.0, 0.4], [0.4, 1.0]])
C = np.array([1.0, -2.0])


def quadratic_lower(x, y, batch):
  error = y - M @ x
  return error @ H @ error / 2


QUADRATIC = bj.BilevelProblem(
  upper=lambda x, y, batch: ((y - C) ** 2).sum() / 2 + (x**2).sum() / 2,
  lower=quadratic_lower,
)


def convex_lower(x, y, batch):
  """Strongly convex in y, no quadratic, and its minimum not in closed form."""
  mixed = jnp.tanh(batch @ y['matrix']) - x['a']
  flat = sum((leaf**2).sum() + (leaf**4).sum() for leaf in jax.tree.leaves(y))
  return jnp.mean(mixed**2) / 5 + flat / 2 + jnp.vdot(x['a'], y['vector'])


CONVEX = bj.BilevelProblem(problems.rough_upper, convex_lower)
# Compiled once for all tests of it.
SOLVE = jax.jit(
  functools.partial(bj.diagnostics.lower_minimiser, CONVEX, steps=60)
)


def quadratic_params():
  return bj.BilevelParams(jnp.array([0.7, -0.2]), jnp.array([3.0, 1.0]))


def test_lower_minimiser_of_a_quadratic(x64):
  params = quadratic_params()
  y = bj.diagnostics.lower_minimiser(QUADRATIC, params, steps=40)
  np.testing.assert_allclose(y, M @ params.upper, atol=1e-8)


def test_lower_minimiser_of_a_tree_is_stationary(x64):
  params, batch = problems.rough_params(), problems.rough_batch()
  y = SOLVE(params, batch)
  slope = jax.grad(convex_lower, 1)(params.upper, y, batch)
  assert optax.tree.norm(slope) < 1e-7
  chex.assert_trees_all_equal_shapes_and_dtypes(y, params.lower)


def test_lower_minimiser_by_another_optimiser(x64):
  params = quadratic_params()
  y = bj.diagnostics.lower_minimiser(
    QUADRATIC, params, optimiser=optax.sgd(0.4), steps=300
  )
  np.testing.assert_allclose(y, M @ params.upper, atol=1e-8)


def test_lower_minimiser_stays_at_a_minimum(x64):
  params = quadratic_params()
  params = params._replace(lower=jnp.asarray(M @ params.upper))
  y = bj.diagnostics.lower_minimiser(QUADRATIC, params, steps=30)
  np.testing.assert_allclose(y, params.lower, atol=1e-12)


def test_penalty_gap_in_closed_form(x64):
  params = quadratic_params()
  error = params.lower - M @ params.upper
  gap = bj.diagnostics.penalty_gap(QUADRATIC, params, steps=40)
  np.testing.assert_allclose(gap, error @ H @ error / 2, rtol=1e-8)


def test_penalty_gap_is_the_difference_of_the_lower_losses(x64):
  params, batch = problems.rough_params(), problems.rough_batch()
  gap = bj.diagnostics.penalty_gap(CONVEX, params, batch, steps=60)
  y = SOLVE(params, batch)
  least = convex_lower(params.upper, y, batch)
  here = convex_lower(*params, batch)
  np.testing.assert_allclose(gap, here - least, rtol=1e-12)
  assert gap > 0


def test_hypergradient_in_closed_form(x64):
  x = quadratic_params().upper
  params = bj.BilevelParams(x, jnp.asarray(M @ x))
  slope = bj.hypergradient(QUADRATIC, params, tolerance=1e-12)
  # F(x) = |M x - c|^2 / 2 + |x|^2 / 2.
  np.testing.assert_allclose(slope, M.T @ (M @ x - C) + x, rtol=1e-9)


def test_hypergradient_by_differences_of_the_value_function(x64):
  params, batch = problems.rough_params(), problems.rough_batch()
  solve = lambda x: SOLVE(params._replace(upper=x), batch)
  outer = lambda x: problems.rough_upper(x, solve(x), batch)
  expected = problems.by_differences(outer, params.upper, 1e-4)
  at = params._replace(lower=solve(params.upper))
  slope = bj.hypergradient(CONVEX, at, batch, tolerance=1e-12)
  chex.assert_trees_all_close(slope, expected, atol=1e-6)


def penalised_minimiser(x, gamma):
  # (y - c) + gamma H (y - M x) = 0
  matrix = np.eye(2) + gamma * H
  return jnp.asarray(np.linalg.solve(matrix, C + gamma * H @ M @ x))


def test_hypergradient_distance_falls_as_the_inverse_penalty(x64):
  x = quadratic_params().upper
  exact = M.T @ (M @ x - C) + x
  distances = []
  for gamma in (10.0, 100.0, 1000.0):
    y = penalised_minimiser(x, gamma)
    found = bj.diagnostics.hypergradient_distance(
      QUADRATIC,
      bj.BilevelParams(x, y),
      penalty=gamma,
      value=jnp.asarray(M @ x),
      solve_steps=40,
    )
    # By hand: the penalised slope is x + M' (y - c).
    away = np.linalg.norm(M.T @ (y - C) + x - exact)
    np.testing.assert_allclose(found.distance, away, rtol=1e-4)
    np.testing.assert_allclose(
      found.relative, away / np.linalg.norm(exact), rtol=1e-4
    )
    distances.append(float(found.distance))
  ratios = np.array(distances[:-1]) / distances[1:]
  np.testing.assert_allclose(ratios, 10, rtol=0.15)
  np.testing.assert_allclose(found.cosine, 1, atol=1e-4)


def test_a_lagging_value_sequence_shows_in_the_distance(x64):
  x, gamma = quadratic_params().upper, 1000.0
  params = bj.BilevelParams(x, penalised_minimiser(x, gamma))
  near, far = (
    bj.diagnostics.hypergradient_distance(
      QUADRATIC, params, penalty=gamma, value=w, solve_steps=40
    ).distance
    for w in (jnp.asarray(M @ x), jnp.asarray(M @ x + 0.01))
  )
  # gamma times the difference of the slopes in x, -M' H (0.01, 0.01).
  expected = gamma * np.linalg.norm(M.T @ H @ np.full(2, 0.01))
  np.testing.assert_allclose(far, expected, rtol=0.01)
  assert near < 0.01 * far


def test_feasibility_is_the_distance_to_the_set():
  params = bj.BilevelParams(
    {'a': jnp.array([3.0, 4.0])}, jnp.array([-3.0, 0.5, -4.0])
  )
  found = bj.diagnostics.feasibility(
    params,
    upper=optax.projections.projection_l2_ball,
    lower=optax.projections.projection_non_negative,
  )
  np.testing.assert_allclose(found['upper'], 4.0, rtol=1e-6)
  np.testing.assert_allclose(found['lower'], 5.0, rtol=1e-6)


def test_feasibility_leaves_out_the_whole_space():
  params = bj.BilevelParams(jnp.ones(2), jnp.ones(2))
  assert bj.diagnostics.feasibility(params, upper=None) == {}


@pytest.mark.parametrize(
  'call',
  [
    bj.diagnostics.lower_minimiser,
    bj.diagnostics.penalty_gap,
    bj.hypergradient,
  ],
)
def test_a_lower_loss_that_is_no_scalar_is_named(call):
  problem = QUADRATIC._replace(lower=lambda x, y, batch: y)
  params = bj.BilevelParams(jnp.ones(2), jnp.ones(2))
  with pytest.raises(TypeError, match=r'the lower loss returned .*\(2,\)'):
    call(problem, params)
