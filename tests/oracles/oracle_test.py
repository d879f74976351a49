import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract
from tests.contract import Row


def _row(wrap, rate):
  """Noise multiplies the slope."""

  def fn(params, batch, key):
    key, now = jax.random.split(key)
    value, slope = jax.value_and_grad(contract.flat_loss)(params, batch)
    scale = jax.random.uniform(now, (), slope['z'].dtype, 0.5, 1.5)
    return (value,), jax.tree.map(lambda s: s * scale, slope), key

  oracle = bj.oracle(
    fn,
    ('loss',),
    lambda params: jax.random.key(7),
    counts={'gradients/loss': 1},
    linear=True,
  )
  return optax.chain(wrap(oracle), optax.sgd(rate))


ROWS = (
  Row(
    'oracle',
    _row,
    {'gradients/loss': 1},
    params=contract.flat_params,
    keys=True,
    devices=True,
  ),
)


def test_state_is_what_init_makes_and_fn_returns():
  def fn(params, batch, inner):
    return (inner.sum(), params), batch * inner, inner + 1

  oracle = bj.oracle(
    fn, ['one', 'two'], lambda params: params * jnp.ones(2), counts={'a/b': 3}
  )
  params = jnp.float32(2.0)
  state = oracle.init(params)
  np.testing.assert_array_equal(state.inner, [2.0, 2.0])
  assert bj.values(state) == {'one': 0.0, 'two': 0.0}
  gradients, state = oracle.update(5.0, state, params)
  np.testing.assert_array_equal(gradients, [10.0, 10.0])
  gradients, state = oracle.update(5.0, state, params)
  np.testing.assert_array_equal(gradients, [15.0, 15.0])
  assert bj.values(state) == {'one': 6.0, 'two': 2.0}
  assert bj.counts(state) == {'a/b': 6}


def test_a_key_in_the_state_moves_on():
  def fn(params, batch, key):
    key, now = jax.random.split(key)
    return (params,), jax.random.normal(now), key

  oracle = bj.oracle(fn, ('loss',), lambda params: jax.random.key(0))
  params = jnp.float32(0.0)
  one, state = oracle.update(None, oracle.init(params), params)
  two, _ = oracle.update(None, state, params)
  assert one != two


def test_measures_at_least_in_float32():
  oracle = bj.oracle(lambda p, b, i: ((p,), p, i), ('loss',))
  params = jnp.bfloat16(1.0)
  _, state = oracle.update(None, oracle.init(params), params)
  assert bj.values(state)['loss'].dtype == jnp.float32


def test_another_number_of_values():
  oracle = bj.oracle(lambda p, b, i: ((p, p), p, i), ('loss',))
  with pytest.raises(ValueError, match=r"names 1 values \('loss',\).*2"):
    oracle.update(None, oracle.init(1.0), 1.0)


def test_a_link_keeps_nothing_for_what_is_not_moved():
  """MoCo behind an oracle of one sequence among three."""
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: jnp.sum((y - 1) ** 2) + jnp.sum(x**2),
    lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
  )
  gap = bj.value_gap(problem, of='upper')
  link = bj.aggregators.moco(2, tracking=1.0)
  sgd = optax.sgd(0.1)
  oracle = bj.oracles.aggregated(gap, link)
  params = bj.BilevelParams(jnp.array([1.0, -2.0]), jnp.array([0.5, 0.0]))
  more = bj.sequences(**params._asdict(), value=jnp.zeros(2))
  gradients, state = oracle.update(None, oracle.init(more), more)
  assert gradients.lower is None and gradients.value is None
  # Rows 2x of the upper loss, and 2 (x - y) - 2 (x - v) of the gap.
  tracked = state[1].tracked.upper
  np.testing.assert_allclose(tracked, [[2, -4], [-1, 0]], atol=1e-6)
  solver = bj.descend(
    oracle,
    upper=sgd,
    value=bj.Sequence(sgd, start=lambda params: params.lower),
  )
  solver.update(None, solver.init(params), params)


def test_an_oracle_of_other_sequences_is_said():
  own = bj.oracle(
    lambda params, batch, inner: (
      [0.0],
      bj.BilevelParams(params.upper, None),
      inner,
    ),
    ['loss'],
    moves=('upper',),
  )
  sgd = optax.sgd(0.1)
  solver = bj.descend(
    own, upper=sgd, value=bj.Sequence(sgd, start=lambda params: params.lower)
  )
  params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
  with pytest.raises(TypeError, match=r'return params\._replace'):
    solver.update(None, solver.init(params), params)
