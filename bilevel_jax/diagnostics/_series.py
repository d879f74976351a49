"""The losses of a run, and properties of one loss over its steps."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


def read_losses(history: Any) -> dict[str, np.ndarray]:
  """The losses of a history by name, float64 (steps,).

  Raises:
    TypeError: if it is neither a mapping of numbers nor a list of mappings.
    ValueError: if the losses have less than 8 steps, or lengths that differ.
  """
  expected = (
    'diagnose reads a history, [bj.values(state), ...] of at least 8 updates, '
    'or arrays (steps,) of one length by name'
  )
  if not isinstance(history, Mapping):
    rows = history if isinstance(history, list | tuple) else [history]
    for one in rows:
      if not isinstance(one, Mapping):
        raise TypeError(
          f'{expected}; got {type(history).__name__} of {type(one).__name__}: '
          'call history.append(bj.values(state)) after each update.'
        )
    names = set.intersection(*map(set, rows)) if rows else ()
    history = {name: [one[name] for one in rows] for name in names}
  known = ('upper', 'lower', 'gap', 'value', 'gap_rounding')
  try:
    losses = {
      name: np.asarray(history[name], np.float64)
      for name in known
      if name in history
    }
  except (TypeError, ValueError) as error:
    raise TypeError(f'{expected}; got other values: {error}.') from None
  shapes = {series.shape for series in losses.values()}
  if any(len(s) != 1 or s[0] < 8 for s in shapes) or len(shapes) > 1:
    raise ValueError(f'{expected}; got shapes {sorted(shapes)}.')
  return losses


class Series(NamedTuple):
  """One loss, step by step and by the means of blocks of steps.

  Attributes:
    steps: the loss in each step.
    means: the means of equal blocks of steps.
    room: the size of rounding errors.
  """

  steps: np.ndarray
  means: np.ndarray
  room: float

  @property
  def late(self) -> np.ndarray:
    """The second half of the steps."""
    return self.steps[len(self.steps) // 2 :]

  @property
  def late_means(self) -> np.ndarray:
    """The second half of the blocks."""
    return self.means[len(self.means) // 2 :]

  @property
  def span(self) -> float:
    """The range of the means, or a thousandth of their size if that is more.

    The second is for a loss that hardly changes.
    """
    size = float(np.abs(self.means).max())
    return max(float(np.ptp(self.means)), 1e-3 * size)


def make_series(steps: np.ndarray, room: float) -> Series:
  blocks = np.array_split(steps, min(16, len(steps)))
  return Series(steps, np.array([block.mean() for block in blocks]), room)


def _turns(steps: np.ndarray, room: float) -> float:
  """The share of steps at which a series changes direction."""
  change = np.diff(steps)
  change = change[np.abs(change) > room]
  if len(change) < 4:
    return 0.0
  return float(np.mean(change[1:] * change[:-1] < 0))


def oscillates(series: Series) -> bool:
  """Whether a loss oscillates, from step to step or in long waves."""
  if _turns(series.late, series.room) > 0.8:
    return True
  means = series.late_means
  # Noise varies far more between steps than between blocks.
  smooth = (
    np.abs(np.diff(means)).sum() > 0.3 * np.abs(np.diff(series.late)).sum()
  )
  large = np.ptp(means) > max(0.2 * series.span, series.room)
  return bool(smooth and large and _turns(means, series.room) > 0)


def explodes(series: Series) -> bool:
  """Whether a loss grew tenfold in each of the last two quarters."""
  _, before, then, now = (
    float(np.abs(part).max()) for part in np.array_split(series.steps, 4)
  )
  return now > 10 * then > 100 * before and now > 1e3 * series.room


def remaining_change(series: Series) -> float:
  """Extrapolates the remaining change of a loss; 0 if it is constant or noisy.

  It assumes geometric convergence of the means of the last three quarters, and
  is at most three times the last change.
  """
  if len(series.means) < 16:
    return 0.0
  before, now = np.diff(series.means.reshape(4, 4).mean(axis=1))[1:]
  at = np.arange(8)
  line = np.polyval(np.polyfit(at, series.late_means, 1), at)
  noise = float(np.std(series.late_means - line))
  if abs(now) <= max(3 * noise, series.room):
    return 0.0
  factor = now / before if abs(before) > abs(now) else 1.0
  factor = min(max(factor, 0.0), 0.75)
  return float(now * factor / (1 - factor))
