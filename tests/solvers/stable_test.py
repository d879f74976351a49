"""STABLE: the lower variable follows the upper one by second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import RATE, Row


def _row(wrap, rate, decay):
  solver = bj.solvers.stable(
    contract.PROBLEM,
    upper=optax.sgd(rate),
    lower=optax.sgd(rate),
    decay=decay,
    least_curvature=0.1,
  )
  return bj.evaluation.wrapped(solver, wrap)


ROWS = (
  Row(
    'stable',
    _row,
    {'gradients/lower': 1, 'gradients/upper': 1, 'hessians/lower': 2},
    hyper={'rate': RATE, 'decay': 0.4},
  ),
)


def stable(upper, decay=0.5, least_curvature=0.1, problem=problems.MIXED):
  return bj.solvers.stable(
    problem,
    upper=optax.sgd(upper),
    lower=optax.sgd(0.0),
    decay=decay,
    least_curvature=least_curvature,
  )


def test_keeps_y_at_the_minimiser_while_x_moves():
  # No lower step at all: what moves y is the correction alone.
  solver = stable(0.1)
  params = problems.mixed_params()
  state, step = solver.init(params), jax.jit(solver.update)
  for _ in range(3):
    expected = -0.1 * problems.mixed_hypergradient(params.upper)
    updates, state = step(None, state, params)
    np.testing.assert_allclose(updates.upper, expected, rtol=1e-4, atol=1e-5)
    params = bj.apply_updates(params, updates)
    np.testing.assert_allclose(
      params.lower,
      problems.mixed_minimiser(params.upper),
      rtol=1e-4,
      atol=1e-5,
    )


def test_raises_small_curvatures():
  flat = lambda x, y, batch: 0.01 * jnp.vdot(y, y) / 2 - jnp.vdot(x, y)
  problem = bj.BilevelProblem(lambda x, y, batch: jnp.sum(y), flat)
  solver = stable(1.0, 1.0, 0.5, problem)
  params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
  updates, _ = jax.jit(solver.update)(None, solver.init(params), params)
  np.testing.assert_allclose(updates.upper, -2.0, rtol=1e-5)  # Not -100.


def test_a_least_curvature_of_zero():
  with pytest.raises(ValueError, match='least_curvature'):
    stable(0.1, least_curvature=0.0)


@pytest.mark.parametrize(
  ('record', 'said'),
  [
    ({'steps': 2}, 'one step of each sequence'),
    ({'batch_at': lambda batch, t: batch}, 'one step of each sequence'),
    ({'set': jnp.abs}, 'takes no lower set'),
  ],
)
def test_refuses_what_its_lower_step_cannot_keep(record, said):
  sgd = optax.sgd(0.1)
  square = lambda x, y, batch: (x - y) ** 2
  with pytest.raises(ValueError, match=said):
    bj.solvers.stable(
      bj.BilevelProblem(square, square),
      decay=0.1,
      least_curvature=0.1,
      upper=sgd,
      lower=bj.Sequence(sgd, **record),
    )
