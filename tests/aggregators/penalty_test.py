"""The weights of an objective and its penalty."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

A = bj.aggregators
ROWS = jnp.array([[1.0, 0.0], [0.0, 1.0]])


def weigh(penalty, rows=ROWS, count=0, **kwargs):
  link = A.scale_by_penalty(penalty, **kwargs)
  state = link.init(rows[0])._replace(count=jnp.int32(count))
  return link.update(bj.Jacobian(rows), state)


@pytest.mark.parametrize(
  ('penalty', 'rescale', 'expected'),
  [
    (10.0, True, [0.1, 1.0]),
    (10.0, False, [1.0, 10.0]),
    (0.5, True, [1.0, 0.5]),  # At most one: not rescaled.
    (0.0, True, [1.0, 0.0]),
    (np.float64(4.0), True, [0.25, 1.0]),
    (jnp.float32(4.0), True, [0.25, 1.0]),
    (lambda count: 2.0 * count, False, [1.0, 6.0]),
    (lambda count: jnp.minimum(count, 2.0), True, [0.5, 1.0]),
  ],
)
def test_weights_match_closed_forms(penalty, rescale, expected):
  """Also if the aggregator is created while a function is traced."""
  make = lambda: weigh(penalty, count=3, rescale=rescale)
  updates, state = jax.jit(make)()
  np.testing.assert_allclose(updates, expected, rtol=1e-6)
  assert state.count == 4


def test_traced_penalties():
  rows = jax.random.normal(jax.random.key(0), (50, 2, 3))
  penalties = jnp.linspace(0.0, 1e4, 50)
  actual = jax.jit(jax.vmap(lambda p, r: weigh(p, r)[0]))(penalties, rows)
  share = np.minimum(1, 1 / np.maximum(penalties, 1e-9))[:, None]
  expected = share * (rows[:, 0] + penalties[:, None] * rows[:, 1])
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_rest_does_not_change_and_sequences_without_rows_stay_none():
  rows = bj.sequences(trunk=ROWS, head=None, other=None)
  head = jnp.array([5.0, 7.0])
  link = A.scale_by_penalty(10.0)
  params = bj.sequences(trunk=ROWS[0], head=head, other=head)
  jacobian = bj.Jacobian(rows, {'head': head})
  updates, _ = link.update(jacobian, link.init(params), params)
  np.testing.assert_allclose(updates.trunk, [0.1, 1.0], rtol=1e-6)
  np.testing.assert_array_equal(updates.head, head)
  assert updates.other is None


def test_low_precision_rows_are_weighed_in_float32():
  for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
    assert weigh(3.0, ROWS.astype(dtype))[0].dtype == dtype
  # 257 is not a bfloat16 number: rounding the weight would give 256.
  rows = jnp.array([[0.0, -256.0], [1.0, 1.0]], jnp.bfloat16)
  updates, _ = weigh(257.0, rows, rescale=False)
  # 257 and the sum below round only once, at the end.
  assert updates[0] == jnp.bfloat16(257.0) and updates[1] == 1.0


def test_penalties_out_of_range_are_errors():
  falling = optax.linear_schedule(1.0, -1.0, 5000)
  for penalty, words in {
    -1.0: r'penalty is a weight >= 0.*got',
    float('nan'): r'penalty is a weight >= 0.*got',
    (1.0, 2.0): 'scalar',
    optax.linear_schedule(-1.0, 1.0, 10): 'schedule at step 0',
    falling: 'schedule at step 10000',
  }.items():
    with pytest.raises(ValueError, match=words):
      A.scale_by_penalty(penalty)
  with pytest.raises(TypeError, match=r'Jacobian, got .*value_gap'):
    A.scale_by_penalty(1.0).update(ROWS, A.scale_by_penalty(1.0).init(ROWS))
  with pytest.raises(ValueError, match=r'2 rows.*has 3'):
    weigh(1.0, jnp.ones((3, 2)))


def test_the_count_saturates():
  largest = np.iinfo(np.int32).max
  assert weigh(1.0, count=largest)[1].count == largest
