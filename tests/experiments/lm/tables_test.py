"""Batches by number: each row once an epoch, gradients of the right rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.lm import batches, tables

LENGTHS = (3, 3, 5, 8, 4, 2, 8, 7, 3, 4, 8)


def encoded(lengths=LENGTHS):
  items = [
    {
      'tokens': np.full(n, i + 1, np.int32),
      'mask': (np.arange(n) >= n - 1 - i % 2).astype(np.int32),
      'index': np.int32(i),
    }
    for i, n in enumerate(lengths)
  ]
  rows = np.arange(len(lengths)) * 10
  return batches.Encoded(rows, items, np.array(lengths), 0)


def drawn(table, numbers):
  """Of each batch its bucket and rows, through the loss of numbers."""
  place = jax.jit(table.place)
  result = []
  for number in numbers:
    bucket, within = place(number)
    rows = table.take(int(bucket), within)
    result.append((int(bucket), rows))
  return result


def test_every_epoch_has_whole_batches_of_all_buckets_in_an_order_of_its_own():
  table = tables.make(encoded(), 2, buckets=(4, 8))
  # Six rows of at most 4 tokens, five longer ones.
  assert table.batches == (3, 2) and table.max_answers == (2, 2)
  epochs = [drawn(table, range(k, k + 5)) for k in (0, 5, 10)]
  for epoch in epochs:
    assert sorted(bucket for bucket, _ in epoch) == [0, 0, 0, 1, 1]
    for bucket, length in ((0, 4), (1, 8)):
      some = [rows for b, rows in epoch if b == bucket]
      assert {rows['tokens'].shape for rows in some} == {(2, length)}
      index = np.concatenate([rows['index'] for rows in some])
      assert len(set(index.tolist())) == len(index)
      for i, tokens in zip(
        index, np.concatenate([rows['tokens'] for rows in some])
      ):
        assert LENGTHS[i] <= length and LENGTHS[i] > (0, 4)[bucket]
        assert tokens[: LENGTHS[i]].tolist() == [i + 1] * LENGTHS[i]
        assert not tokens[LENGTHS[i] :].any()
  orders = [
    [tuple(rows['index'].tolist()) for _, rows in epoch] for epoch in epochs
  ]
  assert orders[0] != orders[1] != orders[2]
  # The row that is left over is another one in another epoch.
  indices = {
    i for _, r in drawn(table, range(15, 50)) for i in r['index'].tolist()
  }
  assert indices == set(range(11))
  again = [tuple(r['index'].tolist()) for _, r in drawn(table, range(5, 10))]
  assert again == orders[1]
  other = dataclasses.replace(table, seed=np.uint32(7))
  result = [tuple(r['index'].tolist()) for _, r in drawn(other, range(5))]
  assert result != orders[0]


def test_small_buckets_are_joined_and_what_cannot_be_is_said():
  some = encoded((2, 8, 8, 8, 3, 3, 6))
  table = tables.make(some, 3, buckets=(2, 4, 8))
  assert [part['tokens'].shape for part in table.parts] == [(3, 4), (4, 8)]
  table = tables.make(encoded((2, 3, 2, 8)), 3, buckets=(4, 8))
  assert [part['tokens'].shape for part in table.parts] == [(4, 8)]
  table = tables.make(some, 2, columns={'score': np.arange(7.0)})
  (part,) = table.parts
  np.testing.assert_array_equal(part['score'], part['index'])
  for size, buckets, match in (
    (8, (8,), '7 examples do not fill a batch of 8'),
    (2, (4,), 'has 8 tokens'),
  ):
    with pytest.raises(harness.SettingsError, match=match):
      tables.make(some, size, buckets=buckets)


def test_gradients_are_those_of_the_rows_of_a_number():
  table = tables.make(encoded(), 2, buckets=(4, 8))
  params = {'w': jnp.arange(1.0, 12.0)}

  def function(params, rows, max_answer):
    # Each row's own weight, and how its length weighs.
    own = params['w'][rows['index']] ** 2 * rows['mask'].sum(axis=1)
    return jnp.mean(own) * rows['tokens'].shape[1] + max_answer

  loss = tables.numbered_loss(function, table)
  result = jax.jit(
    lambda params: jax.lax.map(
      lambda k: jax.value_and_grad(loss)(params, k), jnp.arange(7)
    )
  )(params)
  for number, (bucket, rows) in enumerate(drawn(table, range(7))):
    expected, gradient = 0.0, np.zeros(11)
    for i, mask in zip(np.asarray(rows['index']), np.asarray(rows['mask'])):
      scale = mask.sum() * (4, 8)[bucket] / 2
      expected += (i + 1.0) ** 2 * scale
      gradient[i] = 2 * (i + 1.0) * scale
    np.testing.assert_allclose(result[0][number], expected + 2, rtol=1e-6)
    np.testing.assert_allclose(result[1]['w'][number], gradient, rtol=1e-6)
  # A table in the place of a number is all of its rows.
  every = tables.make(encoded(), 11, buckets=(8,))
  masks = np.array([1 + i % 2 for i in range(11)])
  full = np.mean(np.arange(1.0, 12.0) ** 2 * masks) * 8 + 2
  np.testing.assert_allclose(loss(params, every), full, rtol=1e-6)


def test_micro_batches_are_a_finer_count():
  table = tables.make(encoded(), 2, buckets=(4, 8))
  loss = tables.numbered_loss(
    lambda p, rows, max_answer: jnp.sum(p[rows['index']] * rows['index']),
    table,
  )
  oracle = bj.evaluation.accumulate(bj.gradient(loss), 3, split=tables.split)
  params = jnp.ones(11)
  result, _ = jax.jit(oracle.update)(jnp.int32(2), oracle.init(params), params)
  expected = np.zeros(11)
  for _, rows in drawn(table, range(6, 9)):
    np.add.at(expected, np.asarray(rows['index']), rows['index'] / 3)
  np.testing.assert_allclose(result, expected, rtol=1e-6)
  full = tables.make(encoded(LENGTHS[:6]), 6, buckets=(8,))
  parts = tables.split(full, 3).parts[0]
  assert parts['tokens'].shape == (3, 2, 8)
  with pytest.raises(harness.SettingsError, match='not divisible into 4'):
    tables.split(full, 4)
