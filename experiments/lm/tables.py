"""Rows that stay on the device, in a few lengths, as batches by number.

A batch is a whole number: the same number is the same rows, whatever was killed
in between, and a stream of batches is no more than a count. So an objective
whose turn it is not reads nothing, and a run of any method is one compiled
program.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.lm import batches

Rows = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
  """Encoded examples in buckets of one length each.

  Attributes:
    parts: of each bucket, arrays by name with a leading axis of examples.
    seed: of the order, uint32 scalar.
    batch_size: examples in a batch.
    longest: tokens of the longest answer of each bucket.
  """

  parts: tuple[Rows, ...]
  seed: Any
  batch_size: int = dataclasses.field(metadata={'static': True})
  longest: tuple[int, ...] = dataclasses.field(metadata={'static': True})

  @property
  def batches(self) -> tuple[int, ...]:
    """Whole batches of each bucket."""
    return tuple(_rows(part) // self.batch_size for part in self.parts)

  def place(self, number: Any) -> tuple[jax.Array, jax.Array]:
    """Of which bucket a batch is, and its number there; int32 scalars.

    Every epoch has all batches of all buckets, in an order of its own.
    """
    each = self.batches
    number = jnp.asarray(number, jnp.int32)
    epoch, slot = jnp.divmod(number, sum(each))
    key = jax.random.fold_in(jax.random.key(self.seed), epoch)
    slot = jax.random.permutation(key, sum(each))[slot]
    # A batch of the bucket b has one of its slots.
    edges = np.cumsum(each, dtype=np.int32)
    place = jnp.searchsorted(edges, slot, side='right').astype(jnp.int32)
    before = jnp.asarray(np.concatenate([[0], edges[:-1]]), jnp.int32)
    within = slot - before[place]
    return place, epoch * jnp.asarray(each, jnp.int32)[place] + within

  def take(self, bucket: int, number: Any) -> Rows:
    """The rows of a batch of one bucket."""
    part, each = self.parts[bucket], self.batches[bucket]
    epoch, within = jnp.divmod(jnp.asarray(number, jnp.int32), each)
    key = jax.random.fold_in(jax.random.key(self.seed), epoch)
    key = jax.random.fold_in(key, bucket + 1)
    order = jax.random.permutation(key, _rows(part))
    at = jax.lax.dynamic_slice_in_dim(
      order, within * self.batch_size, self.batch_size
    )
    return {name: jnp.asarray(leaf)[at] for name, leaf in part.items()}


def _rows(part: Rows) -> int:
  return len(next(iter(part.values())))


def make(
  encoded: batches.Encoded,
  batch_size: int,
  *,
  buckets: Sequence[int] = (),
  seed: int = 0,
  columns: Mapping[str, Any] | None = None,
) -> Table:
  """Puts examples into buckets.

  Args:
    encoded: the examples.
    batch_size: examples in a batch.
    buckets: rising lengths to which examples are padded; by default the longest
      alone. One with fewer examples than a batch has is joined with the next
      longer one, or the last with the one before.
    seed: of the order.
    columns: more arrays by name with a leading axis of examples, the
      log-probabilities of a reference for instance.

  Returns:
    A `Table`.

  Raises:
    SettingsError: if there are fewer examples than a batch has, or one is
      longer than the last bucket.
  """
  count = len(encoded.items)
  buckets = tuple(buckets) or (int(encoded.lengths.max()),)
  if count < batch_size or batch_size < 1:
    raise harness.SettingsError(
      f'batches of {batch_size} cannot be made of {count} examples: give a '
      'batch size between 1 and their number.'
    )
  if encoded.lengths.max() > buckets[-1]:
    raise harness.SettingsError(
      f'an example has {encoded.lengths.max()} tokens, more than the last '
      f'bucket of {buckets}.'
    )
  which = np.searchsorted(buckets, encoded.lengths)
  for i in range(len(buckets) - 1):
    if np.sum(which == i) < batch_size:
      which[which == i] = i + 1
  used = sorted(set(which.tolist()))
  if np.sum(which == used[-1]) < batch_size:
    which[which == used.pop(-2)] = used[-1]
  parts, longest = [], []
  for i in used:
    rows = np.flatnonzero(which == i)
    part = batches.stacked(
      encoded._replace(
        items=[encoded.items[r] for r in rows], lengths=encoded.lengths[rows]
      ),
      length=buckets[i],
    )
    part['index'] = rows.astype(np.int32)
    part |= {n: np.asarray(c)[rows] for n, c in (columns or {}).items()}
    masks = [part[n] for n in part if n.endswith('mask')]
    longest.append(max(int(m.sum(axis=1).max()) for m in masks))
    parts.append(part)
  return Table(tuple(parts), np.uint32(seed), batch_size, tuple(longest))


def packed(
  encoded: batches.Encoded, batch_size: int, *, length: int, seed: int = 0
) -> Table:
  """Puts demonstrations side by side into rows, by `batches.packed`.

  Args:
    encoded: demonstrations.
    batch_size: rows in a batch.
    length: tokens of a row.
    seed: of the order.

  Returns:
    A `Table` of one bucket, whose rows have `segments` and `positions`; its
    examples are rows.

  Raises:
    SettingsError: if there are fewer rows than a batch has.
    UserError: as `batches.packed`.
  """
  part = batches.packed(encoded, length)
  count = len(part['tokens'])
  if count < batch_size:
    raise harness.SettingsError(
      f'{len(encoded.items)} demonstrations are packed into {count} rows of '
      f'{length} tokens, fewer than a batch of {batch_size}: take shorter rows '
      'or smaller batches, or do not pack.'
    )
  part['index'] = np.arange(count, dtype=np.int32)
  longest = int(part['mask'].sum(axis=1).max())
  return Table((part,), np.uint32(seed), batch_size, (longest,))


def with_parts(table: Table, parts: Sequence[Rows]) -> Table:
  """The table with other columns."""
  return dataclasses.replace(table, parts=tuple(parts))


def rows_of(table: Table) -> Rows:
  """All rows of a table of one bucket, for what sees all of them."""
  (part,) = table.parts
  return dict(part)


def loss_of_numbers(
  function: Callable[[Any, Rows, int], jax.Array], table: Table
) -> Callable[[Any, Any], jax.Array]:
  """A loss of (params, number of a batch), from one of (params, rows, longest).

  Each bucket is a branch of one program. The gradient is taken inside of the
  branch: outside, what the backward passes of all branches need would be held
  at once. So there are first derivatives only.

  Args:
    function: `(params, rows, longest)` to a scalar, `longest` being the tokens
      of the longest answer in the bucket.
    table: the rows.

  Returns:
    `loss(params, batch)`; a batch that is a table of one bucket is all of it.
  """

  def branch(bucket):
    def run(params, number):
      rows = table.take(bucket, number)
      return function(params, rows, table.longest[bucket])

    return run

  branches = [branch(i) for i in range(len(table.parts))]

  @jax.custom_vjp
  def switched(params, place, number):
    return jax.lax.switch(place, branches, params, number)

  def forward(params, place, number):
    both = [jax.value_and_grad(run) for run in branches]
    return jax.lax.switch(place, both, params, number)

  def backward(gradient, cotangent):
    scaled = lambda leaf: (cotangent * leaf).astype(leaf.dtype)
    return jax.tree.map(scaled, gradient), None, None

  switched.defvjp(forward, backward)

  def loss(params, batch):
    if isinstance(batch, Table):
      return function(params, rows_of(batch), batch.longest[0])
    if len(branches) == 1:
      return branches[0](params, batch)
    return switched(params, *table.place(batch))

  return loss


def split(batch: Any, parts: int) -> Any:
  """Micro-batches, for `bj.evaluation.accumulate`.

  Args:
    batch: a pytree of numbers of batches, of which a part is a finer count, or
      a table, whose rows are divided.
    parts: how many.

  Returns:
    The same with a leading axis of parts.
  """

  def one(leaf):
    leaf = jnp.asarray(leaf)
    if leaf.ndim == 0:
      # Of the seed of a table, any number will do.
      return leaf * parts + jnp.arange(parts, dtype=leaf.dtype)
    if leaf.shape[0] % parts:
      raise harness.SettingsError(
        f'{leaf.shape[0]} rows do not divide into {parts} micro-batches.'
      )
    return leaf.reshape(parts, -1, *leaf.shape[1:])

  return jax.tree.map(one, batch)
