"""F2SA in one loop and in two: where it ends, and what a penalty does to it."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import INNER, PENALISED, PROBLEM, X_SET, Y_SET, Row

S = bj.Sequence


def _row(wrap, penalty, rate, **lower):
  sgd = optax.sgd(rate)
  upper = S(sgd, set=X_SET if 'set' in lower else None)
  solver = bj.f2sa(PROBLEM, penalty=penalty, upper=upper, lower=S(sgd, **lower))
  return bj.evaluation.wrapped(solver, wrap)


def _two_loops(wrap, penalty, rate):
  at = contract.inner_batch
  return _row(wrap, penalty, rate, steps=INNER, batch_at=at)


def _in_sets(wrap, penalty, rate):
  return _row(wrap, penalty, rate, steps=INNER, set=Y_SET)


_LOOPS = {'gradients/upper': 1 + INNER, 'gradients/lower': 2 * (1 + INNER)}

ROWS = (
  Row(
    'f2sa, one loop',
    _row,
    {'gradients/upper': 1, 'gradients/lower': 2},
    hyper=PENALISED,
  ),
  Row('f2sa, two loops', _two_loops, _LOOPS, hyper=PENALISED, devices=True),
  Row(
    'f2sa, two loops in sets',
    _in_sets,
    _LOOPS
    | {
      'projections/upper': 1,
      'projections/lower': INNER,
      'projections/value': INNER,
    },
    hyper=PENALISED,
    sets={'upper': X_SET, 'lower': Y_SET, 'value': Y_SET},
    light=True,
  ),
)


def f2sa(penalty, steps):
  # In one loop, the step of x is rescaled as well.
  return bj.f2sa(
    problems.QUADRATIC,
    penalty=penalty,
    upper=optax.sgd(0.5),
    lower=S(optax.sgd(0.7), steps=steps),
  )


def error(solver, updates):
  params, _ = problems.solve(solver, updates)
  return np.linalg.norm(params.upper - problems.SOLUTION)


@pytest.mark.parametrize('steps', [10, 1])
def test_solves_the_nested_problem(x64, steps):
  one_loop = steps == 1
  ramp = optax.linear_schedule(1.0, 2000.0, 10_000 if one_loop else 500)
  assert error(f2sa(ramp, steps), 40_000 if one_loop else 1_000) < 1e-3


def test_is_biased_as_the_inverse_of_its_penalty(x64):
  biases = [error(f2sa(penalty, 10), 500) for penalty in (50.0, 100.0)]
  np.testing.assert_allclose(biases[0] / biases[1], 2, rtol=0.05)


def test_the_value_sequence_is_in_the_loop_of_the_lower_variable():
  solver = bj.f2sa(
    problems.QUADRATIC,
    penalty=1.0,
    upper=optax.sgd(0.0),
    lower=S(optax.sgd(0.0), steps=4),
    value=optax.sgd(0.2),
  )
  params = problems.start(jnp.float32)
  _, state = solver.update(None, solver.init(params), params)
  y = np.asarray(params.lower)
  for _ in range(4):
    y = y - 0.2 * problems.lower_slope(params.upper, y)
  np.testing.assert_allclose(bj.auxiliaries(state)['value'], y, rtol=1e-5)
