"""Memory of gradients: the table, its mean, its fixed point, its rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bilevel_jax as bj


def loss(params, batch):
  return jnp.sum(batch['a'] * (params - batch['y']) ** 2) / 2


def part(batch):
  return batch['i']


def data(seed, parts=4):
  draw = np.random.default_rng(seed)
  return {
    'i': np.arange(parts),
    'a': draw.uniform(0.5, 1.5, (parts, 3)).astype(np.float32),
    'y': draw.normal(size=(parts, 3)).astype(np.float32),
  }


@given(st.integers(0, 1000))
def test_table_and_mean_by_hand(seed):
  whole = data(seed)
  draw = np.random.default_rng(seed + 1)
  oracle = bj.evaluation.saga(bj.gradient(loss), 4, index=part)
  state = oracle.init(jnp.zeros(3))
  table = np.zeros((4, 3))
  for _ in range(9):
    i = int(draw.integers(4))
    params = draw.normal(size=3).astype(np.float32)
    batch = {k: jnp.asarray(v[i]) for k, v in whole.items()}
    found, state = oracle.update(batch, state, jnp.asarray(params))
    slope = whole['a'][i] * (params - whole['y'][i])
    expected = slope - table[i] + table.mean(0)
    table[i] = slope
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(state.table, table, atol=1e-5)
    np.testing.assert_allclose(state.mean, table.mean(0), atol=1e-5)


def solve(oracle, batches, steps=800, rate=0.15):
  """Descends, on batches drawn anew; returns the last distances to the end."""
  solver = optax.chain(oracle, optax.sgd(rate))
  params = jnp.zeros(3)
  state = solver.init(params)

  def body(carry, key):
    params, state = carry
    updates, state = solver.update(batches(key), state, params)
    return (optax.apply_updates(params, updates), state), params

  keys = jax.random.split(jax.random.key(0), steps)
  return jax.lax.scan(body, (params, state), keys)[1][-50:]


def test_converges_with_a_constant_step_where_sgd_does_not():
  whole = jax.tree.map(jnp.asarray, data(0))
  best = (whole['a'] * whole['y']).sum(0) / whole['a'].sum(0)

  def one(key):
    i = jax.random.randint(key, (), 0, 4)
    return jax.tree.map(lambda x: x[i], whole)

  plain = solve(bj.gradient(loss), one)
  kept = solve(bj.evaluation.saga(bj.gradient(loss), 4, index=part), one)
  assert np.abs(kept - best).max() < 1e-5
  assert np.abs(plain - best).max() > 1e-2


def test_examples_are_parts_of_their_own():
  whole = jax.tree.map(jnp.asarray, data(1, 8))
  best = (whole['a'] * whole['y']).sum(0) / whole['a'].sum(0)

  def three(key):
    rows = jax.random.permutation(key, 8)[:3]
    return jax.tree.map(lambda x: x[rows], whole)

  # A mean over examples, as losses are: one of them at a time has its own.
  mean_loss = lambda params, batch: loss(params, batch) / batch['y'].shape[0]
  oracle = bj.evaluation.saga(bj.gradient(mean_loss), 8, index=part, examples=True)
  assert np.abs(solve(oracle, three) - best).max() < 1e-5
  state = oracle.init(jnp.zeros(3))
  _, state = oracle.update(three(jax.random.key(0)), state, jnp.zeros(3))
  assert bj.counts(state) == {'gradients/loss': 1}


def test_first_of_each_part_is_seen_without_correction():
  oracle = bj.evaluation.saga(bj.gradient(loss), 2)
  state = oracle.init(jnp.zeros(3))
  whole = jax.tree.map(jnp.asarray, data(2, 2))
  first, state = oracle.update(
    jax.tree.map(lambda x: x[0], whole), state, jnp.zeros(3)
  )
  np.testing.assert_allclose(first, -whole['a'][0] * whole['y'][0], rtol=1e-6)
  # In turn: the second batch is part 1, whose entry is still empty.
  second, state = oracle.update(
    jax.tree.map(lambda x: x[1], whole), state, jnp.zeros(3)
  )
  np.testing.assert_allclose(
    second, -whole['a'][1] * whole['y'][1] + first / 2, rtol=1e-5
  )


def test_rows_with_parts_of_their_own():
  def fn(params, batch, inner):
    rows = jnp.stack([batch['f'] * params, batch['g'] * params])
    return (), bj.Jacobian(rows), inner

  twice = lambda params: bj.Jacobian(jnp.stack([params, params]))
  oracle = bj.evaluation.saga(
    bj.oracle(fn, ()), (2, 3), index=lambda b: b['i'], like=twice
  )
  state = oracle.init(jnp.ones(2))
  f, g = np.array([1.0, 3.0]), np.array([2.0, 4.0, 9.0])
  for k in range(6):
    i, j = k % 2, k % 3
    batch = {'f': f[i], 'g': g[j], 'i': jnp.array([i, j])}
    found, state = oracle.update(batch, state, jnp.ones(2))
  # All parts seen, the parameters the same: the mean of each row's own parts.
  np.testing.assert_allclose(found.rows[:, 0], [f.mean(), g.mean()], rtol=1e-6)


def test_leaves_a_sequence_without_gradient_alone():
  oracle = bj.evaluation.saga(
    bj.gradient(lambda params, batch: (params.a**2).sum(), of='a'), 2
  )
  params = bj.sequences(a=jnp.ones(2), b={'c': jnp.ones(3)})
  gradients, _ = oracle.update(None, oracle.init(params), params)
  assert gradients.b is None
  np.testing.assert_array_equal(gradients.a, [2.0, 2.0])


@pytest.mark.parametrize('parts', [0, 1.5, True, (2, 0)])
def test_wrong_parts(parts):
  with pytest.raises(ValueError, match='whole number of parts'):
    bj.evaluation.saga(bj.gradient(loss), parts)


def test_examples_need_an_index():
  with pytest.raises(ValueError, match='pass index='):
    bj.evaluation.saga(bj.gradient(loss), 4, examples=True)
