"""PRNG keys from typed keys, raw keys or whole numbers."""

from typing import Any

import chex
import jax
import jax.numpy as jnp


def as_key(key: Any, caller: str = 'it') -> chex.PRNGKey:
  """Converts a key or a seed to a typed key.

  Args:
    key: `jax.random.key(...)`, `jax.random.PRNGKey(...)` or a whole number.
      Each may be traced, for instance by `jax.vmap` over seeds.
    caller: what draws the random numbers, for the error.

  Returns:
    A scalar typed key. It is a copy, so that the caller's key survives when the
    state that holds this one is donated.

  Raises:
    TypeError: for anything else, for instance None.

  Example:
    >>> import bilevel_jax as bj
    >>> print(bj.checks.as_key(7, 'my_method').dtype)
    key<fry>
  """
  if key is None:
    raise TypeError(
      f'{caller} draws random numbers: pass key=..., for instance '
      'jax.random.key(0).'
    )
  if isinstance(key, str):
    raise TypeError(
      f'{caller} takes a key or a whole number, got {key!r}: pass for instance '
      'jax.random.key(0).'
    )
  key = jnp.asarray(key)
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and not key.shape:
    numbers = jnp.array(jax.random.key_data(key), copy=True)
    return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(key))
  if jnp.issubdtype(key.dtype, jnp.integer) and not key.shape:
    return jax.random.key(key)
  if key.dtype == jnp.uint32 and key.ndim == 1:
    return jax.random.wrap_key_data(jnp.array(key, copy=True))
  raise TypeError(
    f'{caller} takes one key or a whole number, for instance '
    f'jax.random.key(0), got {key.dtype} of shape {key.shape}: split it and '
    'map over the keys.'
  )
