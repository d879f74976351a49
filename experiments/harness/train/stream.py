"""Batches that the host makes, for data that does not fit on the device.

Step k always gets the same batch, whatever was killed in between: the order of
examples is a function of a seed. Grain shuffles, reads ahead in threads, and
mixes batches of several lengths in proportion to their numbers.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from experiments.harness.app import errors
from experiments.harness.store import files as files_lib
from experiments.harness.store import identity

# Threads that read ahead, and batches that they are ahead.
_THREADS, _AHEAD = 4, 8
# 2^32 over the golden ratio, whose multiples fill the circle evenly.
_STRIDE = 2654435769


class Stream:
  """Shuffled batches of the examples of a source, for ever.

  Every example comes once in an epoch of its bucket. Of several processes,
  each reads its own part of a batch only.

  Args:
    source: examples by index: anything with `len` and `[]` of a whole number,
      such as a list, or `grain.MapDataset.source(...).map(...)`. An example is
      a pytree of arrays.
    batch_size: examples in a batch of all processes together; with buckets
      also one number for each of them.
    seed: of the order.
    lengths: of the examples, (examples,), where they differ.
    buckets: lengths to which batches are padded, rising; a batch holds examples
      of one bucket, and each bucket compiles one program.
    pad: for the keys of an example, which is then a mapping, whose arrays have
      a leading axis of its length: the value with which it is filled up.
    files: paths of the files that a source reads examples from when they are
      asked for. Then a run is identified by the bytes of these files, which is
      faster than to decode all examples at its start.

  Raises:
    SettingsError: if an example fits no bucket, or a batch has more examples
      than its bucket.
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
    given = np.atleast_1d(batch_size).tolist()
    self.batch_sizes = tuple(given * (len(self._buckets) // len(given)))
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
    self._options = grain.ReadOptions(
      num_threads=_THREADS, prefetch_buffer_size=_AHEAD
    )

  @property
  def steps_per_epoch(self) -> float:
    """Batches after which each example has come once, on average."""
    return sum(
      len(rows) / size for rows, size in zip(self._rows, self.batch_sizes)
    )

  def description(self) -> dict[str, Any]:
    """What batches depend on, without the bytes of `files`, as plain values."""
    return {
      'digest': self._digest,
      'examples': [len(rows) for rows in self._rows],
      'batch_sizes': list(self.batch_sizes),
      'buckets': list(self._buckets),
      'seed': self._seed,
    }

  @functools.cached_property
  def _digest(self) -> str:
    # Of a source that reads files, only how the first examples are decoded.
    count = min(len(self._source), 3) if self.files else len(self._source)
    examples = (self._source[i] for i in range(count))
    return identity.digest_examples(itertools.chain(examples, [self._rows]))

  def batches(
    self, first: int, sharding: jax.sharding.Sharding | None = None
  ) -> Iterator[Any]:
    """Batches on the device, from step `first` on.

    Args:
      first: steps taken so far.
      sharding: of the axis of examples; None for one device.

    Yields:
      One batch after the other, the next one on its way.
    """
    made = [
      self._of_bucket(i, sharding)
      for i, rows in enumerate(self._rows)
      if len(rows)
    ]
    shares = [
      len(rows) / size
      for rows, size in zip(self._rows, self.batch_sizes)
      if len(rows)
    ]
    mixed = grain.MapDataset.mix(made, shares)
    on_host = iter(mixed[first:].to_iter_dataset(self._options))
    on_device = (put(batch, *about, sharding) for batch, about in on_host)
    for this, _ in itertools.pairwise(on_device):
      yield this

  def _of_bucket(self, i: int, sharding: Any) -> Any:
    size, length = self.batch_sizes[i], self._buckets[i]
    low, high = _share(size, sharding)

    def make(rows):
      examples = [self._source[int(row)] for row in rows[low:high]]
      filled = {
        name: _filled([x[name] for x in examples], length, value)
        for name, value in self._pad.items()
      }
      if filled:
        examples = [
          {name: x[name] for name in x if name not in filled} for x in examples
        ]
      batch = jax.tree.map(lambda *leaves: np.stack(leaves), *examples)
      return batch | filled if filled else batch, (size, low)

    rows = grain.MapDataset.source(self._rows[i]).seed(self._seed + i)
    # As good as for ever; endless ones overflow in batches of one.
    epochs = 2**40 // len(self._source)
    return rows.shuffle().repeat(epochs).batch(size).map(make)


def _share(size: int, sharding: Any) -> tuple[int, int]:
  """The rows of a batch that this process needs: from, to."""
  if sharding is None:
    return 0, size
  found = [
    rows.indices(size)[:2]
    for (rows,) in sharding.addressable_devices_indices_map((size,)).values()
  ]
  return min(low for low, _ in found), max(high for _, high in found)


def put(batch: Any, size: int, low: int, sharding: Any) -> Any:
  """Puts a batch on its devices.

  Args:
    batch: arrays with a leading axis of examples.
    size: examples in the batch of all processes.
    low: which of them is the first here.
    sharding: of that axis; None for one device.

  Returns:
    Arrays on the devices.
  """
  if sharding is None:
    return jax.device_put(batch)

  def put(leaf):
    def part(index):
      start, stop, _ = index[0].indices(size)
      return leaf[start - low : stop - low]

    shape = (size, *leaf.shape[1:])
    return jax.make_array_from_callback(shape, sharding, part)

  return jax.tree.map(put, batch)


def _filled(arrays: Sequence[Any], length: int, value: Any) -> np.ndarray:
  """Arrays of several lengths in one, with a value where they end."""
  first = np.asarray(arrays[0])
  shape = len(arrays), length, *first.shape[1:]
  out = np.full(shape, value, first.dtype)
  for row, array in zip(out, arrays, strict=True):
    row[: len(array)] = array
  return out


def spread(edges: Any, *, seed: int) -> Callable[[np.ndarray], np.ndarray]:
  """Draws that have their shares, to within a few, in any stretch of steps.

  Args:
    edges: between the shares of [0, 1), rising, one fewer than there are.
    seed: of where they begin.

  Returns:
    A function from steps to places, int arrays.
  """
  first = np.uint64(np.random.default_rng(seed).integers(2**32))

  def drawn(steps):
    # Whole numbers that wrap around: as even late as early.
    turned = np.asarray(steps).astype(np.uint64) * np.uint64(_STRIDE) + first
    return np.digitize((turned % 2**32) / 2**32, edges)

  return drawn
