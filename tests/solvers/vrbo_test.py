"""VRBO: what moves how often, and when its estimates start anew."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import INNER, Row

S = bj.Sequence


def _row(wrap, rate):
  sgd = optax.sgd(rate)
  solver = bj.solvers.vrbo(
    contract.PROBLEM,
    upper=sgd,
    lower=S(sgd, steps=INNER, batch_at=contract.inner_batch),
    terms=2,
    step_size=0.5,
    period=2,
  )
  return bj.evaluation.wrapped(solver, wrap)


# Fresh estimates are of one point, in the first move of every other update.
ROWS = (
  Row(
    'vrbo',
    _row,
    {},
    random_counts=(
      'gradients/lower',
      'gradients/upper',
      'hessian_vector_products/lower',
    ),
    parts='none',
  ),
)


def test_moves_x_once_and_y_often():
  """Without noise the estimates are exact."""
  solver = bj.solvers.vrbo(
    problems.MIXED,
    upper=optax.sgd(0.1),
    lower=S(optax.sgd(0.1), steps=4),
    terms=3,
    step_size=0.3,
    period=5,
  )
  x = problems.mixed_params().upper
  params = bj.BilevelParams(x, jnp.zeros(3))
  updates, _ = jax.jit(solver.update)(None, solver.init(params), params)
  # Y takes four plain steps, the last from where three have led, and x one at
  # that point.
  lower, y = problems.MIXED.lower, params.lower
  for _ in range(3):
    y = y - 0.1 * jax.grad(lower, 1)(x, y, None)
  end = y - 0.1 * jax.grad(lower, 1)(x, y, None)
  np.testing.assert_allclose(updates.lower, end, rtol=1e-5)
  q, right = jnp.zeros(3), 2 * (y - 1)
  for _ in range(4):  # 0.3 (I - 0.3 H)^i, i = 0, ..., 3
    q, right = q + 0.3 * right, right - 0.3 * problems.MATRIX @ right
  slope = jnp.cos(x) + problems.MIX.T @ q
  np.testing.assert_allclose(updates.upper, -0.1 * slope, rtol=1e-4, atol=1e-6)


def test_estimates_start_anew_from_the_large_batch_every_period():
  """Noise b in both slopes: differences on one batch do not see it."""
  noisy = lambda x, y, batch: (x**2 + y**2) / 2 + batch * (x + y)
  solver = bj.solvers.vrbo(
    bj.BilevelProblem(noisy, noisy),
    upper=optax.sgd(0.1),
    lower=S(optax.sgd(0.1), steps=2, batch_at=lambda b, t: b['small'][t]),
    terms=1,
    step_size=0.5,
    period=2,
    large_batch=lambda b: b['large'],
  )
  params = bj.BilevelParams(jnp.float32(1.0), jnp.float32(2.0))
  state, step = solver.init(params), jax.jit(solver.update)
  x, y, held = 1.0, 2.0, None
  for k in range(5):
    large = 0.25 * (k + 1)
    if k % 2 == 0:
      held = large
    # Each estimate is the slope at the point itself, and the noise of the last
    # fresh one.
    y_first = y - 0.1 * (y + held)
    y = y_first - 0.1 * (y_first + held)
    x = x - 0.1 * (x + held)
    batch = {'large': jnp.float32(large), 'small': jnp.array([7.0, -5.0])}
    updates, state = step(batch, state, params)
    params = bj.apply_updates(params, updates)
    np.testing.assert_allclose(params.upper, x, rtol=1e-5)
    np.testing.assert_allclose(params.lower, y, rtol=1e-5)


def test_a_period_of_none():
  sgd = {'upper': optax.sgd(0.1), 'lower': optax.sgd(0.1)}
  with pytest.raises(ValueError, match='updates in a period >= 1'):
    bj.solvers.vrbo(problems.MIXED, terms=1, step_size=0.1, period=0, **sgd)
