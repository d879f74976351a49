"""Searches of a grid, which grows where the best point lies at its edge."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Point = dict[str, float]


class Axis(NamedTuple):
  """The tried values of one hyperparameter.

  Attributes:
    values: in rising order.
    bounds: the ends of its range: a choice there is not at an edge.
      An axis whose ends are its bounds is never widened.
  """

  values: tuple[float, ...]
  bounds: tuple[float, float] = (0.0, math.inf)

  def side(self, value: float) -> int:
    """-1 or 1 if a value is at an edge, else 0; alone, it was not chosen."""
    low, high = self.values[0], self.values[-1]
    if low == high:
      return 0
    if value == low > self.bounds[0]:
      return -1
    return int(value == high < self.bounds[1])

  def widened(self, side: int) -> 'Axis':
    """With one more value at a side: the next of the progression there."""
    end, inner = self.values[::side][-1], self.values[::side][-2]
    # If some values are not positive, differences are continued.
    new = end * end / inner if self.values[0] > 0 else 2 * end - inner
    new = min(max(float(f'{new:.3g}'), self.bounds[0]), self.bounds[1])
    if all(isinstance(x, int) for x in self.values):
      new = round(new)  # What is counted stays whole.
    return self._replace(values=tuple(sorted({*self.values, new})))


def among(values: Sequence[float]) -> Axis:
  """An axis of choices that nothing lies beyond."""
  return Axis(tuple(values), (min(values), max(values)))


class Trial(NamedTuple):
  """A point that was tried.

  Attributes:
    point: hyperparameters by name.
    score: higher is better; -inf if a seed of it became non-finite.
    trained: the run that it was part of; None if all of that stopped.
    members: its members there, int (tuning seeds,).
  """

  point: Point
  score: float
  trained: Any
  members: np.ndarray


Grid = Mapping[str, Axis | Sequence[float]]


def search(
  grid: Grid,
  try_points: Callable[[list[Point], int], list[Trial]],
  *,
  widenings: int = 3,
  all_points: bool = True,
) -> tuple[Trial, tuple[str, ...], list[Trial]]:
  """Tries a grid, and widens the axes at whose ends the best point lies.

  Args:
    grid: tried values by hyperparameter.
    try_points: from points and how often there was a widening before to their
      trials; it is never asked for a point again.
    widenings: how often an axis may grow.
    all_points: whether all points of a wider grid are tried. If not, only those
      that have, on each widened axis, its new value or the chosen one, and on
      the others what is chosen: few, however many axes there are.

  Returns:
    The trial that is chosen, the hyperparameters whose choice is at an edge of
    what was tried, and all trials.
  """
  axes, trials = as_axes(grid), []
  ranges = {name: axis.values for name, axis in axes.items()}
  for widening in range(widenings + 1):
    points = [
      dict(zip(ranges, values, strict=True))
      for values in itertools.product(*ranges.values())
    ]
    tried = [trial.point for trial in trials]
    points = [point for point in points if point not in tried]
    if not points:  # A whole number has nothing beyond it.
      break
    trials += try_points(points, widening)
    chosen, sides = _choose(trials, axes)
    if not any(sides.values()) or not math.isfinite(chosen.score):
      break
    axes |= {n: axes[n].widened(side) for n, side in sides.items() if side}
    # What is chosen at an end stands next to the new end.
    ends = {-1: slice(0, 2), 1: slice(-2, None)}
    ranges = {
      name: axis.values
      if all_points
      else axis.values[ends[side]]
      if (side := sides[name])
      else (chosen.point[name],)
      for name, axis in axes.items()
    }
  return chosen, tuple(name for name, side in sides.items() if side), trials


def _choose(trials, axes):
  sides = lambda trial: {n: axes[n].side(x) for n, x in trial.point.items()}
  inner = lambda trial: -sum(map(abs, sides(trial).values()))
  # Of equals, one that is not at an edge.
  chosen = max(trials, key=lambda trial: (trial.score, inner(trial)))
  return chosen, sides(chosen)


def as_axes(grid: Grid) -> dict[str, Axis]:
  """Axes by hyperparameter; bare values are sorted."""
  return {
    name: axis if isinstance(axis, Axis) else Axis(tuple(sorted(axis)))
    for name, axis in grid.items()
  }


def count_points(axes: Mapping[str, Axis]) -> int:
  """The points of a grid."""
  return math.prod(len(axis.values) for axis in axes.values())
