"""From logits to log-probabilities of the tokens that came, and their sums."""

import chex
import jax
import jax.numpy as jnp


def token_log_probs(logits: chex.Array, tokens: chex.Array) -> chex.Array:
  r"""The log-probability of each token, from the logits that predict it.

  .. math::
    \log \pi(y_t | y_{<t}) = a_{t, y_t} - \log \sum_v \exp a_{t, v}

  Args:
    logits: (..., length, vocabulary), of the position that predicts the token,
      the one before it.
    tokens: whole numbers below `vocabulary`, (..., length); what is no token,
      a padding of -1 for instance, is to be masked afterwards.

  Returns:
    (..., length), in float32 or wider.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    >>> tokens = jnp.array([0, 2])
    >>> found = jnp.exp(bj.losses.token_log_probs(logits, tokens))
    >>> print(f'{found[0]:.2f} {found[1]:.2f}')
    0.50 0.80
  """
  wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  at = jnp.clip(tokens, 0, logits.shape[-1] - 1)[..., None]
  picked = jnp.take_along_axis(wide, at, axis=-1)[..., 0]
  return picked - jax.nn.logsumexp(wide, axis=-1)


def masked_sum(numbers: chex.Array, mask: chex.Array) -> chex.Array:
  """The sum along the last axis over what the mask keeps.

  What it drops may be anything, infinite for instance: neither the sum nor its
  derivative sees it.

  Args:
    numbers: (..., length).
    mask: of the same shape, zero for what is dropped.

  Returns:
    (...,), of floats in float32 or wider: a sum over a response of some hundred
    tokens leaves the range of float16 and the precision of bfloat16.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> numbers = jnp.array([[-1.0, -2.0, -jnp.inf]])
    >>> print(bj.losses.masked_sum(numbers, jnp.array([[1, 1, 0]])))
    [-3.]
  """
  return jnp.sum(jnp.where(mask > 0, _wide(numbers), 0), axis=-1)


def masked_mean(numbers: chex.Array, mask: chex.Array) -> chex.Array:
  """The mean along the last axis over what the mask keeps, 0 over nothing.

  Args:
    numbers: (..., length).
    mask: of the same shape, zero for what is dropped.

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
  """The mean over all rows, 0 over none."""
  return jnp.sum(numbers) / max(numbers.size, 1)


def _wide(numbers: chex.Array) -> chex.Array:
  """Floats in float32 or wider; other numbers as they are."""
  numbers = jnp.asarray(numbers)
  if not jnp.issubdtype(numbers.dtype, jnp.floating):
    return numbers
  return numbers.astype(jnp.promote_types(numbers.dtype, jnp.float32))


def bounded(numbers: chex.Array) -> chex.Array:
  """Log-probabilities above the least that can be added up and multiplied.

  A sum over a response may be minus infinity, of a policy and of its reference
  at once, and their difference is then no number. Beyond the bound, the
  derivative is zero.
  """
  numbers = jnp.asarray(numbers)
  wide = numbers.astype(jnp.promote_types(numbers.dtype, jnp.float32))
  return jnp.maximum(wide, -(jnp.finfo(wide.dtype).max ** 0.25))
