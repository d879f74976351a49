"""Scores of rows without a selector: what a bilevel one has to be better than.

All are pure functions to a score a row, higher for rows to keep. They see what
a model says of the rows, or their texts; none of them trains anything.

| score | after | needs |
|---|---|---|
| `random` | - | nothing |
| `by_length` | - | lengths |
| `hashed_ngrams` | DSIR | the texts |
| `by_loss` | - | losses under one model, the first or a safe one |
| `by_excess` | excess loss, as TOSS a row | losses under two models |
| `by_excess_tokens` | TOSS | losses of tokens under two models |
| `by_distance` | LARF, DRA | representations of the rows and of anchors |
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
  """A coin for each row."""
  return np.random.default_rng(seed).uniform(size=rows)


def by_length(mask: np.ndarray) -> np.ndarray:
  """The number of tokens of each answer: the longer is kept."""
  return np.asarray(mask > 0).sum(-1).astype(np.float64)


def _counts(text: str, buckets: int) -> np.ndarray:
  """How often hashed words and pairs of words are in a text, (buckets,)."""
  words = _WORD.findall(text.lower())
  found = np.zeros(buckets)
  for gram in [*zip(words), *itertools.pairwise(words)]:
    # By crc32: Python's own hash differs from process to process.
    found[zlib.crc32(' '.join(gram).encode()) % buckets] += 1
  return found


def hashed_ngrams(
  texts: Sequence[str], target: Sequence[str], *, buckets: int = 10_000
) -> np.ndarray:
  """How much likelier a text is among the target's than among these.

  Bags of hashed words and pairs of words, one distribution of each set: the
  logarithm of the ratio, summed over a text.

  Args:
    texts: of the rows.
    target: of the safe rows.
    buckets: of the hash.

  Returns:
    (rows,), nats.

  References:
    Xie, Santurkar, Ma and Liang, `Data Selection for Language Models via
    Importance Resampling <https://arxiv.org/abs/2302.03169>`_, 2023.
  """
  counts = np.stack([_counts(text, buckets) for text in texts])
  there = np.sum([_counts(text, buckets) for text in target], axis=0)
  share = lambda total: (total + 1) / (total + 1).sum()
  ratio = np.log(share(there)) - np.log(share(counts.sum(0)))
  return counts @ ratio


def row_means(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Means over the tokens of each answer, (rows,); 0 over none."""
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
  """Minus what a model that was tuned on safe rows loses more than the first.

  What is hard for both, by its style or its subject, cancels.
  """
  return -row_means(np.asarray(tuned) - np.asarray(first), mask)


def by_excess_tokens(
  tuned: np.ndarray,
  first: np.ndarray,
  mask: np.ndarray,
  *,
  discard: float = 0.2,
) -> np.ndarray:
  """Minus the share of a row's tokens that are among those of largest excess.

  Args:
    tuned: losses of tokens under a model that was tuned on safe rows.
    first: under the first one, (rows, tokens) both.
    mask: 1 for tokens of the answer.
    discard: the share of all tokens that is marked.

  References:
    Token-level selection by the loss under two models, TOSS
    <https://arxiv.org/abs/2603.01185>, 2026: there of a degraded and of a
    useful model, and the marked tokens are masked rather than rows dropped.
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
  """How much nearer representations are to safe anchors than to unsafe ones.

  All are whitened by the covariance of the rows, so that no direction counts
  for its size alone; distances are to the anchors' mean.

  Args:
    rows: (rows, width).
    safe: representations of safe anchors, (anchors, width).
    unsafe: of unsafe ones; None for the distance to the safe ones alone.
    ridge: added to the covariance, in units of its mean variance.

  Returns:
    (rows,).

  References:
    LARF <https://arxiv.org/abs/2507.18631> and DRA
    <https://arxiv.org/abs/2502.11411>, both 2025, in their main idea.
  """
  rows = np.asarray(rows, np.float64)
  centre = rows.mean(0)
  spread = np.cov(rows.T, bias=True).reshape(rows.shape[1], rows.shape[1])
  mean = np.trace(spread) / len(spread)
  values, vectors = np.linalg.eigh(spread)
  # The least size keeps what is constant from being divided by nothing.
  scale = np.sqrt(np.maximum(values, 0) + ridge * mean + 1e-30)
  white = lambda points: (
    (np.asarray(points, np.float64) - centre) @ (vectors / scale)
  )
  away = lambda anchors: np.linalg.norm(
    white(rows) - white(anchors).mean(0), axis=1
  )
  near = -away(safe)
  return near if unsafe is None else near + away(unsafe)


def by_gradient(
  row_losses: Callable[[Any], jax.Array], params: Any, direction: Any
) -> jax.Array:
  """The inner products of rows' gradients with a direction.

  By one forward derivative of all rows at once: no gradient of a row is formed.

  Args:
    row_losses: from params to (rows,).
    params: where.
    direction: the gradient of the safe loss, of the structure of params.

  Returns:
    (rows,): how fast a step along the safe gradient lowers each row's loss.
  """
  return jax.jvp(row_losses, (params,), (direction,))[1]


def unit(tree: Any) -> Any:
  """A tree divided by its norm."""
  squares = sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree))
  norm = jnp.sqrt(squares)
  return jax.tree.map(lambda leaf: leaf / jnp.maximum(norm, 1e-30), tree)
