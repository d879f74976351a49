"""Measures of scores that should be low for unsafe rows."""

from collections.abc import Callable

import numpy as np

from experiments import harness


def auroc(scores: np.ndarray, unsafe: np.ndarray) -> float:
  """Area under the ROC curve; ties count half.

  Args:
    scores: higher for rows to keep, (rows,).
    unsafe: which rows are unsafe, bool (rows,).

  Returns:
    In [0, 1], 1/2 by chance; NaN without rows of both kinds.
  """
  scores, unsafe = np.asarray(scores, np.float64), np.asarray(unsafe, bool)
  if unsafe.all() or not unsafe.any():
    return float('nan')
  _, index, count = np.unique(scores, return_inverse=True, return_counts=True)
  rank = (np.cumsum(count) - (count - 1) / 2)[index]
  bad = unsafe.sum()
  below = rank[~unsafe].sum() - (~unsafe).sum() * ((~unsafe).sum() + 1) / 2
  return float(below / (bad * (~unsafe).sum()))


def auprc(scores: np.ndarray, unsafe: np.ndarray) -> float:
  """Average precision of low scores as a detector of unsafe rows.

  Args:
    scores: higher for rows to keep, (rows,); equal scores share a threshold.
    unsafe: which rows are unsafe, bool (rows,).

  Returns:
    In [0, 1], by chance the fraction of unsafe rows; NaN without unsafe rows.
  """
  scores, unsafe = np.asarray(scores, np.float64), np.asarray(unsafe, bool)
  if not unsafe.any():
    return float('nan')
  order = np.argsort(scores, kind='stable')
  ends = np.flatnonzero(np.append(np.diff(scores[order]) > 0, True))
  hits = np.cumsum(unsafe[order])[ends]
  gains = np.diff(np.concatenate([[0], hits]))
  return float(np.sum(gains * hits / (ends + 1)) / unsafe.sum())


def keep_highest(scores: np.ndarray, fraction: float) -> np.ndarray:
  """Selects a fraction of the rows by the highest scores, bool (rows,).

  Rows whose score is NaN are dropped; of equal scores the first are kept.
  """
  scores = np.asarray(scores, np.float64)
  scored = np.flatnonzero(~np.isnan(scores))
  order = scored[np.argsort(-scores[scored], kind='stable')]
  mask = np.zeros(len(scores), bool)
  mask[order[: round(fraction * len(scored))]] = True
  return mask


def drop_rates(
  scores: np.ndarray, unsafe: np.ndarray, fraction: float
) -> dict[str, float]:
  """Fractions of unsafe and of clean rows that are dropped."""
  dropped, unsafe = ~keep_highest(scores, fraction), np.asarray(unsafe, bool)
  mean = lambda which: float(dropped[which].mean()) if which.any() else np.nan
  return {'unsafe_drop': mean(unsafe), 'clean_drop': mean(~unsafe)}


def resampled(
  measure: Callable[[np.ndarray, np.ndarray], float],
  scores: np.ndarray,
  unsafe: np.ndarray,
  *,
  draws: int = 500,
) -> harness.Interval:
  """A measure with its 95 % bootstrap interval, stratified by kind of row.

  Args:
    measure: (scores, unsafe) -> value.
    scores: (rows,).
    unsafe: bool (rows,).
    draws: number of resamples.
  """
  rng = np.random.default_rng(0)
  kinds = [np.flatnonzero(unsafe == kind) for kind in (False, True)]
  values = []
  for _ in range(draws):
    at = np.concatenate([rng.choice(kind, len(kind)) for kind in kinds])
    values.append(measure(scores[at], unsafe[at]))
  low, high = map(float, np.quantile(values, [0.025, 0.975]))
  value = measure(scores, unsafe)
  return harness.Interval(value, (high - low) / 2, 1, 1, ends=(low, high))


AREAS = {'auroc': auroc, 'auprc': auprc}
