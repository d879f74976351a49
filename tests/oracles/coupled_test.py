"""Increments of coupled sequences: signs, batches, structure, errors."""

import jax.numpy as jnp
import numpy as np
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


def test_an_increment_of_nothing_is_said():
  oracle = bj.coupled({'a': lambda z, batch: None})
  params = bj.sequences(a=jnp.float32(1.0))
  with pytest.raises(ValueError, match='the increment of a is None'):
    oracle.update(None, oracle.init(params), params)
