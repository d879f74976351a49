"""One of several streams at a time: only the one that is drawn moves on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.harness.app import errors
from experiments.harness.store import files
from experiments.harness.train import stream

# 2^32 over the golden ratio, whose multiples fill the circle evenly.
_STRIDE = 2654435769


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


class OneOf:
  """Batches of one stream a step, as a dict of one: `{name: batch}`.

  For `bj.evaluation.select` with the rule `as_given`: each objective has its
  own data, of its own lengths, and what is not drawn is not read. Draws are
  evenly spread: in any stretch of steps, each stream has its share to within a
  few. Step k always gets the same batch, whatever was killed in between. It
  takes the place of a `Stream` in `train`.

  Args:
    streams: by the name of the objective.
    weights: of each, in the same order; above zero.
    seed: of the draws.

  Raises:
    SettingsError: if there is not one weight above zero for each stream.
  """

  def __init__(
    self,
    streams: Mapping[str, stream.Stream],
    weights: Sequence[float],
    *,
    seed: int = 0,
  ):
    self._streams = dict(streams)
    share = np.asarray(weights, np.float64)
    if share.shape != (len(self._streams),) or not np.all(
      np.isfinite(share) & (share > 0)
    ):
      raise errors.SettingsError(
        f'{len(self._streams)} streams take one weight above zero each, got '
        f'{list(weights)}.'
      )
    self._weights, self._seed = share.tolist(), seed
    self._spread = spread(np.cumsum(share / share.sum())[:-1], seed=seed)

  @property
  def batch_sizes(self) -> tuple[int, ...]:
    """Those of all streams."""
    return tuple(
      size for one in self._streams.values() for size in one.batch_sizes
    )

  @property
  def files(self) -> tuple[files.Path, ...]:
    """Files that examples of all streams are read from."""
    return tuple(path for one in self._streams.values() for path in one.files)

  def description(self) -> dict[str, Any]:
    """What batches depend on, as plain values."""
    told = {name: one.description() for name, one in self._streams.items()}
    return {'streams': told, 'weights': self._weights, 'seed': self._seed}

  def drawn(self, first: int, count: int) -> np.ndarray:
    """The places of the streams that steps from `first` on are of."""
    return self._spread(np.arange(first, first + count))

  def batches(
    self, first: int, sharding: jax.sharding.Sharding | None = None
  ) -> Iterator[Any]:
    """Batches on the device, from step `first` on; see `Stream.batches`."""
    taken = np.bincount(
      self.drawn(0, first), minlength=len(self._streams)
    ).tolist()
    made = {
      name: one.batches(taken[i], sharding)
      for i, (name, one) in enumerate(self._streams.items())
    }
    names = list(made)
    while True:
      for place in self.drawn(first, 1024):
        yield {names[place]: next(made[names[place]])}
      first += 1024
