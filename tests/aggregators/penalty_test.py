import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import bilevel_jax as bj

PARAMS = jnp.zeros(2)
ROWS = jnp.array([[1.0, 0.0], [0.0, 1.0]])


def weigh(penalty, rows=ROWS, count=0, **kwargs):
  link = bj.aggregators.scale_by_penalty(penalty, **kwargs)
  state = link.init(PARAMS)._replace(count=jnp.int32(count))
  return link.update(bj.Jacobian(rows), state, PARAMS)


@pytest.mark.parametrize(
  ('penalty', 'rescale', 'expected'),
  [
    (10.0, True, [0.1, 1.0]),
    (10.0, False, [1.0, 10.0]),
    (1.0, True, [1.0, 1.0]),
    (0.5, True, [1.0, 0.5]),  # At most one: not rescaled.
    (0.0, True, [1.0, 0.0]),
    (np.float64(4.0), True, [0.25, 1.0]),
    (jnp.float32(4.0), True, [0.25, 1.0]),
  ],
)
def test_weights_by_hand(penalty, rescale, expected):
  updates, _ = weigh(penalty, rescale=rescale)
  np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_schedule_sees_the_count_before_the_update():
  link = bj.aggregators.scale_by_penalty(lambda count: 2.0 * count)
  state, seen = link.init(PARAMS), []
  for _ in range(3):
    updates, state = link.update(bj.Jacobian(ROWS), state, PARAMS)
    seen.append(float(updates[1] / updates[0]))
  np.testing.assert_allclose(seen, [0.0, 2.0, 4.0])
  assert state.count == 3


def test_the_rest_is_untouched():
  rows = bj.sequences(trunk=ROWS, head=None)
  head = jnp.array([5.0, 7.0])
  link = bj.aggregators.scale_by_penalty(10.0)
  params = bj.sequences(trunk=PARAMS, head=head)
  jacobian = bj.Jacobian(rows, {'head': head})
  updates, _ = link.update(jacobian, link.init(params), params)
  np.testing.assert_allclose(updates.trunk, [0.1, 1.0], rtol=1e-6)
  np.testing.assert_array_equal(updates.head, head)


def test_a_sequence_without_rows_stays_none():
  link = bj.aggregators.scale_by_penalty(1.0)
  params = bj.BilevelParams(PARAMS, PARAMS)
  jacobian = bj.Jacobian(bj.BilevelParams(ROWS, None))
  updates, _ = link.update(jacobian, link.init(params), params)
  assert updates.lower is None


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_keeps_the_type_of_the_rows(dtype):
  updates, _ = weigh(3.0, ROWS.astype(dtype))
  assert updates.dtype == dtype


def test_low_precision_rows_are_weighed_in_float32():
  # 257 is no bfloat16: a weight rounded to it would give 256.
  rows = jnp.array([[0.0], [1.0]], jnp.bfloat16)
  updates, _ = weigh(257.0, jnp.concatenate([rows, rows], 1), rescale=False)
  # 257 rounds to 256 once, at the end; and the sum below only then as well.
  assert updates[0] == jnp.bfloat16(257.0)
  rows = jnp.array([[-256.0], [1.0]], jnp.bfloat16)
  updates, _ = weigh(257.0, rows, rescale=False)
  assert updates[0] == 1.0


@hypothesis.given(
  penalty=st.floats(0, 1e4),
  scale=st.floats(-8, 8),
  seed=st.integers(0, 2**16),
)
def test_linear_in_the_rows(penalty, scale, seed):
  one, two = jax.random.normal(jax.random.key(seed), (2, 2, 3))
  total, _ = weigh(penalty, one + scale * two)
  parts = weigh(penalty, one)[0] + scale * weigh(penalty, two)[0]
  room = 1e-5 * (1 + abs(scale)) * 10
  np.testing.assert_allclose(total, parts, rtol=0, atol=room)


@hypothesis.given(penalty=st.floats(0, 1e6))
def test_rescaled_weights_are_at_most_one(penalty):
  updates, _ = weigh(penalty)
  assert updates.min() >= 0 and updates.max() <= 1 + 1e-6
  np.testing.assert_allclose(updates.max(), 1, rtol=1e-6)


@pytest.mark.parametrize('penalty', [-1.0, float('nan'), jnp.float32(-2.0)])
def test_negative_penalty_says_so(penalty):
  with pytest.raises(ValueError, match=r'penalty is a weight >= 0.*got'):
    bj.aggregators.scale_by_penalty(penalty)


def test_penalty_is_a_scalar():
  with pytest.raises(ValueError, match='scalar'):
    bj.aggregators.scale_by_penalty(jnp.ones(2))


@pytest.mark.parametrize(
  ('schedule', 'step'),
  [
    (optax.linear_schedule(-1.0, 1.0, 10), 0),
    (optax.linear_schedule(1.0, -1.0, 5000), 10000),
  ],
)
def test_schedule_that_gets_negative_says_where(schedule, step):
  with pytest.raises(ValueError, match=f'schedule at step {step}'):
    bj.aggregators.scale_by_penalty(schedule)


@pytest.mark.parametrize(
  'penalty', [jnp.float32(2.0), lambda count: jnp.minimum(count, 2.0)]
)
def test_is_made_while_a_function_is_traced(penalty):
  found = jax.jit(lambda: weigh(penalty, count=2)[0])()
  np.testing.assert_allclose(found, [0.5, 1.0])


def test_traced_penalty():
  found = jax.jit(lambda penalty: weigh(penalty)[0])(4.0)
  np.testing.assert_allclose(found, [0.25, 1.0])


def test_another_gradient_names_the_oracles():
  link = bj.aggregators.scale_by_penalty(1.0)
  with pytest.raises(TypeError, match=r'Jacobian, got .*value_gap.*gradient_n'):
    link.update(PARAMS, link.init(PARAMS), PARAMS)


def test_three_rows_are_too_many():
  with pytest.raises(ValueError, match=r'two rows.*has 3'):
    weigh(1.0, jnp.ones((3, 2)))


def test_the_count_stops_at_the_largest():
  most = np.iinfo(np.int32).max
  _, state = weigh(1.0, count=most)
  assert state.count == most
  chex.assert_trees_all_equal_dtypes(state.count, jnp.int32(0))
