"""Recursive momentum: the recursion, its bias, its noise, its counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bilevel_jax as bj


def loss(params, batch):
  return jnp.sum(batch * params**2) / 2 + jnp.sum(jnp.sin(params) * batch)


def slope(params, batch):
  return batch * params + np.cos(params) * batch


@given(st.integers(0, 1000), st.floats(0, 1))
def test_recursion_by_hand(seed, decay):
  draw = np.random.default_rng(seed)
  points, batches = draw.normal(size=(2, 4, 3)).astype(np.float32)
  oracle = bj.evaluation.storm(bj.gradient(loss), decay)
  state = oracle.init(jnp.asarray(points[0]))
  expected = None
  for k in range(4):
    found, state = oracle.update(
      jnp.asarray(batches[k]), state, jnp.asarray(points[k])
    )
    new = slope(points[k], batches[k])
    if k == 0:
      expected = new
    else:
      old = slope(points[k - 1], batches[k])
      expected = new + (1 - decay) * (expected - old)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_decay_one_is_the_oracle():
  plain, kept = bj.gradient(loss), bj.evaluation.storm(bj.gradient(loss), 1.0)
  state, other = plain.init(jnp.ones(2)), kept.init(jnp.ones(2))
  for k in range(3):
    batch, params = jnp.array([1.0, 2.0]) + k, jnp.ones(2) * k
    expected, state = plain.update(batch, state, params)
    found, other = kept.update(batch, other, params)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_schedule_gives_spider():
  # a = 1 at every third update: the estimate is then the fresh gradient.
  oracle = bj.evaluation.storm(bj.gradient(loss), lambda k: jnp.where(k % 3 == 0, 1.0, 0))
  state = oracle.init(jnp.ones(1))
  for k in range(7):
    batch, params = jnp.array([1.0 + k]), jnp.array([0.3 * k])
    found, state = oracle.update(batch, state, params)
    fresh = slope(np.asarray(params), np.asarray(batch))
    if k % 3 == 0:
      np.testing.assert_allclose(found, fresh, rtol=1e-6)
    else:
      assert abs(found - fresh)[0] > 1e-2


def test_same_randomness_at_both_points():
  # A frozen point: with one key for both, the correction cancels exactly, and
  # the estimate is a running mean of the noise; with two keys its variance
  # would be larger.
  def fn(params, batch, key):
    key, now = jax.random.split(key)
    return (), params + jax.random.normal(now, params.shape), key

  oracle = bj.oracle(fn, (), lambda params: jax.random.key(0))
  kept = bj.evaluation.storm(oracle, 0.0)
  state, params = kept.init(jnp.zeros(3)), jnp.zeros(3)
  first, state = kept.update(None, state, params)
  second, state = kept.update(None, state, params)
  np.testing.assert_array_equal(first, second)
  third, _ = kept.update(None, state, params + 1)
  np.testing.assert_allclose(third, second + 1, rtol=1e-6)


def test_variance_falls_with_the_decay():
  noisy = lambda params, batch: (
    jnp.vdot(params, params) / 2 + jnp.vdot(params, batch)
  )
  batches = jax.random.normal(jax.random.key(0), (4000, 2))

  def spread(decay):
    oracle = bj.evaluation.storm(bj.gradient(noisy), decay)
    params = jnp.zeros(2)

    def body(state, batch):
      found, state = oracle.update(batch, state, params)
      return state, found

    _, found = jax.lax.scan(body, oracle.init(params), batches)
    return found[500:].var()

  # An exponential mean of white noise has the variance a / (2 - a).
  np.testing.assert_allclose(spread(0.1) / spread(1.0), 0.1 / 1.9, rtol=0.2)


def test_leaves_a_sequence_without_gradient_alone():
  oracle = bj.evaluation.storm(
    bj.gradient(lambda params, batch: (params.a**2).sum(), of='a'), 0.5
  )
  params = bj.sequences(a=jnp.ones(2), b={'c': jnp.ones(3)})
  gradients, _ = oracle.update(None, oracle.init(params), params)
  assert gradients.b is None
  np.testing.assert_array_equal(gradients.a, [2.0, 2.0])


def test_rows_of_several_objectives():
  def fn(params, batch, inner):
    return (), bj.Jacobian(jnp.stack([params, batch * params])), inner

  rows = lambda params: bj.Jacobian(jnp.stack([params] * 2))
  oracle = bj.evaluation.storm(bj.oracle(fn, ()), 0.5, like=rows)
  params = jnp.ones(2)
  state = oracle.init(params)
  _, state = oracle.update(3.0, state, params)
  found, _ = oracle.update(5.0, state, 2 * params)
  np.testing.assert_allclose(found.rows[1], 10 + 0.5 * (3 - 5) * np.ones(2))


def test_counts_both_evaluations_at_any_depth():
  two = bj.evaluation.accumulate(bj.gradient(lambda p, b: jnp.mean((p - b) ** 2)), 2)
  solver = optax.chain(bj.evaluation.storm(two, 0.5), optax.sgd(0.1))
  params = jnp.float32(0.0)
  state = solver.init(params)
  for k in range(1, 4):
    _, state = solver.update(jnp.arange(4.0), state, params)
    assert bj.counts(state) == {'gradients/loss': 4 * k}


def test_wrong_decay():
  with pytest.raises(ValueError, match=r'in \[0, 1\], got 1.5'):
    bj.evaluation.storm(bj.gradient(loss), 1.5)


def test_wrong_structure_names_like():
  def fn(params, batch, inner):
    return (), bj.Jacobian(jnp.stack([params, params])), inner

  oracle = bj.evaluation.storm(bj.oracle(fn, ()), 0.5)
  with pytest.raises(ValueError, match='pass `like`'):
    oracle.update(None, oracle.init(jnp.ones(2)), jnp.ones(2))
