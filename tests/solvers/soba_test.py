"""SOBA, MA-SOBA and SABA: by hand, and what their memories do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import X_SET, Y_SET, Row

S = bj.Sequence


def _row(wrap, rate, solver='soba', upper_set=None, linear=None, **given):
  sgd = optax.sgd(rate)
  if linear is not None:
    linear = S(sgd, set=linear)
  solver = getattr(bj.solvers, solver)(
    contract.PROBLEM,
    upper=S(sgd, set=upper_set),
    lower=sgd,
    linear=linear,
    **given,
  )
  return bj.evaluation.wrapped(solver, wrap)


_COST = {
  'gradients/upper': 1,
  'gradients/lower': 1,
  'hessian_vector_products/lower': 1,
}

ROWS = (
  Row('soba', _row, _COST, devices=True),
  Row(
    'soba, in sets',
    functools.partial(_row, upper_set=X_SET, linear=Y_SET),
    _COST | {'projections/upper': 1, 'projections/linear': 1},
    sets={'upper': X_SET, 'linear': Y_SET},
    light=True,
  ),
  Row(
    'ma_soba', functools.partial(_row, solver='ma_soba', averaging=0.5), _COST
  ),
  Row(
    'saba', functools.partial(_row, solver='saba', parts=3), _COST, devices=True
  ),
  Row(
    'saba, a table for each loss',
    functools.partial(_row, solver='saba', parts=(2, 3)),
    _COST,
  ),
)


def test_the_mean_of_ma_soba_is_of_the_upper_direction_alone():
  """Constant directions: the mean is short of them by (1 - a)^k."""
  slope = bj.BilevelProblem(
    upper=lambda x, y, batch: 3 * x, lower=lambda x, y, batch: y**2 / 2
  )
  solver = bj.solvers.ma_soba(
    slope, averaging=0.25, upper=optax.sgd(1.0), lower=optax.sgd(0.5)
  )
  params = bj.BilevelParams(jnp.float32(0.0), jnp.float32(8.0))
  state = solver.init(params)
  for k in range(1, 4):
    updates, state = solver.update(None, state, params)
    np.testing.assert_allclose(updates.upper, -3 * (1 - 0.75**k), rtol=1e-6)
    np.testing.assert_allclose(updates.lower, -0.5 * params.lower, rtol=1e-6)
    params = bj.apply_updates(params, updates)


def test_errors():
  sgd = {'upper': optax.sgd(0.1), 'lower': optax.sgd(0.1)}
  for averaging in (0.0, 2.0):
    with pytest.raises(ValueError, match=r'averaging is in \(0, 1\]'):
      bj.solvers.ma_soba(problems.QUADRATIC, averaging=averaging, **sgd)
  with pytest.raises(ValueError, match='parts >= 1'):
    bj.saba(problems.QUADRATIC, parts=0, **sgd)


def test_solves_the_nested_problem(x64):
  for solver, more in (
    (bj.soba, {}),
    (bj.solvers.ma_soba, {'averaging': 0.5}),
    (bj.saba, {'parts': 2}),
  ):
    made = solver(
      problems.QUADRATIC, upper=optax.sgd(0.1), lower=optax.sgd(0.3), **more
    )
    params, _ = problems.solve(made, 2_000)
    np.testing.assert_allclose(params.upper, problems.SOLUTION, atol=1e-9)
    minimiser = problems.lower_minimiser(problems.SOLUTION)
    np.testing.assert_allclose(params.lower, minimiser, atol=1e-9)


def test_saba_is_exact_on_noisy_parts_where_soba_is_not(x64):
  """Two batches whose noise has the mean zero, constant steps."""

  def noisy(loss):
    return lambda x, y, batch: loss(x, y, None) + batch * (x + 2 * y).sum()

  problem = bj.BilevelProblem(*map(noisy, problems.QUADRATIC[:2]))
  ends = {}
  for name, solver in {
    'soba': bj.soba(problem, upper=optax.sgd(0.1), lower=optax.sgd(0.3)),
    'saba': bj.saba(
      problem, parts=2, upper=optax.sgd(0.1), lower=optax.sgd(0.3)
    ),
  }.items():
    params = problems.start()

    def body(k, carry, solver=solver):
      params, state = carry
      batch = 1.0 - 2.0 * (k % 2)
      updates, state = solver.update(batch, state, params)
      return bj.apply_updates(params, updates), state

    run = jax.jit(lambda c, body=body: jax.lax.fori_loop(0, 2_000, body, c))
    params, _ = run((params, solver.init(params)))
    ends[name] = np.abs(params.upper - problems.SOLUTION).max()
  assert ends['saba'] < 1e-9
  assert ends['soba'] > 1e-2
