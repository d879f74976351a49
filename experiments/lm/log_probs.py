"""Log-probabilities of answers; the head sees only their positions."""

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
    mask: 1 for a token, 0 for padding, (rows, tokens).
    is_top: whether a token is the likeliest one, (rows, tokens); None if it was
      not computed.
  """

  log_probs: jax.Array
  mask: jax.Array
  is_top: jax.Array | None = None

  @property
  def total(self) -> jax.Array:
    """Sums over the tokens of each answer, (rows,)."""
    return bj.losses.masked_sum(self.log_probs, self.mask)

  @property
  def mean(self) -> jax.Array:
    """Means over the tokens of each answer, (rows,)."""
    return bj.losses.masked_mean(self.log_probs, self.mask)


def from_hidden(
  config: Config,
  params: decoder.Params,
  x: jax.Array,
  tokens: jax.Array,
  mask: jax.Array,
  *,
  max_answer: int | None = None,
) -> Answers:
  """Computes log-probabilities of answers from the last layer.

  Args:
    config: config of the model.
    params: weights of the head: `norm`, and `head` or `embed`.
    x: output of the last layer, (rows, length, width).
    tokens: (rows, length).
    mask: 1 for tokens of answers, (rows, length).
    max_answer: largest number of answer tokens in a row; further ones
      are ignored. The head is computed at this many positions, by default at
      all. It is a fifth of the cost of a small model with a large vocabulary.

  Returns:
    An `Answers` of `max_answer` or `length - 1` tokens.
  """
  hidden, answers, mask = _predictors(x, tokens, mask, max_answer)
  logits = decoder.logits(config, params, hidden)
  return Answers(bj.losses.token_log_probs(logits, answers), mask)


def with_tops(
  config: Config,
  params: decoder.Params,
  x: jax.Array,
  tokens: jax.Array,
  mask: jax.Array,
  *,
  max_answer: int | None = None,
) -> Answers:
  """Computes log-probabilities as `from_hidden`, and `is_top`.

  A token is the likeliest one if its logit is the largest; several largest ones
  count.
  """
  hidden, answers, mask = _predictors(x, tokens, mask, max_answer)
  logits = decoder.logits(config, params, hidden)
  log_likelihoods = bj.losses.token_log_probs(logits, answers)
  # The largest logit is a part of the sum above, so that this costs little.
  wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  wide = jax.lax.stop_gradient(wide)
  own = jnp.take_along_axis(wide, answers[..., None], axis=-1)[..., 0]
  return Answers(log_likelihoods, mask, own >= jnp.max(wide, axis=-1))


def _predictors(x, tokens, mask, count):
  """Hidden states that predict answer tokens, these tokens, and their mask."""
  length = tokens.shape[1]
  if count is None:
    return x[:, :-1], tokens[:, 1:], mask[:, 1:]
  # The first token of a row has no prediction.
  positions = jnp.arange(length)
  is_answer = (mask > 0) & (positions > 0)
  at = jnp.sort(jnp.where(is_answer, positions, length), axis=1)
  at = at[:, : min(count, length - 1)]
  inside = jnp.minimum(at, length - 1)
  take = lambda array: jnp.take_along_axis(array, inside, axis=1)
  hidden = jnp.take_along_axis(x, inside[..., None] - 1, axis=1)
  return hidden, take(tokens), jnp.where(at < length, take(mask), 0)


def distributions(
  config: Config,
  params: decoder.Params,
  x: jax.Array,
  tokens: jax.Array,
  mask: jax.Array,
  *,
  max_answer: int | None = None,
) -> Answers:
  """Computes log-probabilities of the whole vocabulary, as `from_hidden`.

  Returns:
    An `Answers` whose `log_probs` are (rows, tokens, vocabulary), for
    `bj.losses.distillation`; its sums and means are meaningless.
  """
  hidden, _, mask = _predictors(x, tokens, mask, max_answer)
  logits = decoder.logits(config, params, hidden)
  return Answers(jax.nn.log_softmax(logits, axis=-1), mask)


def from_tokens(
  config: Config,
  params: decoder.Params,
  tokens: jax.Array,
  mask: jax.Array,
  *,
  max_answer: int | None = None,
  dtype: Any = None,
  **layers: Any,
) -> Answers:
  """Computes log-probabilities of answers from tokens.

  Args:
    config: config of the model.
    params: weights of the model with attached adapters.
    tokens: (rows, length).
    mask: 1 for tokens of answers, (rows, length).
    max_answer: as in `from_hidden`.
    dtype: dtype of the arithmetic, for instance bfloat16 on accelerators; None
      for that of the weights. Weights and gradients keep their dtype.
    **layers: `segments` and `positions` of packed rows, and `remat`, as in
      `decoder.run_layers`.

  Returns:
    An `Answers` of float32 or wider.
  """
  x = decoder.run_layers(
    config,
    params['layers'],
    decoder.embed(params, tokens, dtype),
    **layers,
  )
  return from_hidden(config, params, x, tokens, mask, max_answer=max_answer)
