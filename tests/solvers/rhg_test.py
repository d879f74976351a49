"""RHG as a solver: where it starts, where it ends, what it skips."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract
from tests.contract import COORDINATES, INNER, RATE, X_SET, Y_SET, Row

S = bj.Sequence


def _row(wrap, rate, inner, solver='rhg', upper_set=None, lower=(), **given):
  at = contract.inner_batch
  record = S(optax.sgd(inner), steps=INNER, batch_at=at, **dict(lower))
  upper = S(optax.sgd(rate), set=upper_set)
  make = getattr(bj, solver)
  solver = make(contract.PROBLEM, upper=upper, lower=record, **given)
  return bj.evaluation.wrapped(solver, wrap)


_ZERO = {'start': lambda p: optax.tree.zeros_like(p.lower), 'restart': True}
_INSIDE = {
  'gradients/upper': 1,
  'gradients/lower': INNER,
  'hessian_vector_products/lower': INNER,
}

# The inner optimiser begins anew in each update, and so does its schedule.
_NUMBERS = {
  'hyper': {'rate': RATE, 'inner': RATE},
  'parts': 'none',
}

ROWS = (
  Row('rhg', _row, _INSIDE, devices=True, **_NUMBERS),
  Row(
    'rhg, forward',
    functools.partial(_row, mode='forward'),
    _INSIDE | {'hessian_vector_products/lower': INNER * COORDINATES},
    same_as='rhg',
    **_NUMBERS,
    light=True,
  ),
  Row(
    'rhg, from zero',
    functools.partial(_row, lower=_ZERO),
    _INSIDE,
    **_NUMBERS,
  ),
  Row(
    'rhg, in sets',
    functools.partial(_row, upper_set=X_SET, lower={'set': Y_SET}),
    _INSIDE | {'projections/upper': 1},
    sets={'upper': X_SET, 'lower': Y_SET},
    **_NUMBERS,
    light=True,
  ),
  Row(
    't_rhg',
    functools.partial(_row, solver='t_rhg', truncate=2),
    _INSIDE | {'hessian_vector_products/lower': 2},
    **_NUMBERS,
    light=True,
  ),
)

PROBLEM = bj.BilevelProblem(
  upper=lambda x, y, batch: ((y - 1) ** 2).sum() / 2,
  lower=lambda x, y, batch: ((y - x) ** 2).sum() / 2,
)
PARAMS = bj.BilevelParams(jnp.array([0.5, -0.5]), jnp.array([3.0, 4.0]))


def one_update(params=PARAMS, solver='rhg', lower=None, **given):
  record = lower or S(optax.sgd(0.5), steps=3)
  make = getattr(bj, solver)
  made = make(PROBLEM, upper=optax.sgd(0.1), lower=record, **given)
  updates, state = jax.jit(made.update)(None, made.init(params), params)
  return optax.apply_updates(params, updates), state


def test_the_lower_variable_moves_to_the_end_of_the_inner_loop():
  after, _ = one_update()
  end = PARAMS.upper + (PARAMS.lower - PARAMS.upper) / 8
  np.testing.assert_allclose(after.lower, end, rtol=1e-6)
  # The upper one along dy_3 / dx = 7 / 8, at the end.
  np.testing.assert_allclose(
    after.upper, PARAMS.upper - 0.1 * 7 / 8 * (end - 1), rtol=1e-6
  )


def test_a_restart_forgets_the_lower_variable():
  lower = S(optax.sgd(0.5), steps=3, start=lambda p: jnp.zeros(2), restart=True)
  after, _ = one_update(lower=lower)
  elsewhere = PARAMS._replace(lower=jnp.array([-9.0, 9.0]))
  other, _ = one_update(elsewhere, lower=lower)
  chex.assert_trees_all_close(after, other, rtol=1e-5)
  np.testing.assert_allclose(after.lower, PARAMS.upper * 7 / 8, rtol=1e-6)


def test_truncating_no_step_is_rhg():
  full, _ = one_update()
  for truncate in (3, 10):
    other, state = one_update(solver='t_rhg', truncate=truncate)
    chex.assert_trees_all_close(full, other, rtol=1e-6)
    assert bj.counts(state)['hessian_vector_products/lower'] == 3


@pytest.mark.parametrize('mode', ['reverse', 'forward'])
def test_the_inner_optimiser_begins_anew(mode):
  lower = S(optax.sgd(0.1, momentum=0.9), steps=3)
  solver = bj.rhg(PROBLEM, upper=optax.sgd(0.1), lower=lower, mode=mode)
  step = jax.jit(solver.update)
  updates, state = step(None, solver.init(PARAMS), PARAMS)
  params = optax.apply_updates(PARAMS, updates)
  updates, _ = step(None, state, params)
  afresh, _ = step(None, solver.init(params), params)
  chex.assert_trees_all_close(updates, afresh, rtol=1e-6)
