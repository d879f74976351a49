"""RHG as a solver: where it starts, where it ends, what it skips."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

PROBLEM = bj.BilevelProblem(
  upper=lambda x, y, batch: ((y - 1) ** 2).sum() / 2,
  lower=lambda x, y, batch: ((y - x) ** 2).sum() / 2,
)
PARAMS = bj.BilevelParams(jnp.array([0.5, -0.5]), jnp.array([3.0, 4.0]))
SETTINGS = {
  'upper': optax.sgd(0.1),
  'lower': optax.sgd(0.5),
  'inner_steps': 3,
}


def one_update(solver, params=PARAMS):
  updates, state = jax.jit(solver.update)(None, solver.init(params), params)
  return optax.apply_updates(params, updates), state


def test_the_lower_variable_moves_to_the_end_of_the_inner_loop():
  after, _ = one_update(bj.rhg(PROBLEM, **SETTINGS))
  end = PARAMS.upper + (PARAMS.lower - PARAMS.upper) / 8
  np.testing.assert_allclose(after.lower, end, rtol=1e-6)
  # The upper one along dy_3 / dx = 7 / 8, at the end.
  np.testing.assert_allclose(
    after.upper, PARAMS.upper - 0.1 * 7 / 8 * (end - 1), rtol=1e-6
  )


def test_reset_forgets_the_lower_variable():
  solver = bj.rhg(PROBLEM, reset=lambda params, batch: jnp.zeros(2), **SETTINGS)
  after, _ = one_update(solver)
  other, _ = one_update(solver, PARAMS._replace(lower=jnp.array([-9.0, 9.0])))
  chex.assert_trees_all_close(after, other, rtol=1e-5)
  np.testing.assert_allclose(after.lower, PARAMS.upper * 7 / 8, rtol=1e-6)


@pytest.mark.parametrize('truncate', [3, 10])
def test_truncating_no_step_is_rhg(truncate):
  full, _ = one_update(bj.rhg(PROBLEM, **SETTINGS))
  other, state = one_update(bj.t_rhg(PROBLEM, truncate=truncate, **SETTINGS))
  chex.assert_trees_all_close(full, other, rtol=1e-6)
  assert bj.counts(state)['hessian_vector_products/lower'] == 3


def test_the_inner_optimiser_begins_anew():
  momentum = SETTINGS | {'lower': optax.sgd(0.1, momentum=0.9)}
  solver = bj.rhg(PROBLEM, **momentum)
  params, state = one_update(solver)
  updates, _ = solver.update(None, state, params)
  afresh, _ = solver.update(None, solver.init(params), params)
  chex.assert_trees_all_close(updates, afresh, rtol=1e-6)
