"""Independent samples: the rows of each part of a batch."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj


def losses(params, batch):
  return jnp.stack([batch.mean() * params.a, params.a**2 + params.b])


def test_rows_are_stacked_by_sample_and_the_rest_is_a_mean():
  params = bj.sequences(a=jnp.float32(2.0), b=jnp.float32(0.0))
  oracle = bj.evaluation.independent(
    bj.multi_objective(losses, 2, rest=('b',)), 2
  )
  batch = jnp.array([1.0, 10.0, 3.0, 20.0])
  jacobian, state = oracle.update(batch, oracle.init(params), params)
  np.testing.assert_allclose(jacobian.rows.a, [2.0, 4.0, 15.0, 4.0])
  np.testing.assert_allclose(jacobian.values, [4.0, 4.0, 30.0, 4.0])
  np.testing.assert_allclose(jacobian.rest['b'], 1.0)
  np.testing.assert_allclose(bj.values(state)['objective_0'], 17.0)
  assert bj.counts(state) == {'gradients/objectives': 4}


def test_modo_multiplies_two_different_jacobians():
  """Opposite noise in the two samples makes the cross-product negative."""
  noise = lambda x, batch: jnp.stack([batch.mean() * x[0], 0.1 * x[1]])
  oracle = bj.evaluation.independent(bj.multi_objective(noise, 2), 2)
  solver = optax.chain(
    oracle, bj.aggregators.modo(2, weight_step=0.5, samples=2)
  )
  params = jnp.zeros(2)
  _, state = solver.update(jnp.array([1.0, -1.0]), solver.init(params), params)
  # J1 J2^T has the diagonal (-1, 0.01); the square of either has (1, 0.01).
  np.testing.assert_allclose(
    state[1].weights, [0.5 + 0.12625, 0.5 - 0.12625], atol=1e-6
  )


def test_the_direction_comes_from_the_third_sample():
  rows = jnp.concatenate([jnp.eye(2), jnp.eye(2), 5 * jnp.eye(2)])
  for link in (bj.aggregators.modo(2), bj.aggregators.sdmgrad(2)):
    direction, _ = link.update(bj.Jacobian(rows), link.init(jnp.zeros(2)))
    np.testing.assert_allclose(direction, [2.5, 2.5], rtol=1e-6)


def test_custom_split():
  stacked = bj.evaluation.independent(
    bj.multi_objective(lambda x, b: jnp.stack([b * x]), 1),
    2,
    split=lambda batch, n: batch,
  )
  params = jnp.float32(1.0)
  jacobian, _ = stacked.update(
    jnp.array([3.0, 7.0]), stacked.init(params), params
  )
  np.testing.assert_allclose(jacobian.rows, [3.0, 7.0])


def test_errors():
  with pytest.raises(ValueError, match='samples >= 1'):
    bj.evaluation.independent(bj.gradient(lambda x, b: x), 0)
  params = jnp.float32(1.0)
  plain = bj.evaluation.independent(bj.gradient(lambda x, b: x * b.mean()), 2)
  with pytest.raises(TypeError, match='an oracle that returns rows'):
    plain.update(jnp.ones(2), plain.init(params), params)
  with pytest.raises(ValueError, match=r'shape \(3,\)'):
    plain.update(jnp.ones(3), plain.init(params), params)
