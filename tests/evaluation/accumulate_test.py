import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import bilevel_jax as bj
from tests import problems

P = jax.sharding.PartitionSpec


def square(params, batch):
  return jnp.mean((params - batch) ** 2)


def test_split_keeps_the_order_of_the_examples():
  batch = {'a': jnp.arange(12).reshape(6, 2), 'b': [1, 2, 3, 4, 5, 6]}
  with pytest.raises(ValueError, match=r'leaf has the shape \(\)'):
    bj.evaluation.split_batch(batch, 3)  # A list is a pytree of scalars.
  batch['b'] = np.array(batch['b'])
  parts = bj.evaluation.split_batch(batch, 3)
  assert parts['a'].shape == (3, 2, 2)
  np.testing.assert_array_equal(parts['b'], [[1, 2], [3, 4], [5, 6]])


def test_split_gives_each_part_a_key():
  keys = bj.evaluation.split_batch(jax.random.key(0), 3)
  numbers = jax.random.key_data(keys)
  assert len({tuple(row) for row in numbers.tolist()}) == 3


def test_split_of_a_batch_of_keys():
  keys = jax.random.split(jax.random.key(0), 4)
  assert bj.evaluation.split_batch(keys, 2).shape == (2, 2)


def test_split_says_which_shape_does_not_divide():
  with pytest.raises(ValueError, match=r'4 equal parts.*\(6, 2\)'):
    bj.evaluation.split_batch(jnp.ones((6, 2)), 4)


@pytest.mark.parametrize('parts', [0, -2, 1.5, True])
def test_takes_a_whole_number_of_parts(parts):
  with pytest.raises(ValueError, match=f'whole number .* got {parts}'):
    bj.evaluation.accumulate(bj.gradient(square), parts)


@hypothesis.given(
  parts=st.sampled_from([1, 2, 3, 4, 6, 12]), seed=st.integers(0, 2**16)
)
def test_any_number_of_parts_gives_the_whole_gradient(parts, seed):
  batch = jax.random.normal(jax.random.key(seed), (12,))
  params = jnp.float32(0.5)
  oracle = bj.evaluation.accumulate(bj.gradient(square), parts)
  slope, state = oracle.update(batch, oracle.init(params), params)
  np.testing.assert_allclose(slope, 2 * (0.5 - batch).mean(), atol=1e-5)
  loss = bj.values(state)['loss']
  np.testing.assert_allclose(loss, square(0.5, batch), rtol=1e-5)
  assert bj.counts(state) == {'gradients/loss': parts}


@pytest.mark.parametrize('penalty', [None, 3.0])
def test_value_gap_of_a_rough_problem(x64, penalty):
  params = problems.rough_params()
  away = problems.rough_params(1).lower
  params = bj.sequences(**params._asdict(), value=away)
  batch = problems.rough_batch()
  whole = bj.value_gap(problems.ROUGH, penalty=penalty)
  ours = bj.evaluation.accumulate(whole, 2)
  expected, state = whole.update(batch, whole.init(params), params)
  found, our_state = ours.update(batch, ours.init(params), params)
  chex.assert_trees_all_close(found, expected, rtol=1e-10)
  chex.assert_trees_all_close(
    bj.values(our_state), bj.values(state), rtol=1e-10
  )


def test_gradient_norm_is_the_mean_of_the_parts():
  # g = b y^2 / 2: half its squared slope is b^2 y^2 / 2, no mean over b.
  problem = bj.BilevelProblem(
    lambda x, y, b: x, lambda x, y, b: jnp.mean(b) * y**2 / 2
  )
  params = bj.BilevelParams(jnp.float32(0.0), jnp.float32(1.0))
  oracle = bj.evaluation.accumulate(bj.gradient_norm(problem), 2)
  _, state = oracle.update(jnp.array([1.0, 3.0]), oracle.init(params), params)
  assert bj.values(state)['penalty'] == (1 + 9) / 4
  assert bj.values(state)['penalty'] > 2**2 / 2


def test_the_state_goes_from_part_to_part():
  fn = lambda params, batch, seen: ((seen,), batch.sum(), seen + 1)
  oracle = bj.oracle(fn, ('seen',), lambda params: jnp.float32(0.0))
  ours = bj.evaluation.accumulate(oracle, 4)
  _, state = ours.update(jnp.ones(4), ours.init(0.0), 0.0)
  assert state.inner == 4 and bj.values(state)['seen'] == 1.5


def test_a_split_of_one_s_own():
  ours = bj.evaluation.accumulate(
    bj.gradient(square), 2, split=lambda batch, parts: batch['parts']
  )
  batch = {'parts': jnp.array([1.0, 3.0])}
  slope, _ = ours.update(batch, ours.init(0.0), jnp.float32(0.0))
  assert slope == -4.0


def test_keeps_low_precision():
  ours = bj.evaluation.accumulate(bj.gradient(square), 2)
  params = jnp.bfloat16(1.0)
  batch = jnp.ones(4, jnp.bfloat16)
  slope, _ = ours.update(batch, ours.init(params), params)
  assert slope.dtype == jnp.bfloat16


@pytest.mark.parametrize('outside', [True, False])
def test_with_mean_over_in_a_shard_map(outside):
  mean = functools.partial(bj.evaluation.mean_over, axis_name='data')
  split = lambda oracle: bj.evaluation.accumulate(oracle, 2)
  oracle = bj.gradient(square)
  oracle = mean(split(oracle)) if outside else split(mean(oracle))
  mesh = jax.make_mesh(
    (4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  params, batch = jnp.float32(0.5), jnp.arange(16.0)

  @jax.jit
  def evaluate(params, state, batch):
    return jax.shard_map(
      lambda *args: oracle.update(args[2], args[1], args[0]),
      mesh=mesh,
      in_specs=(P(), P(), P('data')),
      out_specs=(P(), P()),
    )(params, state, batch)

  slope, state = evaluate(params, oracle.init(params), batch)
  np.testing.assert_allclose(slope, 2 * (0.5 - 7.5), rtol=1e-6)
  np.testing.assert_allclose(bj.values(state)['loss'], square(0.5, batch))
  assert bj.counts(state) == {'gradients/loss': 2}


def test_a_schedule_inside_an_oracle_sees_one_update_not_one_a_part():
  mean = lambda z: jnp.mean(z**2)
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: mean(y - batch), lower=lambda x, y, b: mean(y - x)
  )
  ramp = optax.linear_schedule(0.0, 10.0, 10)
  params = bj.BilevelParams(jnp.float32(1.0), jnp.float32(2.0))
  ends = []
  for wrap in (lambda oracle: oracle, lambda oracle: bj.evaluation.accumulate(oracle, 4)):
    sgd = optax.sgd(0.1)
    solver = bj.v_pbgd(problem, penalty=ramp, upper=sgd, lower=sgd, wrap=wrap)
    here, state = params, solver.init(params)
    for _ in range(3):
      updates, state = solver.update(jnp.arange(8.0), state, here)
      here = bj.apply_updates(here, updates)
    ends.append(here)
  chex.assert_trees_all_close(*ends, rtol=1e-5)
