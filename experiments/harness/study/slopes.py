"""Slopes of log error over log steps, with intervals over seeds."""

import numpy as np

from experiments.harness.study import report


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


def fit(steps: np.ndarray, values: np.ndarray) -> report.Interval:
  """Least squares of log mean over seeds on log steps.

  Args:
    steps: (points,).
    values: (points, seeds), positive.

  Returns:
    The slope with its 95 % interval by leaving out one seed after another.
  """
  position = np.log(steps) - np.log(steps).mean()

  def slope(seeds):
    return position @ np.log(values[:, seeds].mean(1)) / (position @ position)

  return report.jackknife_interval(slope, values.shape[1])
