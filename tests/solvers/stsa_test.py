"""STSA: which sequences move, by what, in which order; falling steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, rounding
from tests.contract import X_SET, Row

S = bj.Sequence


def _increments():
  """Minus the slope of each variable's own loss."""
  above = jax.grad(contract.upper_loss)
  below = jax.grad(contract.lower_loss, 1, has_aux=True)
  minus = lambda tree: optax.tree.scale(-1, tree)
  return {
    'upper': lambda p, batch: minus(above(p.upper, p.lower, batch)),
    'lower': lambda p, batch: minus(below(p.upper, p.lower, batch)[0]),
  }


def _row(wrap, rate, upper_set=None, **given):
  steps = {
    'upper': S(optax.sgd(rate), set=upper_set),
    'lower': optax.sgd(rate),
  }
  solver = bj.stsa(_increments(), steps=steps, **given)
  return bj.evaluation.wrapped(solver, wrap)


def _one_step_size(wrap, rate):
  solver = bj.stsa(_increments(), steps=rate)
  return bj.evaluation.wrapped(solver, wrap)


def _bare(wrap, rate):
  oracle = wrap(bj.coupled(_increments()))
  return contract.by_descent(oracle, upper=rate, lower=rate)


_COST = {'increments/upper': 1, 'increments/lower': 1}

# Its values are norms of increments, no means over samples.
ROWS = (
  Row('stsa', _one_step_size, _COST, parts='gradients', devices=True),
  Row(
    'stsa, alternating, in a set',
    functools.partial(_row, order='alternating', upper_set=X_SET),
    _COST | {'projections/upper': 1},
    sets={'upper': X_SET},
    parts='gradients',
    light=True,
  ),
  Row('coupled', _bare, _COST, same_as='stsa', parts='gradients', light=True),
)

PARAMS = bj.sequences(x=jnp.array([1.0, 2.0]), y={'w': jnp.array([3.0])})
INCREMENTS = {
  'x': lambda z, batch: batch - z.x * z.y['w'],
  'y': lambda z, batch: {'w': z.x[:1] + batch},
}


def one_update(solver, params=PARAMS, batch=4.0):
  return solver.update(batch, solver.init(params), params)[0]


def test_a_sequence_without_an_increment_stays():
  updates = one_update(bj.stsa({'x': INCREMENTS['x']}, steps=0.5))
  assert updates.y is None
  np.testing.assert_allclose(updates.x, [0.5, -1.0])


def test_each_sequence_has_its_step_optimiser_or_record():
  for other in (0.25, optax.sgd(lambda count: 0.25), S(optax.sgd(0.25))):
    updates = one_update(bj.stsa(INCREMENTS, steps={'x': 0.5, 'y': other}))
    np.testing.assert_allclose(updates.x, [0.5, -1.0])
    np.testing.assert_allclose(updates.y['w'], [1.25])
  inside = S(optax.sgd(0.25), set=lambda y: {'w': jnp.minimum(y['w'], 3.5)})
  updates = one_update(bj.stsa(INCREMENTS, steps={'x': 0.5, 'y': inside}))
  np.testing.assert_allclose(updates.y['w'], [0.5])


def test_alternating_sees_what_moved():
  follow = {'x': lambda z, b: -z.x, 'y': lambda z, b: z.x - z.y}
  params = bj.sequences(x=jnp.float32(4.0), y=jnp.float32(1.0))
  for order, expected in (('simultaneous', 4.0), ('alternating', 0.0)):
    updates = one_update(bj.stsa(follow, steps=1.0, order=order), params)
    np.testing.assert_allclose(params.y + updates.y, expected)


def test_wrong_arguments():
  with pytest.raises(ValueError, match='alternating'):
    bj.stsa(INCREMENTS, steps=0.1, order='random')
  with pytest.raises(ValueError, match=r"\['x', 'y'\], got them for \['x'\]"):
    bj.stsa(INCREMENTS, steps={'x': 0.1})


def test_power_schedule():
  schedule = bj.solvers.power_schedule(2.0, 0.5, 4.0)
  np.testing.assert_allclose(schedule(0), 1.0)
  np.testing.assert_allclose(schedule(jnp.int32(12)), 0.5)
  for wrong in ((0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, 0.0)):
    with pytest.raises(ValueError, match='power_schedule takes'):
      bj.solvers.power_schedule(*wrong)


def test_power_schedule_is_as_wide_as_floats_are(x64):
  schedule = bj.solvers.power_schedule(2.0, 0.5, 4.0)
  assert schedule(jnp.int32(12)).dtype == jnp.float64
  # A logarithm, an exponential and the operations around them on each side; the
  # functions of libraries are right to a few roundings.
  room = rounding.tolerance(np.float64, 24)
  np.testing.assert_allclose(schedule(3), 2 / np.sqrt(7), rtol=room)
