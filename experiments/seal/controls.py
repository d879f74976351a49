"""Control scores of rows: cheap rivals of a learnt selector.

All are pure functions that give one score per row, higher for rows to keep.
They read a model's losses or representations, or the texts; none trains.

| score | after | needs |
|---|---|---|
| `random` | - | nothing |
| `by_length` | - | lengths |
| `hashed_ngrams` | DSIR | the texts |
| `by_loss` | - | losses under one model |
| `by_excess` | TOSS, per row | losses under two models |
| `by_excess_tokens` | TOSS | losses of tokens under two models |
| `by_distance` | LARF, DRA | representations of rows and reference rows |
| `by_gradient` | gradient similarity | derivatives of losses |
"""

import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WORD = re.compile(r'\w+|[^\w\s]')


def random(rows: int, seed: int) -> np.ndarray:
  """Uniform random scores."""
  return np.random.default_rng(seed).uniform(size=rows)


def by_length(mask: np.ndarray) -> np.ndarray:
  """The number of tokens of each answer."""
  return np.asarray(mask > 0).sum(-1).astype(np.float64)


def _counts(text: str, buckets: int) -> np.ndarray:
  """Counts of hashed words and pairs of words in a text, (buckets,)."""
  words = _WORD.findall(text.lower())
  counts = np.zeros(buckets)
  for gram in [*zip(words), *itertools.pairwise(words)]:
    # Python's own hash differs between processes.
    counts[zlib.crc32(' '.join(gram).encode()) % buckets] += 1
  return counts


def hashed_ngrams(
  texts: Sequence[str], target: Sequence[str], *, buckets: int = 10_000
) -> np.ndarray:
  """Log-likelihood ratio of each text between two sets of texts.

  A set is a distribution of hashed words and pairs of words. The log ratio of
  the distribution of the target and that of the texts is summed over a text.

  Args:
    texts: of the rows to rank.
    target: texts of the safe rows.
    buckets: number of hash buckets.

  Returns:
    (rows,), nats.

  References:
    Xie, Santurkar, Ma and Liang, `Data Selection for Language Models via
    Importance Resampling <https://arxiv.org/abs/2302.03169>`_, 2023.
  """
  counts = np.stack([_counts(text, buckets) for text in texts])
  target_counts = np.sum([_counts(text, buckets) for text in target], axis=0)
  smoothed = lambda total: (total + 1) / (total + 1).sum()
  ratio = np.log(smoothed(target_counts)) - np.log(smoothed(counts.sum(0)))
  return counts @ ratio


def row_means(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Means over the tokens of each answer, (rows,); 0 for empty answers."""
  total = np.where(mask > 0, tokens, 0).sum(-1)
  return total / np.maximum((mask > 0).sum(-1), 1)


def by_loss(losses: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Minus the mean loss of the answer's tokens.

  Args:
    losses: of the tokens, (rows, tokens), nats.
    mask: 1 for tokens of the answer.
  """
  return -row_means(losses, mask)


def by_excess(
  tuned: np.ndarray, first: np.ndarray, mask: np.ndarray
) -> np.ndarray:
  """Minus the mean loss that a model gains by tuning on safe rows.

  Difficulty of style or subject cancels.

  Args:
    tuned: losses of tokens under the tuned model, (rows, tokens), nats.
    first: the same under the first model.
    mask: 1 for tokens of the answer.
  """
  return -row_means(np.asarray(tuned) - np.asarray(first), mask)


def by_excess_tokens(
  tuned: np.ndarray,
  first: np.ndarray,
  mask: np.ndarray,
  *,
  discard: float = 0.2,
) -> np.ndarray:
  """Minus the fraction of a row's tokens whose excess loss is largest.

  Args:
    tuned: losses of tokens under a model tuned on safe rows, (rows, tokens).
    first: the same under the first model.
    mask: 1 for tokens of the answer.
    discard: fraction of all tokens that is marked.

  References:
    Token-level selection by the loss under two models, TOSS
    <https://arxiv.org/abs/2603.01185>, 2026. It compares a degraded with a
    useful model, and masks tokens instead of dropping rows.
  """
  excess, inside = np.asarray(tuned) - np.asarray(first), np.asarray(mask) > 0
  bound = np.quantile(excess[inside], 1 - discard)
  return -row_means((excess > bound).astype(np.float64), inside)


def by_distance(
  rows: np.ndarray,
  safe: np.ndarray,
  unsafe: np.ndarray | None = None,
  *,
  ridge: float = 0.1,
) -> np.ndarray:
  """Distance of rows to unsafe reference rows less that to safe ones.

  Distances are to the mean of the reference rows, after all representations
  are whitened by the covariance of the rows.

  Args:
    rows: representations of the rows to rank, (rows, width).
    safe: those of safe reference rows, (reference rows, width).
    unsafe: those of unsafe ones; None for minus the distance to the safe rows.
    ridge: added to the covariance, in units of its mean variance.

  Returns:
    Scores (rows,).

  References:
    The main idea of LARF <https://arxiv.org/abs/2507.18631> and DRA
    <https://arxiv.org/abs/2502.11411>, both 2025.
  """
  rows = np.asarray(rows, np.float64)
  centre = rows.mean(0)
  covariance = np.cov(rows.T, bias=True).reshape(rows.shape[1], -1)
  mean = np.trace(covariance) / len(covariance)
  values, vectors = np.linalg.eigh(covariance)
  # The constant avoids a division by zero in directions without variance.
  scale = np.sqrt(np.maximum(values, 0) + ridge * mean + 1e-30)
  white = lambda points: (
    (np.asarray(points, np.float64) - centre) @ (vectors / scale)
  )
  distance = lambda reference: np.linalg.norm(
    white(rows) - white(reference).mean(0), axis=1
  )
  return (0 if unsafe is None else distance(unsafe)) - distance(safe)


def by_gradient(
  row_losses: Callable[[Any], jax.Array], params: Any, direction: Any
) -> jax.Array:
  """Inner products of the gradients of rows with a direction.

  One forward derivative gives all rows; no gradient of a row is formed.

  Args:
    row_losses: from params to losses (rows,).
    params: where the gradients are taken.
    direction: the gradient of the safe loss, of the structure of params.

  Returns:
    (rows,): the rate at which a step along the safe gradient lowers each loss.
  """
  return jax.jvp(row_losses, (params,), (direction,))[1]


def unit(tree: Any) -> Any:
  """Divides a tree by its norm."""
  squares = sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree))
  norm = jnp.sqrt(squares)
  return jax.tree.map(lambda leaf: leaf / jnp.maximum(norm, 1e-30), tree)
