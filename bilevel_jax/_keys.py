"""One way to give a PRNG key: typed, of raw numbers, or a whole number."""

from typing import Any

import chex
import jax
import jax.numpy as jnp


def as_key(key: Any, who: str = 'it') -> chex.PRNGKey:
  """A typed key of its own buffer, from any of the usual forms.

  Args:
    key: `jax.random.key(...)`, `jax.random.PRNGKey(...)` or a whole number;
      each of them may be traced, for instance by `jax.vmap` over seeds.
    who: what draws, for the error.

  Returns:
    A scalar typed key. A copy: the caller's key survives the donation of the
    state that holds this one.

  Raises:
    TypeError: for anything else, None for instance.

  Example:
    >>> import bilevel_jax as bj
    >>> print(bj.checks.as_key(7, 'my_method').dtype)
    key<fry>
  """
  if key is None:
    raise TypeError(
      f'{who} draws random numbers: pass key=..., jax.random.key(0) for '
      'instance.'
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
    f'{who} takes one key, jax.random.key(0) or a whole number for instance, '
    f'got {key.dtype} of shape {key.shape}: split it and map over the keys.'
  )
