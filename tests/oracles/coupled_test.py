"""Increments of coupled sequences: signs, batches, structure, errors."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

PARAMS = bj.sequences(x=jnp.array([1.0, 2.0]), y={'w': jnp.array([3.0])})
INCREMENTS = {
  'x': lambda z, batch: batch - z.x * z.y['w'],
  'y': lambda z, batch: {'w': z.x[:1] + batch},
}


def test_gradients_are_minus_the_increments():
  oracle = bj.coupled(INCREMENTS)
  found, state = oracle.update(4.0, oracle.init(PARAMS), PARAMS)
  np.testing.assert_allclose(found.x, [-1.0, 2.0])
  np.testing.assert_allclose(found.y['w'], [-5.0])
  norms = bj.values(state)
  np.testing.assert_allclose(norms['increment/x'], np.sqrt(5), rtol=1e-6)
  np.testing.assert_allclose(norms['increment/y'], 5.0)
  assert bj.counts(state) == {'increments/x': 1, 'increments/y': 1}


def test_a_batch_for_each_sequence():
  oracle = bj.coupled(INCREMENTS, batch_of=lambda batch, name: batch[name])
  batch = {'x': 10.0, 'y': 20.0}
  found, _ = oracle.update(batch, oracle.init(PARAMS), PARAMS)
  np.testing.assert_allclose(found.x, [-7.0, -4.0])
  np.testing.assert_allclose(found.y['w'], [-21.0])


def test_a_sequence_without_an_increment_stays():
  solver = bj.stsa({'x': INCREMENTS['x']}, steps=0.5)
  updates, _ = solver.update(4.0, solver.init(PARAMS), PARAMS)
  assert updates.y is None
  np.testing.assert_allclose(updates.x, [0.5, -1.0])


def test_wrong_structure_names_the_sequence():
  oracle = bj.coupled({'y': lambda z, batch: z.x})
  with pytest.raises(ValueError, match='sequence y'):
    oracle.update(None, oracle.init(PARAMS), PARAMS)


def test_missing_sequence():
  oracle = bj.coupled({'critic': lambda z, batch: z.x})
  with pytest.raises(TypeError, match='critic'):
    oracle.update(None, oracle.init(PARAMS), PARAMS)


def test_no_increments():
  with pytest.raises(ValueError, match='at least one'):
    bj.coupled({})


def test_each_sequence_has_its_optimiser():
  steps = {'x': 0.5, 'y': optax.sgd(lambda count: 0.25)}
  solver = bj.stsa(INCREMENTS, steps=steps)
  updates, _ = solver.update(4.0, solver.init(PARAMS), PARAMS)
  np.testing.assert_allclose(updates.x, [0.5, -1.0])
  np.testing.assert_allclose(updates.y['w'], [1.25])


def test_alternating_sees_what_moved():
  follow = {'x': lambda z, b: -z.x, 'y': lambda z, b: z.x - z.y}
  params = bj.sequences(x=jnp.float32(4.0), y=jnp.float32(1.0))
  for order, expected in (('simultaneous', 4.0), ('alternating', 0.0)):
    solver = bj.stsa(follow, steps=1.0, order=order)
    updates, _ = solver.update(None, solver.init(params), params)
    np.testing.assert_allclose(params.y + updates.y, expected)


def test_wrong_arguments_of_stsa():
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
