"""Prox-linear steps: the subproblem, and exactness from a finite penalty on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems, rounding
from tests.contract import RATE, X_SET, Row
from tests.references import problem


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


def test_the_dual_on_the_sphere_is_right_in_float32():
  """There, the ascent is almost normal to a step."""
  penalty = 0.5
  solver = bj.solvers.prox_linear_pbgd(
    contract.PROBLEM, penalty=penalty, step=RATE
  )

  def run(dtype, scale):
    def cast(leaf):
      floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
      return jnp.asarray(scale * leaf, dtype) if floating else jnp.asarray(leaf)

    params = jax.tree.map(cast, contract.nested_params(1))
    state, update = solver.init(params), jax.jit(solver.update)
    for t in range(2):
      batch = jax.tree.map(cast, contract.random_batch(t))
      moves, state = update(batch, state, params)
      params = bj.apply_updates(params, moves)
    dual = state.oracles[0].inner.dual
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(dual)])

  atol = rounding.tolerance(jnp.float32, 50)
  # Each scale rounds all numbers differently.
  for scale in 1 + 3 * 2.0**-23 * np.arange(8):
    single = run(jnp.float32, scale)
    with jax.enable_x64(True):
      double = run(jnp.float64, scale)
    assert np.linalg.norm(double) == pytest.approx(penalty)
    np.testing.assert_allclose(single, double, rtol=0, atol=atol)


def test_rounding_does_not_move_a_dual_that_is_not_unique():
  """The lower Hessian has rank one: the dual stays in its range."""
  line = np.array([0.8, -0.6])  # Of the singular batches.
  dense = bj.BilevelProblem(problem.upper, problem.lower)
  solver = bj.solvers.prox_linear_pbgd(
    dense, penalty=2.0, step=0.3, iterations=200
  )
  x = np.concatenate(list(problem.UPPER.values()))

  @jax.jit
  @jax.vmap
  def run(scale, batches):
    start = bj.BilevelParams(jnp.float32(scale * x), scale * problem.LOWER)
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start)

    def step(carry, batch):
      params, state = carry
      moves, state = solver.update(batch, state, params)
      duals = state.oracles[0].inner.dual
      return (bj.apply_updates(params, moves), state), duals

    return jax.lax.scan(step, (start, solver.init(start)), batches)[1]

  drawn = [problem.batches(singular=True, seed=seed) for seed in range(64)]
  stack = lambda *rows: np.stack(rows).astype(np.float32)
  batches = [jax.tree.map(stack, *batch) for batch in drawn]
  scales = jnp.float32(1 + 3 * 2.0**-23 * np.arange(len(batches)))
  duals = np.asarray(run(scales, jax.tree.map(stack, *batches)), np.float64)
  assert np.linalg.norm(duals, axis=-1).max() > 0.1
  off = np.abs(duals @ [0.6, 0.8])
  assert off.max() < rounding.tolerance(jnp.float32, 100), np.sort(
    off, axis=None
  )[-5:]
  assert np.abs(duals @ line).max() < 2.0


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
