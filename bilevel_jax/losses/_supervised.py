"""Supervised fine-tuning and distillation."""

import chex
import jax
import jax.numpy as jnp

from bilevel_jax.losses import _tokens

MEANS = ('tokens', 'rows')


def _mean(name: str, numbers: chex.Array, mask: chex.Array, over: str):
  """The mean over all tokens, or over rows of their means; 0 without any."""
  if over not in MEANS:
    raise ValueError(f"{name}: over is 'tokens' or 'rows', got {over!r}.")
  if over == 'tokens':
    return _tokens.masked_mean(numbers.ravel(), mask.ravel())
  rows = _tokens.masked_mean(numbers, mask)
  return _tokens.masked_mean(rows.ravel(), (mask > 0).any(-1).ravel())


def _same_shape(
  name: str, shape: tuple[int, ...], mask: tuple[int, ...]
) -> None:
  if shape != mask:
    raise ValueError(f'{name}: tokens of shape {shape}, but a mask of {mask}.')


def sft(
  log_probs: chex.Array,
  mask: chex.Array,
  *,
  weights: chex.Array | None = None,
  over: str = 'tokens',
) -> chex.Array:
  r"""Supervised fine-tuning: minus the mean log-probability of a response.

  .. math::
    \ell = - \frac{1}{n} \sum_{t \,:\, mask_t > 0} w_t \log \pi(y_t | y_{<t})

  Args:
    log_probs: log-probabilities of the tokens, (rows, length); nats.
    mask: 1 for tokens of the response, 0 for the prompt and padding.
    weights: :math:`w` of each token, of the same shape, `chord_weights` for
      instance; by default 1. The divisor :math:`n` is the number of tokens.
    over: 'tokens' for the mean over the tokens of all rows; 'rows' for the mean
      over rows of the mean of each row, in which short and long responses count
      equally. Rows without unmasked tokens are left out.

  Returns:
    A scalar, nats per token.

  Raises:
    ValueError: if shapes differ, or `over` is unknown.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> log_probs = jnp.array([[-9.0, -1.0, -3.0], [-9.0, -5.0, -9.0]])
    >>> mask = jnp.array([[0, 1, 1], [0, 1, 0]])
    >>> print(bj.losses.sft(log_probs, mask))
    3.0
    >>> print(bj.losses.sft(log_probs, mask, over='rows'))
    3.5
  """
  _same_shape('sft', log_probs.shape, mask.shape)
  # Masks first: masked entries may be infinite, and 0 times infinity is NaN.
  token_losses = -_tokens.bounded(jnp.where(mask > 0, log_probs, 0))
  if weights is not None:
    _same_shape('sft', weights.shape, mask.shape)
    weights = jnp.where(mask > 0, weights, 0).astype(token_losses.dtype)
    token_losses = weights * token_losses
  return _mean('sft', token_losses, mask, over)


def chord_weights(log_probs: chex.Array) -> chex.Array:
  r"""Weights for `sft` that are small for very likely and very unlikely tokens.

  .. math::
    w_t = p_t (1 - p_t), \qquad p_t = \pi(y_t | y_{<t})

  They are constant in derivatives.

  Args:
    log_probs: log-probabilities of the tokens, any shape; nats.

  Returns:
    The weights, of the same shape, in [0, 1/4].

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> print(bj.losses.chord_weights(jnp.log(jnp.array([0.5, 0.25]))))
    [0.25   0.1875]

  References:
    Zhang, Xie, Sun, Chen, Wang, Li, Ding and Zhou, `On-Policy RL Meets
    Off-Policy Experts: Harmonizing Supervised Fine-Tuning and Reinforcement
    Learning via Dynamic Weighting <https://arxiv.org/abs/2508.11408>`_, 2025.
  """
  constant = jax.lax.stop_gradient(_tokens.bounded(log_probs))
  return jnp.exp(constant) * -jnp.expm1(jnp.minimum(constant, 0))


DIVERGENCES = ('forward', 'reverse')


def distillation(
  log_probs: chex.Array,
  teacher: chex.Array,
  mask: chex.Array,
  *,
  divergence: str = 'forward',
  over: str = 'tokens',
) -> chex.Array:
  r"""The divergence between a teacher's next-token distributions and a model's.

  .. math::
    \ell = \frac{1}{n} \sum_{t \,:\, mask_t > 0} \sum_v p_{t, v}
      \log (p_{t, v} / q_{t, v})

  with the teacher as p and the model as q (`forward`, which covers all tokens
  of the teacher), or the reverse (`reverse`, which seeks its modes).

  Args:
    log_probs: log-probabilities of the model, (rows, length, vocabulary),
      normalised; nats.
    teacher: those of the teacher, of the same shape; constant in derivatives.
    mask: (rows, length), as in `sft`.
    divergence: 'forward' or 'reverse'.
    over: as in `sft`.

  Returns:
    A scalar, nats per token.

  Raises:
    ValueError: if shapes differ, or `divergence` or `over` are unknown.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> teacher, model = jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75])
    >>> loss = bj.losses.distillation(
    ...   jnp.log(model)[None, None], jnp.log(teacher)[None, None],
    ...   jnp.ones((1, 1)),
    ... )
    >>> print(f'{loss:.3f}')  # log(4 / 3) / 2
    0.144

  References:
    Hinton, Vinyals and Dean, `Distilling the Knowledge in a Neural Network
    <https://arxiv.org/abs/1503.02531>`_, 2015; Gu, Dong, Wei and Huang,
    `MiniLLM: Knowledge Distillation of Large Language Models
    <https://arxiv.org/abs/2306.08543>`_, 2023.
  """
  if divergence not in DIVERGENCES:
    raise ValueError(
      f"distillation: divergence is 'forward' or 'reverse', got {divergence!r}."
    )
  if log_probs.shape != teacher.shape:
    raise ValueError(
      f'distillation: log-probabilities of shape {log_probs.shape}, but those '
      f'of the teacher have {teacher.shape}.'
    )
  _same_shape('distillation', log_probs.shape[:-1], mask.shape)
  unmasked = mask[..., None] > 0
  model = _tokens.bounded(jnp.where(unmasked, log_probs, 0))
  target = _tokens.bounded(jnp.where(unmasked, teacher, 0))
  target = jax.lax.stop_gradient(target)
  p, q = (model, target) if divergence == 'reverse' else (target, model)
  token_losses = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
  return _mean('distillation', token_losses, mask, over)
