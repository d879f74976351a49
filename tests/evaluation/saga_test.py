"""SAGA: the table, its mean, convergence, and tables of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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


@pytest.mark.parametrize('order', ['in turn', 'drawn'])
def test_table_and_mean_by_hand(order):
  """The first gradient of a part is not corrected and corrects no other."""
  all_data = data(0)
  draw = np.random.default_rng(1)
  index = part if order == 'drawn' else None
  oracle = bj.evaluation.saga(bj.gradient(loss), 4, index=index)
  state, update = oracle.init(jnp.zeros(3)), jax.jit(oracle.update)
  table, filled = np.zeros((4, 3)), np.zeros(4, bool)
  for k in range(9):
    i = int(draw.integers(4)) if order == 'drawn' else k % 4
    params = draw.normal(size=3).astype(np.float32)
    batch = {n: jnp.asarray(v[i]) for n, v in all_data.items()}
    actual, state = update(batch, state, jnp.asarray(params))
    slope = all_data['a'][i] * (params - all_data['y'][i])
    corrected = slope - table[i] + table.sum(0) / max(filled.sum(), 1)
    expected = corrected if filled[i] else slope
    table[i], filled[i] = slope, True
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_allclose(state.table, table, atol=1e-5)
    np.testing.assert_allclose(state.total, table.sum(0), atol=1e-5)
    np.testing.assert_array_equal(state.visited, filled)


def test_first_epoch_directions_are_as_long_as_gradients():
  """With equal parts, each direction is the gradient from the start."""
  oracle = bj.evaluation.saga(bj.gradient(lambda p, b: jnp.sum(p * b)), 5)
  params, batch = jnp.zeros(2), jnp.ones(2)
  body = lambda state, _: oracle.update(batch, state, params)[::-1]
  _, actual = jax.lax.scan(body, oracle.init(params), length=11)
  np.testing.assert_allclose(actual, 1.0, rtol=1e-6)


def test_the_sum_of_a_table_accumulates_in_float32():
  """In bfloat16 the mean of 512 parts would stop growing before 1.5."""
  product = bj.gradient(lambda params, batch: params * batch)
  params, batch = jnp.bfloat16(1.0), jnp.bfloat16(1.5)
  for dtype, right in ((jnp.float32, True), (jnp.bfloat16, False)):
    oracle = bj.evaluation.saga(product, 512, accumulator_dtype=dtype)
    body = lambda state, _, oracle=oracle: (
      oracle.update(batch, state, params)[1],
      None,
    )
    state, _ = jax.lax.scan(body, oracle.init(params), length=512)
    actual, _ = oracle.update(batch, state, params)
    assert actual.dtype == state.table.dtype == jnp.bfloat16
    assert (abs(actual - 1.5) < 1e-2) == right


def solve(oracle, batches, steps=800, rate=0.15):
  """Descends on random batches; returns the last points."""
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
  all_data = jax.tree.map(jnp.asarray, data(0))
  best = (all_data['a'] * all_data['y']).sum(0) / all_data['a'].sum(0)

  def one(key):
    i = jax.random.randint(key, (), 0, 4)
    return jax.tree.map(lambda x: x[i], all_data)

  plain = solve(bj.gradient(loss), one)
  solved = solve(bj.evaluation.saga(bj.gradient(loss), 4, index=part), one)
  assert np.abs(solved - best).max() < 1e-5
  assert np.abs(plain - best).max() > 1e-2


def test_rows_with_different_parts():
  def fn(params, batch, inner):
    rows = jnp.stack([batch['f'] * params, batch['g'] * params])
    return (), bj.Jacobian(rows), inner

  twice = lambda params: bj.Jacobian(jnp.stack([params, params]))
  rows = bj.oracle(fn, (), linear=True)
  f, g = np.array([1.0, 3.0]), np.array([2.0, 4.0, 9.0])
  for index in (None, lambda b: b['i']):
    oracle = bj.evaluation.saga(rows, (2, 3), index=index, like=twice)
    state, update = oracle.init(jnp.ones(2)), jax.jit(oracle.update)
    for k in range(6):
      i, j = k % 2, k % 3
      batch = {'f': f[i], 'g': g[j], 'i': jnp.array([i, j])}
      actual, state = update(batch, state, jnp.ones(2))
      if k == 2:  # Only the first row's part has an entry.
        np.testing.assert_allclose(actual.rows[:, 0], [f.mean(), g[2]])
    # After all parts at equal parameters, the mean of each row's parts.
    np.testing.assert_allclose(
      actual.rows[:, 0], [f.mean(), g.mean()], rtol=1e-6
    )
  plain = bj.evaluation.saga(bj.gradient(loss), (2, 3))
  with pytest.raises(TypeError, match='2 rows'):
    plain.update(
      jax.tree.map(lambda x: x[0], data(0)),
      plain.init(jnp.ones(3)),
      jnp.ones(3),
    )
  scalar = bj.evaluation.saga(rows, (2, 3), index=lambda b: 0, like=twice)
  with pytest.raises(ValueError, match=r'one integer for each'):
    scalar.update(batch, state, jnp.ones(2))


def test_a_sequence_without_gradient_stays_none():
  oracle = bj.evaluation.saga(
    bj.gradient(lambda params, batch: (params.a**2).sum(), of='a'), 2
  )
  params = bj.sequences(a=jnp.ones(2), b={'c': jnp.ones(3)})
  assert oracle.init(params).table.b is None
  gradients, _ = oracle.update(None, oracle.init(params), params)
  assert gradients.b is None
  np.testing.assert_array_equal(gradients.a, [2.0, 2.0])


@pytest.mark.parametrize('parts', [0, 1.5, True, (2, 0)])
def test_wrong_parts(parts):
  with pytest.raises(ValueError, match='whole number of parts'):
    bj.evaluation.saga(bj.gradient(loss), parts)


@pytest.mark.parametrize('parts', [4, (4, 2)])
def test_an_index_out_of_range_gives_nan(parts):
  """Not the correction by the part of a clamped or wrapped index."""
  by_row = isinstance(parts, tuple)
  square = lambda p, b: jnp.sum((p - b['y']) ** 2)
  twice = lambda p: bj.Jacobian(jnp.stack([p, p]))
  rows = lambda p, b, inner: ((), twice(2 * (p - b['y'])), inner)
  oracle = bj.oracle(rows, (), linear=True) if by_row else bj.gradient(square)
  saga = bj.evaluation.saga(
    oracle, parts, index=part, like=twice if by_row else None
  )
  params, y = jnp.zeros(2), jnp.ones(2)
  state, update = saga.init(params), jax.jit(saga.update)
  at = lambda i: jnp.asarray((i, 1) if by_row else i)
  for i, right in ((3, True), (-1, False), (4, False), (0, True)):
    actual = update({'i': at(i), 'y': y}, state, params)[0]
    rows = np.asarray(actual.rows if by_row else [actual])
    assert np.isfinite(rows[0]).all() == right
    assert np.isfinite(rows[1:]).all()
