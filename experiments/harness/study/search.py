"""Grid search that extends the grid while the best point is at an edge."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Point = dict[str, float]


class Axis(NamedTuple):
  """The values of a hyperparameter in a grid.

  Attributes:
    values: ascending values.
    bounds: ends of the valid range. A choice at a bound is not at an edge, and
      an axis is not extended beyond them.
  """

  values: tuple[float, ...]
  bounds: tuple[float, float] = (0.0, math.inf)

  def side(self, value: float) -> int:
    """Returns -1 or 1 if a value is at the lower or upper edge, else 0."""
    low, high = self.values[0], self.values[-1]
    if low == high:
      return 0
    if value == low > self.bounds[0]:
      return -1
    return int(value == high < self.bounds[1])

  def widened(self, side: int) -> 'Axis':
    """Returns the axis with one more value, which continues the progression."""
    end, inner = self.values[::side][-1], self.values[::side][-2]
    # The progression is geometric for positive values, otherwise arithmetic.
    new = end * end / inner if self.values[0] > 0 else 2 * end - inner
    new = min(max(float(f'{new:.3g}'), self.bounds[0]), self.bounds[1])
    if all(isinstance(x, int) for x in self.values):
      new = round(new)
    return self._replace(values=tuple(sorted({*self.values, new})))


def among(values: Sequence[float]) -> Axis:
  """Makes an axis that is not extended."""
  return Axis(tuple(values), (min(values), max(values)))


class Trial(NamedTuple):
  """The trial of a point.

  Attributes:
    point: hyperparameters by name.
    score: higher is better; -inf if a seed became non-finite.
    trained: the run with this point; None if all its members stopped.
    members: members of the point in the run, int (tuning seeds,).
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
  """Searches a grid, and extends the axes where the best point is at an edge.

  Args:
    grid: values by hyperparameter.
    try_points: from new points and the number of the extension to their trials.
    widenings: maximum number of extensions.
    all_points: whether to try all new points of an extended grid. If False,
      only the chosen point varied along the extended axes: its number of points
      does not grow with the number of axes.

  Returns:
    The best trial, the hyperparameters whose best value is at an edge, and all
    trials.
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
    if not points:  # Rounding gave an integer that was tried.
      break
    trials += try_points(points, widening)
    chosen, sides = _choose(trials, axes)
    if not any(sides.values()) or not math.isfinite(chosen.score):
      break
    axes |= {n: axes[n].widened(side) for n, side in sides.items() if side}
    # A value chosen at an end is now next to the new end.
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
  # Prefers points away from edges among equals.
  chosen = max(trials, key=lambda trial: (trial.score, inner(trial)))
  return chosen, sides(chosen)


def as_axes(grid: Grid) -> dict[str, Axis]:
  """Converts values to axes, in ascending order."""
  return {
    name: axis if isinstance(axis, Axis) else Axis(tuple(sorted(axis)))
    for name, axis in grid.items()
  }


def count_points(axes: Mapping[str, Axis]) -> int:
  """Counts the points of a grid."""
  return math.prod(len(axis.values) for axis in axes.values())
