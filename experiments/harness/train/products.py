"""Products of many rows with few columns, with a gradient that is fast on CPUs.

A classifier's head and a low-rank adapter compute x W with many rows and few
columns. XLA for CPUs computes the gradient in W as x^T g, which packs the large
factor in a slow order, even if the program asks for (g^T x)^T: it folds the
transposition into the product. A barrier prevents that. W is transposed before
the barrier and transposed back after it, so the cotangent reaches the barrier
with the shape (columns, features).
"""

from typing import Any

import jax
import jax.numpy as jnp

# Below this ratio, both orders are equally fast.
FEATURES_PER_COLUMN = 4


def thin_product(x: Any, weights: Any) -> jax.Array:
  """Multiplies rows by a matrix, with a fast gradient if it has few columns.

  Equals `x @ weights` up to rounding, in values and in derivatives of any mode
  and order. Used if there are at least four times as many features as columns.

  Args:
    x: rows, (..., features).
    weights: (features, columns).

  Returns:
    The products, (..., columns).

  Raises:
    ValueError: if `weights` is not a matrix.
  """
  if jnp.ndim(weights) != 2:
    raise ValueError(
      'thin_product multiplies by a matrix (features, columns), got the shape '
      f'{jnp.shape(weights)}: use vmap for several.'
    )
  features, columns = jnp.shape(weights)
  if features < FEATURES_PER_COLUMN * columns:
    return jnp.matmul(x, weights)
  return jnp.matmul(x, jax.lax.optimization_barrier(jnp.transpose(weights)).T)


def thin_dot_general(
  x: jax.Array, weights: jax.Array, dimension_numbers: Any, **keywords: Any
) -> jax.Array:
  """Computes `thin_product` for `nnx.Linear(..., dot_general=)`.

  Args:
    x: rows, (..., features).
    weights: (features, columns).
    dimension_numbers: those that contract the last axis of `x` with the first
      axis of `weights`.
    **keywords: options of `jax.lax.dot_general`; all have to be None.

  Returns:
    The products, (..., columns).

  Raises:
    ValueError: for other dimension numbers or an option.
  """
  wanted = (((x.ndim - 1,), (0,)), ((), ()))
  options = sorted(n for n, value in keywords.items() if value is not None)
  if dimension_numbers != wanted or options:
    raise ValueError(
      'thin_dot_general contracts the last axis of rows with the first axis of '
      f'weights, {wanted}, without options; got {dimension_numbers} and the '
      f'options {", ".join(options) or "none"}: use jax.lax.dot_general.'
    )
  return thin_product(x, weights)
