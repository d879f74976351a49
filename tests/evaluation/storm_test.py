"""STORM: the recursion, its bias, its noise and its counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj


def loss(params, batch):
  return jnp.sum(batch * params**2) / 2 + jnp.sum(jnp.sin(params) * batch)


def slope(params, batch):
  return batch * params + np.cos(params) * batch


@pytest.mark.parametrize('decay', [0.0, 0.3, 1.0])
def test_the_recursion_matches_numpy(decay):
  draw = np.random.default_rng(0)
  points, batches = draw.normal(size=(2, 4, 3)).astype(np.float32)
  oracle = bj.evaluation.storm(bj.gradient(loss), decay)
  state, update = oracle.init(jnp.asarray(points[0])), jax.jit(oracle.update)
  expected = None
  for k in range(4):
    actual, state = update(
      jnp.asarray(batches[k]), state, jnp.asarray(points[k])
    )
    new = slope(points[k], batches[k])
    if k == 0:
      expected = new
    else:
      old = slope(points[k - 1], batches[k])
      expected = new + (1 - decay) * (expected - old)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def test_a_schedule_counts_updates_and_inner_steps_are_corrected():
  """All three inner steps of an update use the update's decay."""
  decay = lambda k: 1 / (1.0 + k)
  solver = bj.descend(
    bj.evaluation.storm(bj.gradient(lambda p, b: loss(p.x, b), of='x'), decay),
    x=bj.Sequence(optax.sgd(0.1), steps=3, batch_at=lambda b, t: b[t]),
  )
  params = bj.sequences(x=jnp.array([0.3, -1.0]))
  batches = np.random.default_rng(0).normal(size=(2, 3, 2)).astype(np.float32)
  state, step = solver.init(params), jax.jit(solver.update)
  x, last, estimate = np.array([0.3, -1.0]), None, None
  for k in range(2):
    updates, state = step(jnp.asarray(batches[k]), state, params)
    params = bj.apply_updates(params, updates)
    for t in range(3):
      new = slope(x, batches[k, t])
      if last is None:
        estimate = new
      else:
        old = slope(last, batches[k, t])
        estimate = new + (1 - decay(k)) * (estimate - old)
      last, x = x, x - 0.1 * estimate
    np.testing.assert_allclose(params.x, x, rtol=1e-5)
  assert state.oracles[0].count == 2


def test_schedule_gives_spider():
  # a = 1 at every third update: the estimate is then the fresh gradient.
  restart = lambda k: jnp.where(k % 3 == 0, 1.0, 0)
  oracle = bj.evaluation.storm(bj.gradient(loss), restart)
  state, update = oracle.init(jnp.ones(1)), jax.jit(oracle.update)
  for k in range(7):
    batch, params = jnp.array([1.0 + k]), jnp.array([0.3 * k])
    actual, state = update(batch, state, params)
    fresh = slope(np.asarray(params), np.asarray(batch))
    if k % 3 == 0:
      np.testing.assert_allclose(actual, fresh, rtol=1e-6)
    else:
      assert abs(actual - fresh)[0] > 1e-2


def test_estimate_and_decay_are_not_rounded_to_bfloat16():
  """An average of 2,000 ones from zero, with a decay of 0.002."""
  fn = lambda params, batch, inner: ((), batch * jnp.ones_like(params), inner)

  def last(dtype, accumulator):
    oracle = bj.evaluation.storm(
      bj.oracle(fn, ()), 0.002, accumulator_dtype=accumulator
    )
    params, zero = jnp.ones([], dtype), jnp.zeros([], dtype)
    _, state = oracle.update(zero, oracle.init(params), params)
    step = lambda state, _: oracle.update(zero + 1, state, params)[::-1]
    return jax.lax.scan(step, state, length=2_000)[1][-1]

  ends = [last(jnp.bfloat16, d) for d in (jnp.float32, jnp.bfloat16)]
  assert ends[0].dtype == jnp.bfloat16
  np.testing.assert_allclose(ends[0], 1 - 0.998**2_000, rtol=4e-3)
  assert ends[1] < 0.7
  with jax.enable_x64(True):
    oracle = bj.evaluation.storm(bj.oracle(fn, ()), lambda k: 1e-9)
    params = jnp.ones([])
    _, state = oracle.update(1.0, oracle.init(params), params)
    actual, _ = oracle.update(0.0, state, params)
    assert 1 - actual == pytest.approx(1e-9, rel=1e-6)


def test_both_points_use_the_same_key():
  # At a constant point with one key for both, the correction cancels exactly
  # and the estimate is a running mean of the noise. Two keys would increase its
  # variance.
  def fn(params, batch, key):
    key, now = jax.random.split(key)
    return (), params + jax.random.normal(now, params.shape), key

  oracle = bj.oracle(fn, (), lambda params: jax.random.key(0))
  wrapped = bj.evaluation.storm(oracle, 0.0)
  state, params = wrapped.init(jnp.zeros(3)), jnp.zeros(3)
  first, state = wrapped.update(None, state, params)
  second, state = wrapped.update(None, state, params)
  np.testing.assert_array_equal(first, second)
  third, _ = wrapped.update(None, state, params + 1)
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
      actual, state = oracle.update(batch, state, params)
      return state, actual

    _, actual = jax.lax.scan(body, oracle.init(params), batches)
    return actual[500:].var()

  # An exponential mean of white noise has variance a / (2 - a).
  np.testing.assert_allclose(spread(0.1) / spread(1.0), 0.1 / 1.9, rtol=0.2)


def test_a_sequence_without_gradient_stays_none():
  gradient = bj.gradient(lambda params, batch: (params.a**2).sum(), of='a')
  oracle = bj.evaluation.storm(gradient, 0.5)
  params = bj.sequences(a=jnp.ones(2), b={'c': jnp.ones(3)})
  state = oracle.init(params)
  assert state.direction.b is None  # Not moved, so no memory is needed.
  gradients, _ = oracle.update(None, state, params)
  assert gradients.b is None
  np.testing.assert_array_equal(gradients.a, [2.0, 2.0])
  # It also stays None if `like` has memory for all sequences.
  for_all = bj.evaluation.storm(gradient, 0.5, like=lambda params: params)
  gradients, state = for_all.update(None, for_all.init(params), params)
  assert gradients.b is None
  np.testing.assert_array_equal(state.direction.b['c'], jnp.zeros(3))


def test_rows_of_several_objectives():
  def fn(params, batch, inner):
    return (), bj.Jacobian(jnp.stack([params, batch * params])), inner

  rows = lambda params: bj.Jacobian(jnp.stack([params] * 2))
  oracle = bj.evaluation.storm(bj.oracle(fn, ()), 0.5, like=rows)
  params = jnp.ones(2)
  state = oracle.init(params)
  _, state = oracle.update(3.0, state, params)
  actual, _ = oracle.update(5.0, state, 2 * params)
  np.testing.assert_allclose(actual.rows[1], 10 + 0.5 * (3 - 5) * np.ones(2))


def test_counts_both_evaluations_at_any_depth():
  mean = bj.gradient(lambda p, b: jnp.mean((p - b) ** 2))
  two = bj.evaluation.accumulate(mean, 2)
  solver = optax.chain(bj.evaluation.storm(two, 0.5), optax.sgd(0.1))
  params = jnp.float32(0.0)
  state, step = solver.init(params), jax.jit(solver.update)
  for k in range(1, 4):
    _, state = step(jnp.arange(4.0), state, params)
    assert bj.counts(state) == {'gradients/loss': 4 * k}


def test_wrong_decay():
  with pytest.raises(ValueError, match=r'in \[0, 1\], got 1.5'):
    bj.evaluation.storm(bj.gradient(loss), 1.5)


def test_wrong_structures_and_shapes_name_like_and_other_errors_pass():
  def rows(params, batch, inner):
    return (), bj.Jacobian(jnp.stack([params, params])), inner

  params = jnp.ones(2)
  longer = lambda params: jnp.ones(3)
  for oracle, like in (
    (bj.oracle(rows, ()), None),
    (bj.gradient(loss), longer),
  ):
    wrapped = bj.evaluation.storm(oracle, 0.5, like=like)
    message = r'\(2,\).*\(3,\).*pass `like`' if like else 'pass `like`'
    with pytest.raises(ValueError, match=message):
      wrapped.update(params, wrapped.init(params), params)

  def wrong(params, batch):
    raise AttributeError('of the loss')

  wrapped = bj.evaluation.storm(bj.gradient(wrong), 0.5)
  with pytest.raises(AttributeError, match='of the loss'):
    wrapped.update(params, wrapped.init(params), params)
