"""Recursive estimates against the recursion written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj

PERIOD, UPDATES = 3, 8
# Coupled and not quadratic.
MIX = np.random.default_rng(0).normal(size=(3, 3))


def loss(params, batch):
  mixed = jnp.sin(jnp.asarray(MIX, params['a'].dtype) @ params['a'])
  return jnp.mean((mixed - batch) ** 2) + jnp.sum(params['a'] ** 4) / 4


def slope(a, batch):
  angle = MIX @ a
  pull = 2 * (np.sin(angle) - batch).mean(0) * np.cos(angle) / 3
  return MIX.T @ pull + a**3


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
def test_equals_the_recursion_by_hand(dtype):
  rng = np.random.default_rng(1)
  batches = rng.normal(size=(UPDATES, 4, 3))
  points = rng.normal(size=(UPDATES, 3))
  with jax.enable_x64(dtype == jnp.float64):
    oracle = bj.evaluation.recursive(
      bj.gradient(loss), PERIOD, small_batch=lambda batch: batch[:2]
    )
    update = jax.jit(oracle.update)
    state = oracle.init({'a': jnp.zeros(3, dtype)})
    estimate, spent = None, 0
    for k, (batch, point) in enumerate(zip(batches, points)):
      if k % PERIOD == 0:
        estimate, spent = slope(point, batch), spent + 1
      else:
        change = slope(point, batch[:2]) - slope(points[k - 1], batch[:2])
        estimate, spent = estimate + change, spent + 2
      actual, state = update(
        jnp.asarray(batch, dtype), state, {'a': jnp.asarray(point, dtype)}
      )
      assert actual['a'].dtype == dtype
      room = {'float32': 1e-5, 'float64': 1e-13}[jnp.dtype(dtype).name]
      np.testing.assert_allclose(actual['a'], estimate, rtol=room, atol=room)
    assert bj.counts(state) == {'gradients/loss': spent}


def test_unmoved_sequences_are_none_and_rows_follow_like():
  """None for sequences that the oracle does not move; a Jacobian by `like`."""
  params = bj.sequences(a=jnp.ones(2), b=jnp.ones(3))
  one = bj.gradient(lambda p, batch: p.a @ p.a + batch * p.b.sum(), of='a')
  oracle = bj.evaluation.recursive(one, 2)
  state = oracle.init(params)
  for _ in range(3):
    actual, state = oracle.update(2.0, state, params)
    assert actual.b is None
    np.testing.assert_array_equal(actual.a, [2.0, 2.0])
  losses = bj.multi_objective(lambda x, batch: jnp.stack([x @ x, x.sum()]), 2)
  rows = bj.evaluation.recursive(losses, 2, like=bj.oracles.jacobian_like(2))
  state = rows.init(jnp.ones(2))
  for _ in range(3):
    actual, state = rows.update(None, state, jnp.ones(2))
    np.testing.assert_array_equal(actual.rows, [[2.0, 2.0], [1.0, 1.0]])


def test_errors():
  one = bj.gradient(lambda p, batch: p @ p)
  with pytest.raises(ValueError, match='evaluations in a period >= 1, got 0'):
    bj.evaluation.recursive(one, 0)
  losses = bj.multi_objective(lambda x, batch: jnp.stack([x @ x]), 1)
  oracle = bj.evaluation.recursive(losses, 2)
  with pytest.raises(
    ValueError, match=r'recursive: the oracle returns .*`like`'
  ):
    oracle.update(None, oracle.init(jnp.ones(2)), jnp.ones(2))
