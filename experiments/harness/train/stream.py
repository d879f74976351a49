"""Batches from the host, for data that exceeds the memory of a device.

The batch of step k depends on the seed only, not on kills in between. Grain
shuffles, reads ahead in threads, and mixes batches of several lengths in
proportion to their numbers.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.app import errors
from experiments.harness.store import files as files_lib
from experiments.harness.store import identity

_THREADS, _PREFETCHED = 4, 8
# 2^32 over the golden ratio: its multiples fill a circle evenly.
_STRIDE = 2654435769


class Stream:
  """An endless stream of shuffled batches.

  Each example occurs once in an epoch of its bucket. With several processes,
  each reads only its part of a batch.

  Args:
    source: examples by index: a list, `grain.MapDataset.source(...).map(...)`,
      or any object with `len` and integer indices. An example is a pytree of
      arrays.
    batch_size: examples in a batch of all processes together, or one number per
      bucket.
    seed: seed of the order.
    lengths: lengths of the examples, (examples,), if they differ.
    buckets: ascending lengths to which batches are padded. A batch has examples
      of one bucket, and each bucket compiles a program.
    pad: padding values by key; an example is then a mapping, and its arrays
      under these keys have a leading axis of its length.
    files: files from which the source reads examples on demand. Their bytes
      then identify the run, which is faster than decoding all examples at the
      start.

  Raises:
    SettingsError: if an example fits no bucket, or a bucket has fewer examples
      than a batch.
  """

  def __init__(
    self,
    source: Sequence[Any],
    batch_size: int | Sequence[int],
    *,
    seed: int = 0,
    lengths: Any = None,
    buckets: Sequence[int] = (),
    pad: Mapping[str, Any] | None = None,
    files: Sequence[files_lib.Path] = (),
  ):
    if bool(buckets) != (lengths is not None) or bool(buckets) != bool(pad):
      raise errors.SettingsError(
        'a stream takes buckets, lengths and pad together, or none of them.'
      )
    self._source, self._seed, self._pad = source, seed, dict(pad or {})
    self.files = tuple(files)
    self._buckets: tuple[int | None, ...] = tuple(buckets) or (None,)
    sizes = np.atleast_1d(batch_size).tolist()
    self.batch_sizes = tuple(sizes * (len(self._buckets) // len(sizes)))
    which = np.zeros(len(source), np.int64)
    if lengths is not None:
      which = np.searchsorted(buckets, np.asarray(lengths))
      if len(which) != len(source) or which.max(initial=0) >= len(buckets):
        raise errors.SettingsError(
          f'{len(source)} examples, {len(which)} lengths, the largest '
          f'{np.max(lengths)}: one each is needed, at most {buckets[-1]}, the '
          'largest bucket.'
        )
    self._rows = [np.flatnonzero(which == i) for i in range(len(self._buckets))]
    if len(self.batch_sizes) != len(self._buckets):
      raise errors.SettingsError('give one batch size, or one for each bucket.')
    for rows, size in zip(self._rows, self.batch_sizes, strict=True):
      if size < 1 or 0 < len(rows) < size:
        raise errors.SettingsError(
          f'batches of {size} cannot be made of {len(rows)} examples: give a '
          'batch_size between 1 and their number.'
        )

  @property
  def steps_per_epoch(self) -> float:
    """The number of batches in an epoch."""
    return sum(
      len(rows) / size for rows, size in zip(self._rows, self.batch_sizes)
    )

  def description(self) -> dict[str, Any]:
    """Returns what the batches depend on, except for the bytes of `files`."""
    return {
      'digest': self._digest,
      'examples': [len(rows) for rows in self._rows],
      'batch_sizes': list(self.batch_sizes),
      'buckets': list(self._buckets),
      'seed': self._seed,
    }

  def batch_shapes(self) -> Any:
    """Returns shapes of a batch, of the shortest bucket with examples."""
    i = next(i for i, rows in enumerate(self._rows) if len(rows))
    one = self._batch(self._rows[i][:1], self._buckets[i])
    size = self.batch_sizes[i]
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), jnp.result_type(x)),
      one,
    )

  @functools.cached_property
  def _digest(self) -> str:
    # With files, the first examples show how they are decoded.
    count = min(len(self._source), 3) if self.files else len(self._source)
    examples = (self._source[i] for i in range(count))
    return identity.digest_examples(itertools.chain(examples, [self._rows]))

  def batches(
    self, first: int, sharding: jax.sharding.Sharding | None = None
  ) -> Iterator[Any]:
    """Yields batches on the device.

    Args:
      first: steps taken so far.
      sharding: sharding of the axis of examples; None for one device.

    Yields:
      Batches; the next one is transferred meanwhile.
    """
    import grain  # Slow to import, and most runs have no stream.

    options = grain.ReadOptions(
      num_threads=_THREADS, prefetch_buffer_size=_PREFETCHED
    )
    filled = [i for i, rows in enumerate(self._rows) if len(rows)]
    mixed = grain.MapDataset.mix(
      [self._bucket(i, sharding) for i in filled],
      [len(self._rows[i]) / self.batch_sizes[i] for i in filled],
    )
    on_host = iter(mixed[first:].to_iter_dataset(options))
    on_device = (put(batch, *rows, sharding) for batch, rows in on_host)
    for batch, _ in itertools.pairwise(on_device):
      yield batch

  def _bucket(self, i: int, sharding: Any) -> Any:
    import grain

    size, length = self.batch_sizes[i], self._buckets[i]
    low, high = _own_rows(size, sharding)

    def make(rows):
      return self._batch(rows[low:high], length), (size, low)

    rows = grain.MapDataset.source(self._rows[i]).seed(self._seed + i)
    # Practically endless; really endless ones overflow in batches of one.
    epochs = 2**40 // len(self._source)
    return rows.shuffle().repeat(epochs).batch(size).map(make)

  def _batch(self, rows: Any, length: int | None) -> Any:
    """Reads examples, and stacks them."""
    examples = [self._source[int(row)] for row in rows]
    padded = {
      name: _pad([x[name] for x in examples], length, value)
      for name, value in self._pad.items()
    }
    if padded:
      examples = [
        {name: x[name] for name in x if name not in padded} for x in examples
      ]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *examples)
    return batch | padded if padded else batch


def _own_rows(size: int, sharding: Any) -> tuple[int, int]:
  """Returns the first and the end of the batch's rows of this process."""
  if sharding is None:
    return 0, size
  ranges = [
    rows.indices(size)[:2]
    for (rows,) in sharding.addressable_devices_indices_map((size,)).values()
  ]
  return min(low for low, _ in ranges), max(high for _, high in ranges)


def put(batch: Any, size: int, low: int, sharding: Any) -> Any:
  """Transfers a batch to its devices.

  Args:
    batch: arrays with a leading axis of examples.
    size: number of examples in the batch of all processes.
    low: index of the first example of this process.
    sharding: sharding of the leading axis; None for one device.

  Returns:
    Arrays on the devices.
  """
  if sharding is None:
    return jax.device_put(batch)

  def put_leaf(leaf):
    def part(index):
      start, stop, _ = index[0].indices(size)
      return leaf[start - low : stop - low]

    shape = (size, *leaf.shape[1:])
    return jax.make_array_from_callback(shape, sharding, part)

  return jax.tree.map(put_leaf, batch)


def _pad(arrays: Sequence[Any], length: int, value: Any) -> np.ndarray:
  """Stacks arrays of several lengths, padded with a value."""
  first = np.asarray(arrays[0])
  shape = len(arrays), length, *first.shape[1:]
  out = np.full(shape, value, first.dtype)
  for row, array in zip(out, arrays, strict=True):
    row[: len(array)] = array
  return out


def spread(edges: Any, *, seed: int) -> Callable[[np.ndarray], np.ndarray]:
  """Makes low-discrepancy draws from intervals of [0, 1).

  Any range of steps draws each interval about as often as its length says.

  Args:
    edges: ascending inner edges of the intervals.
    seed: seed of the offset.

  Returns:
    A function from steps to indices of intervals, int arrays.
  """
  offset = np.uint64(np.random.default_rng(seed).integers(2**32))

  def draw(steps):
    # Integers that wrap around lose no precision at late steps.
    angles = np.asarray(steps).astype(np.uint64) * np.uint64(_STRIDE) + offset
    return np.digitize((angles % 2**32) / 2**32, edges)

  return draw
