"""Log-probabilities of answers: the head sees their positions only."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import bilevel_jax as bj
from experiments.lm import decoder
from experiments.lm.config import Config


class Answers(NamedTuple):
  """Log-probabilities of the tokens of answers.

  Attributes:
    log_probs: (rows, tokens), nats, float32 or wider.
    mask: 1 where there is a token, 0 behind the end, (rows, tokens).
  """

  log_probs: jax.Array
  mask: jax.Array

  @property
  def total(self) -> jax.Array:
    """Sums over the tokens of each answer, (rows,)."""
    return bj.losses.masked_sum(self.log_probs, self.mask)

  @property
  def mean(self) -> jax.Array:
    """Means over the tokens of each answer, (rows,)."""
    return bj.losses.masked_mean(self.log_probs, self.mask)


def of_answers(
  config: Config,
  params: decoder.Params,
  x: jax.Array,
  tokens: jax.Array,
  mask: jax.Array,
  *,
  longest: int | None = None,
) -> Answers:
  """From what left the last layer.

  Args:
    config: of the model.
    params: of its head: `norm`, and `head` or `embed`.
    x: what left the last layer, (rows, length, width).
    tokens: (rows, length).
    mask: 1 for the tokens of the answer, or of the answers of a packed row.
    longest: most tokens of answers in a row: only so many positions are given
      to the head, which for a small model with many words is a fifth of its
      cost. What a row has beyond is not seen. By default all positions.

  Returns:
    An `Answers`, of `longest` tokens or of one less than the length.
  """
  near, answers, kept = _before(x, tokens, mask, longest)
  found = decoder.logits(config, params, near)
  return Answers(bj.losses.token_log_probs(found, answers), kept)


def _before(x, tokens, mask, longest):
  """What predicts the tokens of answers, these tokens, and their mask."""
  length = tokens.shape[1]
  if longest is None:
    return x[:, :-1], tokens[:, 1:], mask[:, 1:]
  # The first token of a row is predicted by nothing.
  each = jnp.arange(length)
  at = jnp.sort(jnp.where((mask > 0) & (each > 0), each, length), axis=1)
  at = at[:, : min(longest, length - 1)]
  inside = jnp.minimum(at, length - 1)
  take = lambda array: jnp.take_along_axis(array, inside, axis=1)
  near = jnp.take_along_axis(x, inside[..., None] - 1, axis=1)
  return near, take(tokens), jnp.where(at < length, take(mask), 0)


def distributions(
  config: Config,
  params: decoder.Params,
  x: jax.Array,
  tokens: jax.Array,
  mask: jax.Array,
  *,
  longest: int | None = None,
) -> Answers:
  """As `of_answers`, of all words in each token's place.

  Returns:
    An `Answers` whose `log_probs` are (rows, tokens, vocabulary), for
    `bj.losses.distillation`; its sums and means are of no use.
  """
  near, _, kept = _before(x, tokens, mask, longest)
  found = decoder.logits(config, params, near)
  return Answers(jax.nn.log_softmax(found, axis=-1), kept)


def of_model(
  config: Config,
  params: decoder.Params,
  tokens: jax.Array,
  mask: jax.Array,
  *,
  longest: int | None = None,
  dtype: Any = None,
  **layers: Any,
) -> Answers:
  """The same from tokens, by the whole model.

  Args:
    config: of the model.
    params: of the model, adapters attached.
    tokens: (rows, length).
    mask: as in `of_answers`.
    longest: as in `of_answers`.
    dtype: what is computed in, bfloat16 on accelerators for instance, while
      weights and their gradients keep theirs. None for that of the weights.
    **layers: `segments` and `positions` of packed rows, and `remat`, as in
      `decoder.run_layers`.

  Returns:
    An `Answers`; its numbers are float32 or wider whatever the dtype.
  """
  x = decoder.run_layers(
    config,
    params['layers'],
    decoder.embed(params, tokens, dtype),
    **layers,
  )
  return of_answers(config, params, x, tokens, mask, longest=longest)
