"""Slopes of log error over log steps, with intervals over seeds."""

from typing import NamedTuple

import numpy as np


class Slope(NamedTuple):
  """A fitted exponent.

  Attributes:
    value: of the mean over seeds.
    low: end of the 95 % interval, by resampling seeds.
    high: the other end.
  """

  value: float
  low: float
  high: float

  def __str__(self) -> str:
    return f'{self.value:.3f} ({self.low:.3f} to {self.high:.3f})'


def log_bins(
  steps: np.ndarray, values: np.ndarray, *, first: float, bins: int
) -> tuple[np.ndarray, np.ndarray]:
  """Means over bins that are equally wide on a log scale.

  Args:
    steps: (records,), increasing.
    values: (records, seeds).
    first: the least step that counts; up to the last one.
    bins: how many; empty ones are left out.

  Returns:
    Geometric mean of the steps in each bin, and mean of values (bins, seeds).
  """
  keep = steps >= first
  steps, values = steps[keep], values[keep]
  edges = np.geomspace(first, steps[-1] * (1 + 1e-9), bins + 1)
  where = np.digitize(steps, edges[1:-1])
  found = sorted(set(where.tolist()))
  centres = np.array([np.exp(np.log(steps[where == b]).mean()) for b in found])
  means = np.stack([values[where == b].mean(0) for b in found])
  return centres, means


def fit(
  steps: np.ndarray, values: np.ndarray, *, draws: int = 1000, seed: int = 0
) -> Slope:
  """Least squares of log mean over seeds on log steps.

  Args:
    steps: (points,).
    values: (points, seeds), positive.
    draws: resamples of the seeds for the interval.
    seed: of the resampling.

  Returns:
    A `Slope`.
  """
  position = np.log(steps) - np.log(steps).mean()
  slope = lambda means: position @ np.log(means) / (position @ position)
  seeds = values.shape[1]
  rows = np.random.default_rng(seed).integers(seeds, size=(draws, seeds))
  drawn = slope(values[:, rows].mean(-1))
  low, high = np.quantile(drawn, [0.025, 0.975])
  return Slope(float(slope(values.mean(1))), float(low), float(high))
