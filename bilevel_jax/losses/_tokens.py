"""Log-probabilities of tokens from logits, and masked sums and means."""

import chex
import jax
import jax.numpy as jnp


def token_log_probs(logits: chex.Array, tokens: chex.Array) -> chex.Array:
  r"""The log-probability of each token from the logits that predict it.

  .. math::
    \log \pi(y_t | y_{<t}) = a_{t, y_t} - \log \sum_v \exp a_{t, v}

  Args:
    logits: (..., length, vocabulary), at the position before each token.
    tokens: integers below `vocabulary`, (..., length). Mask the result for
      other numbers, for instance a padding of -1.

  Returns:
    (..., length), in float32 or wider.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    >>> tokens = jnp.array([0, 2])
    >>> probs = jnp.exp(bj.losses.token_log_probs(logits, tokens))
    >>> print(f'{probs[0]:.2f} {probs[1]:.2f}')
    0.50 0.80
  """
  wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  at = jnp.clip(tokens, 0, logits.shape[-1] - 1)[..., None]
  picked = jnp.take_along_axis(wide, at, axis=-1)[..., 0]
  return picked - jax.nn.logsumexp(wide, axis=-1)


def masked_sum(numbers: chex.Array, mask: chex.Array) -> chex.Array:
  """The sum along the last axis over the unmasked entries.

  Masked entries may be infinite or NaN: they change neither the sum nor its
  derivative.

  Args:
    numbers: (..., length).
    mask: of the same shape, zero for masked entries.

  Returns:
    (...,), for floats in float32 or wider: sums over about a hundred tokens
    leave the range of float16 and the precision of bfloat16.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> numbers = jnp.array([[-1.0, -2.0, -jnp.inf]])
    >>> print(bj.losses.masked_sum(numbers, jnp.array([[1, 1, 0]])))
    [-3.]
  """
  return jnp.sum(jnp.where(mask > 0, _wide(numbers), 0), axis=-1)


def masked_mean(numbers: chex.Array, mask: chex.Array) -> chex.Array:
  """The mean along the last axis over the unmasked entries, 0 without any.

  Args:
    numbers: (..., length).
    mask: of the same shape, zero for masked entries.

  Returns:
    (...,), in float32 or wider.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> numbers = jnp.array([[-1.0, -3.0, 7.0], [1.0, 1.0, 1.0]])
    >>> print(bj.losses.masked_mean(numbers, jnp.array([[1, 1, 0], [0, 0, 0]])))
    [-2.  0.]
  """
  total = masked_sum(numbers, mask)
  return total / jnp.maximum(jnp.sum(mask > 0, axis=-1), 1).astype(total.dtype)


def mean(numbers: chex.Array) -> chex.Array:
  """The mean over all rows, 0 without rows."""
  return jnp.sum(numbers) / max(numbers.size, 1)


def _wide(numbers: chex.Array) -> chex.Array:
  """Floats in float32 or wider; other numbers unchanged."""
  numbers = jnp.asarray(numbers)
  if not jnp.issubdtype(numbers.dtype, jnp.floating):
    return numbers
  return numbers.astype(jnp.promote_types(numbers.dtype, jnp.float32))


def bounded(numbers: chex.Array) -> chex.Array:
  """Bounds log-probabilities from below, so that sums and products are finite.

  The log-probability of a response may be minus infinity under both the policy
  and its reference, and their difference would be NaN. Below the bound, the
  derivative is zero.
  """
  numbers = jnp.asarray(numbers)
  wide = numbers.astype(jnp.promote_types(numbers.dtype, jnp.float32))
  return jnp.maximum(wide, -(jnp.finfo(wide.dtype).max ** 0.25))
