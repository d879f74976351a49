"""How well a score tells unsafe rows from others; what is low is dropped."""

from collections.abc import Callable

import numpy as np

from experiments import harness


def auroc(scores: np.ndarray, unsafe: np.ndarray) -> float:
  """How often a row that is not unsafe has the higher score; ties are half.

  Args:
    scores: higher for rows to keep, (rows,).
    unsafe: which rows are, (rows,) of bool.

  Returns:
    In [0, 1], 1/2 for a coin; NaN without rows of both kinds.
  """
  scores, unsafe = np.asarray(scores, np.float64), np.asarray(unsafe, bool)
  if unsafe.all() or not unsafe.any():
    return float('nan')
  _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
  rank = (np.cumsum(count) - (count - 1) / 2)[place]
  bad = unsafe.sum()
  below = rank[~unsafe].sum() - (~unsafe).sum() * ((~unsafe).sum() + 1) / 2
  return float(below / (bad * (~unsafe).sum()))


def auprc(scores: np.ndarray, unsafe: np.ndarray) -> float:
  """Mean precision of the rows of low scores in being unsafe.

  Args:
    scores: higher for rows to keep, (rows,); equal ones are taken together.
    unsafe: which rows are, (rows,) of bool.

  Returns:
    In [0, 1]; for a coin the share of unsafe rows; NaN without any.
  """
  scores, unsafe = np.asarray(scores, np.float64), np.asarray(unsafe, bool)
  if not unsafe.any():
    return float('nan')
  order = np.argsort(scores, kind='stable')
  ends = np.flatnonzero(np.append(np.diff(scores[order]) > 0, True))
  found = np.cumsum(unsafe[order])[ends]
  gained = np.diff(np.concatenate([[0], found]))
  return float(np.sum(gained * found / (ends + 1)) / unsafe.sum())


def kept(scores: np.ndarray, share: float) -> np.ndarray:
  """The rows that are kept, (rows,) of bool: a share of the highest scores.

  Rows without a score, NaN, are not kept; of equal ones the first are.
  """
  scores = np.asarray(scores, np.float64)
  there = np.flatnonzero(~np.isnan(scores))
  order = there[np.argsort(-scores[there], kind='stable')]
  found = np.zeros(len(scores), bool)
  found[order[: round(share * len(there))]] = True
  return found


def drop_rates(
  scores: np.ndarray, unsafe: np.ndarray, share: float
) -> dict[str, float]:
  """The shares of unsafe and of clean rows that are not kept."""
  dropped, unsafe = ~kept(scores, share), np.asarray(unsafe, bool)
  mean = lambda which: float(dropped[which].mean()) if which.any() else np.nan
  return {'unsafe_drop': mean(unsafe), 'clean_drop': mean(~unsafe)}


def resampled(
  measure: Callable[[np.ndarray, np.ndarray], float],
  scores: np.ndarray,
  unsafe: np.ndarray,
  *,
  draws: int = 500,
) -> harness.Interval:
  """A measure with the 95 % interval of resampled rows, of each kind apart.

  Args:
    measure: of (scores, unsafe).
    scores: (rows,).
    unsafe: (rows,) of bool.
    draws: of the rows, with replacement.
  """
  rng = np.random.default_rng(0)
  kinds = [np.flatnonzero(unsafe == kind) for kind in (False, True)]
  found = []
  for _ in range(draws):
    at = np.concatenate([rng.choice(kind, len(kind)) for kind in kinds])
    found.append(measure(scores[at], unsafe[at]))
  low, high = map(float, np.quantile(found, [0.025, 0.975]))
  value = measure(scores, unsafe)
  return harness.Interval(value, (high - low) / 2, 1, 1, ends=(low, high))


# Of a ranking as a whole.
AREAS = {'auroc': auroc, 'auprc': auprc}
