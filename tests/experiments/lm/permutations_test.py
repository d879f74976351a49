"""Permutations by entry: each number once, uniform, quick at any length."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lm import permutations, tables


def test_every_length_has_each_number_once():
  key = jax.random.key(0)
  for count in (1, 2, 3, 5, 64, 65, 1000):
    entries = permutations.compute_entries(key, count, jnp.arange(count))
    assert sorted(entries.tolist()) == list(range(count))
    assert entries.dtype == jnp.int32
  largest = 2**31 - 1
  ends = jnp.array([0, 1, largest - 1])
  entries = np.asarray(permutations.compute_entries(key, largest, ends))
  assert len(set(entries.tolist())) == 3 and entries.min() >= 0


def test_permutations_of_many_keys_are_uniform():
  """Single entries, orders of six entries, and neighbours."""
  count, draws, cells = 20_000, 6000, 16
  keys = jax.random.split(jax.random.key(1), draws)
  compute = lambda key: permutations.compute_entries(key, count, jnp.arange(6))
  entries = np.asarray(jax.jit(jax.vmap(compute))(keys))

  def deviate(cell, number):
    """Standardised chi-square statistic of equal cells."""
    counts = np.bincount(cell, minlength=number)
    expected = len(cell) / number
    statistic = np.sum((counts - expected) ** 2) / expected
    return (statistic - number + 1) / np.sqrt(2 * (number - 1))

  for position in range(6):
    assert abs(deviate(entries[:, position] * cells // count, cells)) < 4
    assert abs(deviate(entries[:, position] % cells, cells)) < 4
  orders = np.argsort(entries, axis=1) @ 6 ** np.arange(6)
  _, order = np.unique(orders, return_inverse=True)
  assert order.max() + 1 == 720 and abs(deviate(order, 720)) < 4
  # One long permutation: neighbours are independent.
  long = permutations.compute_entries(keys[0], 40_000, jnp.arange(40_000))
  long = np.asarray(long, float)
  assert abs(np.corrcoef(long[1:], long[:-1])[0, 1]) < 4 / 200
  assert abs(np.corrcoef(long, np.arange(40_000))[0, 1]) < 4 / 200


def test_a_large_table_has_each_row_once_per_epoch_by_number():
  """The order is a function of seed and number, in one bucket or several."""
  sizes = permutations.MOST_SORTED + 3, 2 * permutations.MOST_SORTED
  parts = tuple({'index': np.arange(n, dtype=np.int32)} for n in sizes)
  table = tables.Table(parts, np.uint32(3), 2, (1, 1))
  total = sum(table.batches)

  @jax.jit
  def draw(numbers):
    buckets, within = jax.vmap(table.place)(numbers)
    rows = [
      jax.vmap(lambda n, i=i: table.take(i, n)['index'])(within)
      for i in range(2)
    ]
    return buckets, *rows

  epochs = []
  for epoch in range(2):
    buckets, *rows = map(
      np.asarray, draw(epoch * total + jnp.arange(total, dtype=jnp.int32))
    )
    for i in range(2):
      index = rows[i][buckets == i].ravel()
      assert len(index) == 2 * table.batches[i] == len(set(index.tolist()))
    epochs.append(rows[1][buckets == 1])
  assert np.mean(epochs[0] == epochs[1]) < 0.01
  # A part of the epoch, as after a resumption.
  middle = total + jnp.arange(100, 110, dtype=jnp.int32)
  again = np.asarray(draw(middle)[0])
  np.testing.assert_array_equal(again, buckets[100:110])
