import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj

P = jax.sharding.PartitionSpec
KINDS = (jax.sharding.AxisType.Auto,)


def loss(params, batch):
  return jnp.mean((params['z'] - batch) ** 2) / 2


PARAMS = {'z': jnp.float32(1.0), 'unused': jnp.ones(2)}


def expect_mean(slope, state, batch):
  np.testing.assert_allclose(slope['z'], 1 - batch.mean(), rtol=1e-6)
  np.testing.assert_array_equal(slope['unused'], [0.0, 0.0])
  measured = bj.values(state)['loss']
  np.testing.assert_allclose(measured, loss(PARAMS, batch), rtol=1e-6)
  assert bj.counts(state) == {'gradients/loss': 1}


@pytest.mark.parametrize('checked', [True, False])
def test_in_a_shard_map(checked):
  oracle, batch = (
    bj.evaluation.mean_over(bj.gradient(loss), 'data'),
    jnp.arange(16.0),
  )
  evaluate = jax.shard_map(
    lambda params, state, batch: oracle.update(batch, state, params),
    mesh=jax.make_mesh((8,), ('data',), axis_types=KINDS),
    in_specs=(P(), P(), P('data')),
    out_specs=(P(), P()),
    check_vma=checked,
  )
  expect_mean(*jax.jit(evaluate)(PARAMS, oracle.init(PARAMS), batch), batch)


@pytest.mark.parametrize('checked', [True, False])
def test_over_two_axes(checked):
  oracle = bj.evaluation.mean_over(bj.gradient(loss), ('hosts', 'devices'))
  batch = jnp.arange(16.0)
  evaluate = jax.shard_map(
    lambda params, state, batch: oracle.update(batch, state, params),
    mesh=jax.make_mesh((4, 2), ('hosts', 'devices'), axis_types=KINDS * 2),
    in_specs=(P(), P(), P(('hosts', 'devices'))),
    out_specs=(P(), P()),
    check_vma=checked,
  )
  expect_mean(*jax.jit(evaluate)(PARAMS, oracle.init(PARAMS), batch), batch)


def test_over_one_of_two_axes():
  # Seeds over one axis, examples over the other: parameters differ by seed.
  oracle = bj.evaluation.mean_over(
    bj.gradient(lambda z, b: jnp.mean(z * b)), 'data'
  )
  update = lambda z, b: oracle.update(b, oracle.init(z), z)[0]
  slope = jax.shard_map(
    update,
    mesh=jax.make_mesh((2, 4), ('seeds', 'data'), axis_types=KINDS * 2),
    in_specs=(P('seeds'), P('data')),
    out_specs=P('seeds'),
  )(jnp.ones(2), jnp.arange(8.0))
  np.testing.assert_allclose(slope, [3.5, 3.5])


def test_in_a_vmap():
  oracle, batch = (
    bj.evaluation.mean_over(bj.gradient(loss), 'data'),
    jnp.arange(16.0),
  )
  evaluate = jax.vmap(
    lambda b: oracle.update(b, oracle.init(PARAMS), PARAMS),
    axis_name='data',
    out_axes=None,
  )
  expect_mean(*evaluate(batch.reshape(4, 4)), batch)


def test_an_axis_that_is_not_mapped_is_named():
  oracle = bj.evaluation.mean_over(bj.gradient(loss), 'nowhere')
  with pytest.raises(NameError, match='nowhere'):
    oracle.update(jnp.ones(2), oracle.init(PARAMS), PARAMS)
