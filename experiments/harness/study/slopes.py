"""Convergence rates: slopes of log error over log steps."""

import numpy as np

from experiments.harness.study import report


def log_bins(
  steps: np.ndarray, values: np.ndarray, *, first: float, bins: int
) -> tuple[np.ndarray, np.ndarray]:
  """Averages values over bins of equal width on a log scale.

  Args:
    steps: (records,), increasing.
    values: (records, seeds).
    first: first step to use.
    bins: number of bins; empty ones are left out.

  Returns:
    Geometric mean of the steps of each bin, and mean of the values (bins,
    seeds).
  """
  keep = steps >= first
  steps, values = steps[keep], values[keep]
  edges = np.geomspace(first, steps[-1] * (1 + 1e-9), bins + 1)
  where = np.digitize(steps, edges[1:-1])
  filled = np.unique(where)
  centres = np.array([np.exp(np.log(steps[where == b]).mean()) for b in filled])
  means = np.stack([values[where == b].mean(0) for b in filled])
  return centres, means


def fit(steps: np.ndarray, values: np.ndarray) -> report.Interval:
  """Fits the slope of the log of the mean over seeds by least squares.

  Args:
    steps: (points,).
    values: (points, seeds), positive.

  Returns:
    The slope with its 95 % jackknife interval.
  """
  position = np.log(steps) - np.log(steps).mean()

  def slope(seeds):
    return position @ np.log(values[:, seeds].mean(1)) / (position @ position)

  return report.jackknife_interval(slope, values.shape[1])
