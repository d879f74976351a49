"""Tables of encoded rows on the device, whose batches are numbers.

A batch number selects its rows deterministically, also after a run was killed.
A stream of batches is a counter, an unused objective reads no data, and a run
of any method is one compiled program.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.lm import batches, permutations, token_files

Rows = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
  """Encoded examples in buckets of one length each.

  Attributes:
    parts: arrays by name of each bucket, with a leading axis of examples.
    seed: seed of the order, uint32 scalar.
    batch_size: examples per batch.
    max_answers: tokens of the longest answer of each bucket.
    source: file of the tokens, packed or not, or None. With a file, parts have
      the `number` of each example there instead of tokens.
    lengths: tokens of a row of each bucket, for `source`.
    digest: digest of the file, which identifies the data of a run.
  """

  parts: tuple[Rows, ...]
  seed: Any
  batch_size: int = dataclasses.field(metadata={'static': True})
  max_answers: tuple[int, ...] = dataclasses.field(metadata={'static': True})
  source: token_files.TokenFile | token_files.PackedFile | None = (
    dataclasses.field(default=None, metadata={'static': True})
  )
  lengths: tuple[int, ...] = dataclasses.field(
    default=(), metadata={'static': True}
  )
  digest: Any = ()

  @property
  def batches(self) -> tuple[int, ...]:
    """Number of complete batches of each bucket."""
    return tuple(_count(part) // self.batch_size for part in self.parts)

  def place(self, number: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the bucket of a batch and its number there, int32 scalars.

    Each epoch has all batches of all buckets in a random order.
    """
    counts = self.batches
    number = jnp.asarray(number, jnp.int32)
    epoch, slot = jnp.divmod(number, sum(counts))
    key = jax.random.fold_in(jax.random.key(self.seed), epoch)
    if sum(counts) <= permutations.MOST_SORTED:
      slot = jax.random.permutation(key, sum(counts))[slot]
    else:
      slot = permutations.compute_entries(key, sum(counts), slot)
    # Each bucket has as many slots as batches.
    edges = np.cumsum(counts, dtype=np.int32)
    bucket = jnp.searchsorted(edges, slot, side='right').astype(jnp.int32)
    before = jnp.asarray(np.concatenate([[0], edges[:-1]]), jnp.int32)
    within = slot - before[bucket]
    return bucket, epoch * jnp.asarray(counts, jnp.int32)[bucket] + within

  def take(self, bucket: int, number: Any) -> Rows:
    """Returns the rows of a batch of one bucket."""
    part, count = self.parts[bucket], self.batches[bucket]
    epoch, within = jnp.divmod(jnp.asarray(number, jnp.int32), count)
    key = jax.random.fold_in(jax.random.key(self.seed), epoch)
    key = jax.random.fold_in(key, bucket + 1)
    start, size = within * self.batch_size, self.batch_size
    if _count(part) <= permutations.MOST_SORTED:
      order = jax.random.permutation(key, _count(part))
      at = jax.lax.dynamic_slice_in_dim(order, start, size)
    else:
      positions = start + jnp.arange(size, dtype=jnp.int32)
      at = permutations.compute_entries(key, _count(part), positions)
    rows = {name: jnp.asarray(leaf)[at] for name, leaf in part.items()}
    if self.source is not None:
      rows |= self.source.take(rows.pop('number'), self.lengths[bucket])
    return rows

  def chunks(self, bucket: int, size: int) -> Iterator[Rows]:
    """Yields all rows of a bucket: at once, or from a file a number at a time.

    Args:
      bucket: the bucket.
      size: rows of a chunk from a file.
    """
    part = self.parts[bucket]
    if self.source is None:
      yield part
      return
    for start in range(0, _count(part), size):
      rows = {n: leaf[start : start + size] for n, leaf in part.items()}
      yield rows | self.source.read(rows.pop('number'), self.lengths[bucket])


def _count(part: Rows) -> int:
  return len(next(iter(part.values())))


def make(
  encoded: batches.Encoded,
  batch_size: int,
  *,
  buckets: Sequence[int] = (),
  seed: int = 0,
  columns: Mapping[str, Any] | None = None,
) -> Table:
  """Makes a table of examples in buckets.

  Args:
    encoded: the examples.
    batch_size: examples per batch.
    buckets: ascending lengths to which examples are padded; by default the
      longest length. A bucket smaller than a batch is merged with the next
      longer one, the last bucket with the previous one.
    seed: seed of the order.
    columns: further arrays by name with a leading axis of examples, such as
      log-probabilities of a reference.

  Returns:
    A `Table`.

  Raises:
    SettingsError: if there are fewer examples than `batch_size`, or one is
      longer than the last bucket.
  """
  count = len(encoded.items)
  buckets = tuple(buckets) or (int(encoded.lengths.max()),)
  if count < batch_size or batch_size < 1:
    raise harness.SettingsError(
      f'{count} examples do not fill a batch of {batch_size}: give a batch '
      'size between 1 and their number.'
    )
  if encoded.lengths.max() > buckets[-1]:
    raise harness.SettingsError(
      f'an example has {encoded.lengths.max()} tokens, more than the last '
      f'bucket of {buckets}: add a longer bucket.'
    )
  bucket = np.searchsorted(buckets, encoded.lengths)
  for i in range(len(buckets) - 1):
    if np.sum(bucket == i) < batch_size:
      bucket[bucket == i] = i + 1
  used = sorted(set(bucket.tolist()))
  if np.sum(bucket == used[-1]) < batch_size:
    bucket[bucket == used.pop(-2)] = used[-1]
  source = encoded.items
  source = source if isinstance(source, token_files.TokenFile) else None
  parts, max_answers = [], []
  for i in used:
    rows = np.flatnonzero(bucket == i)
    if source is not None:
      part = {'number': source.numbers[rows]}
      max_answers.append(int(source.answers[part['number']].max()))
    else:
      part = batches.stacked(
        encoded._replace(
          items=[encoded.items[r] for r in rows], lengths=encoded.lengths[rows]
        ),
        length=buckets[i],
      )
      masks = [part[n] for n in part if n.endswith('mask')]
      max_answers.append(max(int(m.sum(axis=1).max()) for m in masks))
    part['index'] = rows.astype(np.int32)
    part |= {n: np.asarray(c)[rows] for n, c in (columns or {}).items()}
    parts.append(part)
  return Table(
    tuple(parts),
    np.uint32(seed),
    batch_size,
    tuple(max_answers),
    source,
    tuple(buckets[i] for i in used) if source else (),
    source.digest if source else (),
  )


def packed(
  encoded: batches.Encoded, batch_size: int, *, length: int, seed: int = 0
) -> Table:
  """Makes a table of packed demonstrations, see `batches.packed`.

  Args:
    encoded: demonstrations.
    batch_size: rows per batch.
    length: tokens of a row.
    seed: seed of the order.

  Returns:
    A `Table` of one bucket, whose rows have `segments` and `positions`.

  Raises:
    SettingsError: if there are fewer rows than `batch_size`.
    UserError: as `batches.packed`.
  """
  rows = batches.assign_rows(encoded, length)
  count = len(rows)
  if count < batch_size:
    raise harness.SettingsError(
      f'{len(encoded.items)} demonstrations are packed into {count} rows of '
      f'{length} tokens, fewer than a batch of {batch_size}: give shorter rows '
      'or smaller batches, or do not pack.'
    )
  index = np.arange(count, dtype=np.int32)
  if isinstance(encoded.items, token_files.TokenFile):
    source = token_files.pack(encoded.items, rows)
    return Table(
      ({'number': index, 'index': index},),
      np.uint32(seed),
      batch_size,
      (int(source.count_answers().max()),),
      source,
      (length,),
      source.digest,
    )
  part = batches.pack(encoded.items, rows, length)
  part['index'] = index
  max_answer = int(part['mask'].sum(axis=1).max())
  return Table((part,), np.uint32(seed), batch_size, (max_answer,))


def with_parts(table: Table, parts: Sequence[Rows]) -> Table:
  """Returns the table with other columns."""
  return dataclasses.replace(table, parts=tuple(parts))


def all_rows(table: Table) -> Rows:
  """Returns all rows of a table of one bucket."""
  (part,) = table.parts
  return dict(part)


def numbered_loss(
  function: Callable[[Any, Rows, int], Any],
  table: Table,
  *,
  has_aux: bool = False,
) -> Callable[[Any, Any], Any]:
  """Converts a loss of rows to a loss of a batch number.

  Each bucket is a branch of one program. The gradient is taken within the
  branch, to store the activations of one branch instead of all. It supports
  only first derivatives.

  Args:
    function: `(params, rows, max_answer)` -> scalar.
    table: the rows.
    has_aux: whether the function returns (scalar, auxiliary), of the same
      shapes in all buckets. The auxiliary output has no derivative.

  Returns:
    `loss(params, batch)`, where `batch` is a number, or a table of one bucket
    for all its rows. It returns what the function returns.
  """

  def branch(bucket):
    def run(params, number):
      rows = table.take(bucket, number)
      return function(params, rows, table.max_answers[bucket])

    return run

  branches = [branch(i) for i in range(len(table.parts))]

  @jax.custom_vjp
  def switched(params, bucket, number):
    return jax.lax.switch(bucket, branches, params, number)

  def forward(params, bucket, number):
    gradients = [jax.value_and_grad(run, has_aux=has_aux) for run in branches]
    return jax.lax.switch(bucket, gradients, params, number)

  def backward(gradient, cotangent):
    slope = cotangent[0] if has_aux else cotangent
    scaled = lambda leaf: (slope * leaf).astype(leaf.dtype)
    return jax.tree.map(scaled, gradient), None, None

  switched.defvjp(forward, backward)

  def loss(params, batch):
    if isinstance(batch, Table):
      return function(params, all_rows(batch), batch.max_answers[0])
    if len(branches) == 1:
      return branches[0](params, batch)
    return switched(params, *table.place(batch))

  return loss


def split(batch: Any, micro_batches: int) -> Any:
  """Splits a batch for `bj.evaluation.accumulate`.

  Args:
    batch: a pytree of batch numbers, or a table, whose rows are divided.
    micro_batches: number of micro-batches.

  Returns:
    The batch with a leading axis of micro-batches. A batch number is split into
    consecutive numbers of smaller batches.
  """

  def split_leaf(leaf):
    leaf = jnp.asarray(leaf)
    if leaf.ndim == 0:  # A batch number, or the unused seed of a table.
      return leaf * micro_batches + jnp.arange(micro_batches, dtype=leaf.dtype)
    if leaf.shape[0] % micro_batches:
      raise harness.SettingsError(
        f'{leaf.shape[0]} rows are not divisible into {micro_batches} '
        'micro-batches.'
      )
    return leaf.reshape(micro_batches, -1, *leaf.shape[1:])

  return jax.tree.map(split_leaf, batch)
