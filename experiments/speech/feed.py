"""Batches of audio for a plan of steps with different losses.

The batch of a step has a part for each of its losses, 'ctc' with transcribed
utterances and 'ssl' with any utterances, all from one length bucket. The number
of compiled programs is that of buckets times kinds of steps. Each member of a
run (a seed) has its own rows and order; a batch has all members side by side.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from experiments import harness
from experiments.harness.store import files, identity
from experiments.harness.train import stream as stream_lib
from experiments.speech import audio

# Losses of a step, indexed by its code in a plan.
STEPS = (('ssl',), ('ctc', 'ssl'), ('ctc',))


class Examples(NamedTuple):
  """Utterances as arrays.

  Attributes:
    load: row -> samples (samples,) or frames (frames, numbers), float32.
    lengths: lengths of the leading axes, int (examples,).
    labels: int32 arrays, empty without a transcript.
    names: names of the utterances, for messages.
    texts: transcripts; None if missing.
    parts: file parts that `load` reads; () if the audio is in memory.
  """

  load: Callable[[int], np.ndarray]
  lengths: np.ndarray
  labels: Sequence[np.ndarray]
  names: Sequence[str]
  texts: Sequence[str | None]
  parts: Sequence[audio.Part] = ()

  @property
  def max_labels(self) -> int:
    """Number of labels of the longest transcript, at least 1."""
    return max([1, *map(len, self.labels)])


def bucket_edges(
  lengths: np.ndarray, count: int, multiple: int
) -> tuple[int, ...]:
  """Computes ascending edges of buckets with equal numbers of examples.

  Args:
    lengths: lengths of the examples.
    count: largest number of buckets.
    multiple: edges are rounded up to multiples of it.

  Returns:
    The edges; the last one is at least the longest length.
  """
  cuts = np.quantile(lengths, np.arange(1, count + 1) / count, method='higher')
  return tuple(sorted({int(-(-c // multiple) * multiple) for c in cuts}))


def pad_and_stack(
  arrays: Sequence[np.ndarray], size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Pads arrays to `size` with zeros and stacks them; also returns lengths."""
  first = arrays[0]
  padded = np.zeros((len(arrays), size, *first.shape[1:]), first.dtype)
  for row, array in zip(padded, arrays, strict=True):
    row[: len(array)] = array
  return padded, np.array([len(array) for array in arrays], np.int32)


class Feed:
  """A stream for `harness.train` whose batches depend only on the step.

  Args:
    examples: the training examples.
    rows: rows of the losses 'ctc' and 'ssl', one array per member.
    plan: code in `STEPS` of each step.
    edges: edges of the buckets.
    batch_size: examples per loss and step.
    seeds: seeds of the members.
    threads: number of reading threads.
    prefetch: number of batches to read in advance.

  Raises:
    SettingsError: if only some members have rows in a bucket.
  """

  def __init__(
    self,
    examples: Examples,
    rows: Mapping[str, Sequence[np.ndarray]],
    plan: np.ndarray,
    *,
    edges: Sequence[int],
    batch_size: int,
    seeds: Sequence[int],
    threads: int = 2,
    prefetch: int = 16,
  ):
    self._examples, self._plan = examples, np.asarray(plan)
    self._edges, self._size = tuple(edges), batch_size
    self._seeds = tuple(seeds)
    self.batch_sizes = (batch_size,)
    self._max_labels = examples.max_labels
    # Names of unreadable utterances so far, with reasons.
    self.broken: dict[str, str] = {}
    buckets = np.searchsorted(self._edges, examples.lengths)
    # By loss, bucket and member.
    self._rows = {
      loss: [
        [np.asarray(r)[buckets[r] == b] for r in member_rows]
        for b in range(len(self._edges))
      ]
      for loss, member_rows in rows.items()
    }
    used = {loss for code in np.unique(self._plan) for loss in STEPS[code]}
    sizes = np.zeros(len(self._edges))
    for b in range(len(self._edges)):
      counts = [len(r) for loss in used for r in self._rows[loss][b]]
      if min(counts) == 0 < max(counts):
        raise harness.SettingsError(
          f'the length bucket up to {self._edges[b]} samples or frames has '
          'audio but no transcribed utterance: take fewer buckets, or more '
          'transcripts.'
        )
      sizes[b] = sum(len(r) for r in self._rows[max(used)][b])
    steps = len(self._plan)
    draw = stream_lib.spread(np.cumsum(sizes / sizes.sum())[:-1], seed=0)
    self._bucket = draw(np.arange(steps))
    # Number of earlier batches of the loss in the step's bucket.
    self._number = {}
    for loss in used:
      has = np.array([loss in step for step in STEPS])[self._plan]
      before = np.zeros(steps, np.int64)
      for b in range(len(self._edges)):
        inside = self._bucket == b
        before[inside] = np.cumsum(has[inside]) - has[inside]
      self._number[loss] = before
    self._options = grain.ReadOptions(
      num_threads=threads, prefetch_buffer_size=prefetch
    )
    self._order = functools.lru_cache(4096)(self._draw_order)

  def description(self) -> dict[str, Any]:
    """Plain values that identify the batches, without the bytes of `files`."""
    return {
      'audio and transcripts': self._digest,
      'buckets': list(self._edges),
      'batch_size': self._size,
      'seeds': list(self._seeds),
    }

  @property
  def files(self) -> tuple[files.Path, ...]:
    """Audio files of the examples."""
    return tuple(dict.fromkeys(part.file for part in self._examples.parts))

  @functools.cached_property
  def _digest(self) -> str:
    examples = self._examples
    # Audio in files is identified by its place alone.
    contents: Iterator[Any] = (
      np.array([part.first, part.samples, part.from_rate, part.rate])
      for part in examples.parts
    )
    if not examples.parts:
      contents = map(self._load_or_empty, range(len(examples.lengths)))
    return identity.digest_examples(
      itertools.chain(
        contents, examples.labels, [(examples.lengths, self._rows, self._plan)]
      )
    )

  def _load_or_empty(self, row):
    try:
      return self._examples.load(row)
    except audio.AudioError:
      return ()  # `batch` replaces it.

  def waste(self) -> float:
    """Computes the fraction of padding in all batches."""
    used = padded = 0.0
    for loss in self._number:
      for edge, member_rows in zip(self._edges, self._rows[loss], strict=True):
        lengths = [self._examples.lengths[r] for r in member_rows]
        used += sum(map(np.sum, lengths))
        padded += sum(map(len, lengths)) * edge
    return float(1 - used / padded)

  def _draw_order(self, loss, bucket, member, epoch):
    rows = self._rows[loss][bucket][member]
    key = [self._seeds[member], loss == 'ssl', bucket, epoch]
    return np.random.default_rng(key).permutation(rows)

  def _batch_rows(self, loss, bucket, member, number):
    """Rows of a batch; each epoch has each row once."""
    count = len(self._rows[loss][bucket][member])
    places = number * self._size + np.arange(self._size)
    return [
      self._order(loss, bucket, member, int(place // count))[place % count]
      for place in places
    ]

  def _part(self, loss, bucket, member, number):
    rows = self._batch_rows(loss, bucket, member, number)
    arrays = []
    for i, row in enumerate(rows):
      try:
        arrays.append(self._examples.load(int(row)))
      except audio.AudioError as error:
        rows[i], array = self._replacement(loss, bucket, member, row, error)
        arrays.append(array)
    padded, length = pad_and_stack(arrays, self._edges[bucket])
    part = {'audio': padded, 'length': length}
    if loss == 'ctc':
      labels = [self._examples.labels[int(row)] for row in rows]
      part['labels'], part['label_length'] = pad_and_stack(
        labels, self._max_labels
      )
    return part

  def _replacement(self, loss, bucket, member, row, error):
    """The next readable row of the bucket, always the same for a row."""
    name = self._examples.names[int(row)]
    if name not in self.broken:
      self.broken[name] = error.reason
      print(f'{name} is left out: {error}', file=sys.stderr, flush=True)
    candidates = self._rows[loss][bucket][member]
    start = int(np.searchsorted(candidates, row))
    for other in np.roll(candidates, -start)[1:]:
      try:
        return other, self._examples.load(int(other))
      except audio.AudioError:
        continue
    raise error

  def batch(self, step: int) -> dict[str, dict[str, np.ndarray]]:
    """Reads the batch of a step; leaves are (batch, members, ...)."""
    bucket, batch = int(self._bucket[step]), {}
    for loss in STEPS[self._plan[step]]:
      number = int(self._number[loss][step])
      parts = [
        self._part(loss, bucket, member, number)
        for member in range(len(self._seeds))
      ]
      batch[loss] = jax.tree.map(lambda *xs: np.stack(xs, axis=1), *parts)
    return batch

  def batches(
    self, first: int, sharding: jax.sharding.Sharding | None = None
  ) -> Iterator[Any]:
    """Yields batches on the device from step `first`; see `harness.Stream`."""
    dataset = grain.MapDataset.range(first, len(self._plan)).map(
      lambda step: self.batch(int(step))
    )
    for batch in iter(dataset.to_iter_dataset(self._options)):
      yield stream_lib.put(batch, self._size, 0, sharding)


def select_member(streamed: Any, member: Any) -> Any:
  """Selects one member's part of a batch."""
  return jax.tree.map(lambda leaf: leaf[:, member], streamed)
