"""When a curve arrives, and how much sooner it does with more workers."""

import numpy as np

from experiments import harness


def running_average(means: np.ndarray, window: int) -> np.ndarray:
  """The mean of the last records, of all of them before there are so many.

  Args:
    means: of each record, (records, ...).
    window: in records.

  Returns:
    An array of the same shape.
  """
  total = np.cumsum(np.asarray(means, np.float64), axis=0)
  before = np.zeros_like(total)
  before[window:] = total[:-window] if window < len(total) else 0
  count = np.minimum(np.arange(1, len(total) + 1), window)
  return (total - before) / count.reshape(-1, *[1] * (total.ndim - 1))


def first_at(curve: np.ndarray, steps: np.ndarray, target: float) -> float:
  """The updates after which a curve first is at a target; infinity if never."""
  reached = np.flatnonzero(np.asarray(curve) >= target)
  return float(steps[reached[0]]) if reached.size else float('inf')


def speedup(
  one: np.ndarray,
  many: np.ndarray,
  workers: int,
  steps: np.ndarray,
  target: float,
) -> harness.Interval:
  """How much sooner N workers arrive, in samples of one of them.

  N times the updates of one worker alone, over those of N together. Compared
  are means over runs: where single ones arrive differs by a quarter.

  Args:
    one: running averages of one worker alone, (records, runs).
    many: those of several together, of the same runs.
    workers: how many.
    steps: updates at each record.
    target: where both have to arrive.

  Returns:
    The speedup, 0 if N together never arrive and NaN if one alone does not,
    with its 95 % interval by leaving out one run after another.
  """

  def value(runs):
    alone = first_at(one[:, runs].mean(1), steps, target)
    together = first_at(many[:, runs].mean(1), steps, target)
    return workers * alone / together if np.isfinite(alone) else np.nan

  return harness.jackknife_interval(value, one.shape[1])
