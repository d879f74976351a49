"""Batches of audio for the steps of a plan: what is not asked for is not read.

A step's batch has a part for each loss of that step, 'ctc' of utterances with
transcripts and 'ssl' of any, in one length bucket. So buckets times kinds of
steps are compiled, and no more. Every member of a run (a seed) has rows and an
order of its own, side by side in one batch.
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

# The losses of a step, by its code in a plan.
STEPS = (('ssl',), ('ctc', 'ssl'), ('ctc',))


class Examples(NamedTuple):
  """Utterances as arrays.

  Attributes:
    load: number -> samples (samples,) or frames (frames, numbers), float32.
    lengths: of the leading axes, int (examples,).
    labels: int32 arrays, empty where there is no transcript.
    names: of the utterances, for messages.
    texts: transcripts, None where there is none.
    parts: of the files that `load` reads; () where the audio is in memory.
  """

  load: Callable[[int], np.ndarray]
  lengths: np.ndarray
  labels: Sequence[np.ndarray]
  names: Sequence[str]
  texts: Sequence[str | None]
  parts: Sequence[audio.Part] = ()

  @property
  def most_labels(self) -> int:
    """Labels of the longest transcript, at least 1."""
    return max([1, *map(len, self.labels)])


def edges_of(lengths: np.ndarray, count: int, multiple: int) -> tuple[int, ...]:
  """Rising edges of buckets with equal numbers of examples.

  Args:
    lengths: of examples.
    count: of buckets, at most.
    multiple: to which edges are rounded up.

  Returns:
    The edges; the last holds the longest.
  """
  cuts = np.quantile(lengths, np.arange(1, count + 1) / count, method='higher')
  return tuple(sorted({int(-(-c // multiple) * multiple) for c in cuts}))


def side_by_side(
  arrays: Sequence[np.ndarray], size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Arrays of several lengths in one, with zeros at ends, and the lengths."""
  first = arrays[0]
  found = np.zeros((len(arrays), size, *first.shape[1:]), first.dtype)
  for row, array in zip(found, arrays, strict=True):
    row[: len(array)] = array
  return found, np.array([len(array) for array in arrays], np.int32)


class Feed:
  """A stream for `harness.train`: step k always has the same batch.

  Args:
    examples: all that is trained on.
    rows: of the two losses, by 'ctc' and 'ssl', one array of rows for each
      member.
    plan: codes of `STEPS`, one a step.
    edges: of the buckets.
    batch_size: examples of a loss in a step.
    seeds: of the members.
    threads: that read ahead.
    ahead: batches that are read ahead.

  Raises:
    SettingsError: if a member has no row of a bucket that another one has.
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
    ahead: int = 16,
  ):
    self._examples, self._plan = examples, np.asarray(plan)
    self._edges, self._size = tuple(edges), batch_size
    self._seeds = tuple(seeds)
    self.batch_sizes = (batch_size,)
    self._most = examples.most_labels
    # Names of what cannot be read, with reasons, as they are met.
    self.broken: dict[str, str] = {}
    which = np.searchsorted(self._edges, examples.lengths)
    # By loss, bucket and member.
    self._rows = {
      loss: [
        [np.asarray(r)[which[r] == b] for r in of_members]
        for b in range(len(self._edges))
      ]
      for loss, of_members in rows.items()
    }
    used = {loss for code in np.unique(self._plan) for loss in STEPS[code]}
    share = np.zeros(len(self._edges))
    for b in range(len(self._edges)):
      found = [len(r) for loss in used for r in self._rows[loss][b]]
      if min(found) == 0 < max(found):
        raise harness.SettingsError(
          f'no transcribed utterance of at most {self._edges[b]} samples or '
          'frames, though there is audio of this length: take fewer buckets, '
          'or more transcripts.'
        )
      share[b] = sum(len(r) for r in self._rows[max(used)][b])
    steps = len(self._plan)
    drawn = stream_lib.spread(np.cumsum(share / share.sum())[:-1], seed=0)
    self._bucket = drawn(np.arange(steps))
    # How often a loss had a batch of the step's bucket before.
    self._number = {}
    for loss in used:
      has = np.array([loss in step for step in STEPS])[self._plan]
      before = np.zeros(steps, np.int64)
      for b in range(len(self._edges)):
        mine = self._bucket == b
        before[mine] = np.cumsum(has[mine]) - has[mine]
      self._number[loss] = before
    self._options = grain.ReadOptions(
      num_threads=threads, prefetch_buffer_size=ahead
    )
    self._order = functools.lru_cache(4096)(self._order_of)

  def description(self) -> dict[str, Any]:
    """What batches depend on, without the bytes of `files`, as plain values."""
    return {
      'audio and transcripts': self._digest,
      'buckets': list(self._edges),
      'batch_size': self._size,
      'seeds': list(self._seeds),
    }

  @property
  def files(self) -> tuple[files.Path, ...]:
    """Files that audio is read from."""
    return tuple(dict.fromkeys(part.file for part in self._examples.parts))

  @functools.cached_property
  def _digest(self) -> str:
    examples = self._examples
    # Of what lies in files, only where.
    heard: Iterator[Any] = (
      np.array([part.first, part.samples, part.from_rate, part.rate])
      for part in examples.parts
    )
    if not examples.parts:
      heard = map(self._loaded, range(len(examples.lengths)))
    return identity.digest_examples(
      itertools.chain(
        heard, examples.labels, [(examples.lengths, self._rows, self._plan)]
      )
    )

  def _loaded(self, row):
    try:
      return self._examples.load(row)
    except audio.AudioError:
      return ()  # `batch` takes another one in its place.

  def waste(self) -> float:
    """The share of padding in what is computed, of all batches."""
    held = filled = 0.0
    for loss, number in self._number.items():
      del number
      for edge, of_members in zip(self._edges, self._rows[loss], strict=True):
        lengths = [self._examples.lengths[r] for r in of_members]
        held += sum(map(np.sum, lengths))
        filled += sum(map(len, lengths)) * edge
    return float(1 - held / filled)

  def _order_of(self, loss, bucket, member, epoch):
    rows = self._rows[loss][bucket][member]
    key = [self._seeds[member], loss == 'ssl', bucket, epoch]
    return np.random.default_rng(key).permutation(rows)

  def _taken(self, loss, bucket, member, number):
    """Rows of a batch: every row once an epoch."""
    count = len(self._rows[loss][bucket][member])
    places = number * self._size + np.arange(self._size)
    return [
      self._order(loss, bucket, member, int(place // count))[place % count]
      for place in places
    ]

  def _part(self, loss, bucket, member, number):
    rows = self._taken(loss, bucket, member, number)
    arrays = []
    for i, row in enumerate(rows):
      try:
        arrays.append(self._examples.load(int(row)))
      except audio.AudioError as error:
        # Another one in its place, the same each time.
        rows[i], array = self._instead(loss, bucket, member, row, error)
        arrays.append(array)
    found, length = side_by_side(arrays, self._edges[bucket])
    part = {'audio': found, 'length': length}
    if loss == 'ctc':
      labels = [self._examples.labels[int(row)] for row in rows]
      part['labels'], part['label_length'] = side_by_side(labels, self._most)
    return part

  def _instead(self, loss, bucket, member, row, error):
    name = self._examples.names[int(row)]
    if name not in self.broken:
      self.broken[name] = error.reason
      print(f'{name} is left out: {error}', file=sys.stderr, flush=True)
    mine = self._rows[loss][bucket][member]
    start = int(np.searchsorted(mine, row))
    for other in np.roll(mine, -start)[1:]:
      try:
        return other, self._examples.load(int(other))
      except audio.AudioError:
        continue
    raise error

  def batch(self, step: int) -> dict[str, dict[str, np.ndarray]]:
    """The batch of a step; leaves are (batch, members, ...)."""
    bucket, found = int(self._bucket[step]), {}
    for loss in STEPS[self._plan[step]]:
      number = int(self._number[loss][step])
      parts = [
        self._part(loss, bucket, member, number)
        for member in range(len(self._seeds))
      ]
      found[loss] = jax.tree.map(lambda *xs: np.stack(xs, axis=1), *parts)
    return found

  def batches(
    self, first: int, sharding: jax.sharding.Sharding | None = None
  ) -> Iterator[Any]:
    """Batches on the device, from step `first` on; see `harness.Stream`."""
    made = grain.MapDataset.range(first, len(self._plan)).map(
      lambda step: self.batch(int(step))
    )
    for batch in iter(made.to_iter_dataset(self._options)):
      yield stream_lib.put(batch, self._size, 0, sharding)


def of_member(streamed: Any, member: Any) -> Any:
  """A member's part of a batch."""
  return jax.tree.map(lambda leaf: leaf[:, member], streamed)
