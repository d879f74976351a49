"""Speedup of several workers to a target of a learning curve."""

import numpy as np

from experiments import harness


def running_average(means: np.ndarray, window: int) -> np.ndarray:
  """Running average over the last records.

  Args:
    means: mean per record, (records, ...).
    window: number of records to average; at the start, all records so far.

  Returns:
    An array of the same shape.
  """
  total = np.cumsum(np.asarray(means, np.float64), axis=0)
  before = np.zeros_like(total)
  before[window:] = total[:-window] if window < len(total) else 0
  count = np.minimum(np.arange(1, len(total) + 1), window)
  return (total - before) / count.reshape(-1, *[1] * (total.ndim - 1))


def first_at(curve: np.ndarray, steps: np.ndarray, target: float) -> float:
  """The step at which a curve first reaches a target; infinity if never."""
  reached = np.flatnonzero(np.asarray(curve) >= target)
  return float(steps[reached[0]]) if reached.size else float('inf')


def speedup(
  one: np.ndarray,
  many: np.ndarray,
  workers: int,
  steps: np.ndarray,
  target: float,
) -> harness.Interval:
  """Speedup of N workers to a target, in samples per worker.

  This is N times the updates of one worker over those of N workers. Both are
  read from mean curves, because single runs differ by a quarter.

  Args:
    one: running averages with one worker, (records, runs).
    many: running averages with several workers, (records, runs).
    workers: number of workers N.
    steps: updates at each record.
    target: value that both curves have to reach.

  Returns:
    The speedup with its 95 % jackknife interval over runs; 0 if only N workers
    miss the target, NaN if one worker misses it.
  """

  def value(runs):
    base = first_at(one[:, runs].mean(1), steps, target)
    updates = first_at(many[:, runs].mean(1), steps, target)
    return workers * base / updates if np.isfinite(base) else np.nan

  return harness.jackknife_interval(value, one.shape[1])
