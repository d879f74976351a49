"""Micro-batches: splitting, sums, counts and schedules."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj


def square(params, batch):
  return jnp.mean((params - batch) ** 2)


def test_split_keeps_the_order_and_deal_takes_turns():
  batch = {'a': jnp.arange(12).reshape(6, 2), 'b': np.arange(6)}
  parts = bj.evaluation.split_batch(batch, 3)
  assert parts['a'].shape == (3, 2, 2)
  np.testing.assert_array_equal(parts['b'], [[0, 1], [2, 3], [4, 5]])
  parts = bj.evaluation.deal_batch(batch, 3)
  assert parts['a'].shape == (3, 2, 2)
  np.testing.assert_array_equal(parts['b'], [[0, 3], [1, 4], [2, 5]])


def test_each_part_gets_its_own_key():
  for split in (bj.evaluation.split_batch, bj.evaluation.deal_batch):
    numbers = jax.random.key_data(split(jax.random.key(0), 3))
    assert len({tuple(row) for row in numbers.tolist()}) == 3
    many = jax.random.split(jax.random.key(0), 4)
    assert split(many, 2).shape == (2, 2)


def test_wrong_batches_and_parts():
  for split in (bj.evaluation.split_batch, bj.evaluation.deal_batch):
    with pytest.raises(ValueError, match=r'4 equal parts.*\(6, 2\)'):
      split(jnp.ones((6, 2)), 4)
    with pytest.raises(ValueError, match=r'leaf has the shape \(\)'):
      split({'b': [1, 2, 3]}, 3)  # A list is a pytree of scalars.
  for parts in (0, -2, 1.5, True):
    with pytest.raises(ValueError, match=f'whole number .* got {parts}'):
      bj.evaluation.accumulate(bj.gradient(square), parts)
    with pytest.raises(ValueError, match=f'whole number .* got {parts}'):
      bj.evaluation.deal_batch(jnp.ones(6), parts)


def test_any_number_of_parts_gives_the_gradient_of_the_batch():
  batch, params = jnp.sin(jnp.arange(12.0)), jnp.float32(0.5)
  for parts in (1, 3, 12):
    oracle = bj.evaluation.accumulate(bj.gradient(square), parts)
    slope, state = oracle.update(batch, oracle.init(params), params)
    np.testing.assert_allclose(slope, 2 * (0.5 - batch).mean(), rtol=1e-5)
    loss = bj.values(state)['loss']
    np.testing.assert_allclose(loss, square(0.5, batch), rtol=1e-5)
    assert bj.counts(state) == {'gradients/loss': parts}


def test_state_passes_from_part_to_part():
  fn = lambda params, batch, count: ((count,), batch.sum(), count + 1)
  start = lambda params: jnp.float32(0.0)
  oracle = bj.oracle(fn, ('seen',), start, linear=True)
  accumulated = bj.evaluation.accumulate(oracle, 4)
  _, state = accumulated.update(jnp.ones(4), accumulated.init(0.0), 0.0)
  assert state.inner == 4 and bj.values(state)['seen'] == 1.5


def test_outputs_are_means_over_the_parts():
  def loss(params, batch):
    return square(params, batch), {'mean': batch.mean(), 'size': 2}

  shape = {'mean': jnp.float32(0.0), 'size': jnp.int32(0)}
  oracle = bj.gradient(loss, outputs=lambda params: shape)
  accumulated = bj.evaluation.accumulate(oracle, 2)
  params = jnp.float32(0.0)
  _, state = accumulated.update(
    jnp.arange(4.0), accumulated.init(params), params
  )
  assert bj.outputs(state)['loss'] == {'mean': 1.5, 'size': 2}


def test_custom_split():
  accumulated = bj.evaluation.accumulate(
    bj.gradient(square), 2, split=lambda batch, parts: batch['parts']
  )
  batch = {'parts': jnp.array([1.0, 3.0])}
  slope, _ = accumulated.update(batch, accumulated.init(0.0), jnp.float32(0.0))
  assert slope == -4.0


def test_sums_of_many_parts_accumulate_in_float32():
  """In bfloat16 the sum would stop growing at 1."""
  product = lambda params, batch: jnp.mean(params * batch)
  batch, params = jnp.full(512, 1.5, jnp.bfloat16), jnp.bfloat16(1.0)
  for dtype, expected in ((jnp.float32, 1.5), (jnp.bfloat16, 1.0)):
    accumulated = bj.evaluation.accumulate(
      bj.gradient(product), 512, accumulator_dtype=dtype
    )
    slope, _ = accumulated.update(batch, accumulated.init(params), params)
    assert slope.dtype == jnp.bfloat16 and slope == expected


def test_a_schedule_inside_an_oracle_counts_updates_not_parts():
  mean = lambda z: jnp.mean(z**2)
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: mean(y - batch), lower=lambda x, y, b: mean(y - x)
  )
  ramp = optax.linear_schedule(0.0, 10.0, 10)
  params = bj.BilevelParams(jnp.float32(1.0), jnp.float32(2.0))
  sgd, ends = optax.sgd(0.1), []
  quarters = lambda oracle: bj.evaluation.accumulate(oracle, 4)
  plain = bj.v_pbgd(problem, penalty=ramp, upper=sgd, lower=sgd)
  for solver in (
    plain,
    bj.evaluation.wrapped(plain, quarters),
  ):
    step = jax.jit(solver.update)
    here, state = params, solver.init(params)
    for _ in range(3):
      updates, state = step(jnp.arange(8.0), state, here)
      here = bj.apply_updates(here, updates)
    ends.append(here)
  chex.assert_trees_all_close(*ends, rtol=1e-5)
