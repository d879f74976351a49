"""BOME: the nested problem's own solution, behind a barrier on the gap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import INNER, PROBLEM, RATE, Row

S = bj.Sequence


def _row(wrap, eta, rate):
  sgd = optax.sgd(rate)
  value = S(sgd, steps=INNER, batch_at=contract.inner_batch)
  solver = bj.bome(PROBLEM, eta=eta, upper=sgd, lower=sgd, value=value)
  return bj.evaluation.wrapped(solver, wrap)


ROWS = (
  Row(
    'bome',
    _row,
    {'gradients/upper': 1, 'gradients/lower': 2 + INNER},
    hyper={'eta': 1.0, 'rate': RATE},
    # The multiplier divides by a squared norm, but of averaged rows.
    parts='exact',
  ),
)


def falling(rate):
  slower = optax.scale_by_schedule(lambda k: 1 / (1 + k / 40))
  return optax.chain(optax.sgd(rate), slower)


def bome(steps):
  return bj.bome(
    problems.QUADRATIC,
    upper=falling(0.3),
    lower=falling(0.3),
    value=S(optax.sgd(0.5), steps=steps),
    eta=1.0,
  )


def error(steps, updates):
  params, _ = problems.solve(bome(steps), updates)
  return np.abs(params.upper - problems.SOLUTION).max()


def test_bome_solves_the_nested_problem_but_for_its_inner_loop(x64):
  assert error(40, 20_000) < 1e-3
  short, long = error(3, 5_000), error(9, 5_000)
  assert long < 0.3 * short
  # The bias falls as the slowest coordinate of the inner loop does.
  slowest = (1 - 0.5 * problems.CURVATURE.min()) ** 6
  assert long > 0.5 * slowest * short


def test_successive_updates_from_one_start_are_equal():
  """Neither the value sequence nor its momentum goes on."""
  value = S(optax.sgd(0.2, momentum=0.9), steps=3)
  solver = bj.bome(
    problems.QUADRATIC, upper=optax.sgd(0.1), lower=optax.sgd(0.1), value=value
  )
  params = problems.start(jnp.float32)
  state, step = solver.init(params), jax.jit(solver.update)
  ends = []
  for _ in range(3):
    updates, state = step(None, state, params)
    ends.append((updates, bj.auxiliaries(state)['value']))
  for later in ends[1:]:
    jax.tree.map(np.testing.assert_array_equal, ends[0], later)
  y, moment = np.asarray(params.lower), 0.0
  for _ in range(3):
    moment = 0.9 * moment + problems.lower_slope(params.upper, y)
    y = y - 0.2 * moment
  np.testing.assert_allclose(ends[0][1], y, rtol=1e-5)


def test_leaves_without_entries_change_nothing():
  sgd, batch = optax.sgd(0.1), contract.random_batch(0)
  found = []
  for more in ({}, {'empty': jnp.zeros((0, 3))}):
    params = jax.tree.map(jnp.asarray, contract.nested_params(0))
    params = bj.BilevelParams(*(z | more for z in params))
    solver = bj.bome(
      PROBLEM, upper=sgd, lower=sgd, value=S(sgd, batch_at=contract.inner_batch)
    )
    step = jax.jit(solver.update)
    updates, _ = step(batch, solver.init(params), params)
    found.append((updates.upper['a'], updates.lower['b']))
  jax.tree.map(np.testing.assert_array_equal, *found)
