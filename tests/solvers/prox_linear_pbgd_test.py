"""Prox-linear steps: the subproblem, and exactness from a finite penalty on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import RATE, X_SET, Row


def _row(wrap, penalty, rate, **given):
  del wrap
  return bj.solvers.prox_linear_pbgd(
    contract.PROBLEM, penalty=penalty, step=rate, **given
  )


def _bare(wrap, penalty, rate):
  del wrap
  oracle = bj.prox_linear(contract.PROBLEM, penalty=penalty, step=rate)
  return contract.by_descent(oracle, upper=rate, lower=rate)


_COST = {
  'gradients/upper': 1,
  'gradients/lower': 1,
  'hessian_vector_products/lower': 23,
}
_EXACT = {'hyper': {'penalty': 0.5, 'rate': RATE}, 'wraps': False}

ROWS = (
  Row('prox_linear_pbgd', _row, _COST, devices=True, **_EXACT),
  Row(
    'prox_linear_pbgd, in a set',
    functools.partial(_row, upper_set=X_SET),
    # Once an iteration, once for the step, once for its rounding.
    _COST | {'projections/upper': 12},
    sets={'upper': X_SET},
    light=True,
    **_EXACT,
  ),
  Row(
    'prox_linear',
    _bare,
    _COST,
    same_as='prox_linear_pbgd',
    light=True,
    **_EXACT,
  ),
)

H = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.4]])
B = np.array([[1.0, -0.5], [0.3, 0.8], [-0.7, 0.2]])
TARGET = np.array([1.0, 2.0, 3.0])
PROBLEM = bj.BilevelProblem(
  upper=lambda x, y, batch: ((y - TARGET) ** 2).sum() / 2 + (x**2).sum() / 2,
  lower=lambda x, y, batch: y @ H @ y / 2 - y @ B @ x,
)
J = np.hstack([-B, H])  # Of the lower slope, in (x, y).
# On y = M x: the solution, and the multiplier of the slope.
M = np.linalg.solve(H, B)
X = np.linalg.solve(np.eye(2) + M.T @ M, M.T @ TARGET)
MULTIPLIER = np.linalg.solve(H, TARGET - M @ X)


def zero():
  return bj.BilevelParams(jnp.zeros(2), jnp.zeros(3))


def run(penalty, steps=400, **kwargs):
  with jax.enable_x64(True):
    solver = bj.solvers.prox_linear_pbgd(
      PROBLEM, penalty=penalty, step=0.9, **kwargs
    )
    params, state = problems.solve(solver, steps, zero())
    return jax.tree.map(np.asarray, (params, bj.values(state)))


@pytest.mark.parametrize('factor', [1.1, 30.0])
def test_a_finite_penalty_is_exact(factor):
  size = np.linalg.norm(MULTIPLIER)
  params, values = run(factor * size)
  assert np.linalg.norm(J @ np.concatenate(params)) < 1e-9
  np.testing.assert_allclose(params.upper, X, atol=1e-8)
  np.testing.assert_allclose(values['multiplier'], size, rtol=1e-6)
  assert values['multiplier'] < factor * size


def test_a_penalty_below_the_multiplier_is_not_and_says_so():
  size = np.linalg.norm(MULTIPLIER)
  params, values = run(0.5 * size)
  assert np.linalg.norm(J @ np.concatenate(params)) > 1e-2
  np.testing.assert_allclose(values['multiplier'], 0.5 * size, rtol=1e-6)


def test_the_squared_penalty_is_not_exact():
  solver = bj.g_pbgd(
    PROBLEM, penalty=30.0, upper=optax.sgd(0.1), lower=optax.sgd(0.1)
  )
  params, _ = problems.solve(solver, 5_000, zero())
  assert np.linalg.norm(J @ np.concatenate(params)) > 1e-2


def subproblem(z, penalty, step, d):
  f = np.concatenate([z[:2], z[2:] - TARGET])
  slope = np.linalg.norm(J @ (z + d))
  return f @ d + penalty * slope + d @ d / (2 * step)


@pytest.mark.parametrize('penalty', [0.0, 0.3, 2.0, 100.0])
def test_solves_its_subproblem(penalty):
  """No step nearby, in any direction, is better."""
  rng = np.random.default_rng(0)
  z = rng.normal(size=5)
  with jax.enable_x64(True):
    oracle = bj.prox_linear(PROBLEM, penalty=penalty, step=0.4, iterations=200)
    params = bj.BilevelParams(jnp.asarray(z[:2]), jnp.asarray(z[2:]))
    gradients, _ = jax.jit(oracle.update)(None, oracle.init(params), params)
  d = -0.4 * np.concatenate(gradients)
  best = subproblem(z, penalty, 0.4, d)
  for size in (1e-1, 1e-2, 1e-3):
    for other in rng.normal(size=(200, 5)):
      value = subproblem(z, penalty, 0.4, d + size * other)
      assert value > best - 1e-9, (size, value - best)


def test_a_set_is_part_of_the_subproblem():
  """Projecting afterwards would leave the constraint of the slope."""
  most = 0.5 * X.max()
  set_ = functools.partial(
    optax.projections.projection_box, lower=-9.0, upper=most
  )
  params, _ = run(50.0, steps=1000, upper_set=set_)
  assert params.upper.max() <= most + 1e-12
  assert np.linalg.norm(J @ np.concatenate(params)) < 1e-7
  i = int(np.argmax(X))
  assert abs(params.upper[i] - most) < 1e-9
  # The other coordinate is at its minimum on y = M x.
  slope = params.upper + M.T @ (M @ params.upper - TARGET)
  assert abs(slope[1 - i]) < 1e-6


def test_counts_products():
  solver = bj.solvers.prox_linear_pbgd(
    PROBLEM, penalty=1.0, step=0.1, iterations=4
  )
  params = zero()
  _, state = jax.jit(solver.update)(None, solver.init(params), params)
  assert bj.counts(state) == {
    'gradients/upper': 1,
    'gradients/lower': 1,
    'hessian_vector_products/lower': 11,
  }


def test_errors():
  with pytest.raises(ValueError, match='iterations >= 1'):
    bj.prox_linear(PROBLEM, penalty=1.0, step=0.1, iterations=0)
  with pytest.raises(ValueError, match='the step is a weight'):
    bj.prox_linear(PROBLEM, penalty=1.0, step=-0.1)
