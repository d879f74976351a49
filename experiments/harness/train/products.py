"""Products of many rows with few columns, in an order that is fast on CPUs.

A classifier's head and a low-rank adapter map many rows x to few columns, x W.
Their gradient in W is a product over the rows. XLA for CPUs computes it as
x^T g, packing the large factor in a slow order, also where the program says
(g^T x)^T: it folds the transposition into the product. Behind a barrier it
cannot. W is transposed in front of the barrier and back behind it, so the
cotangent has the shape (columns, features) when it arrives there.
"""

from typing import Any

import jax
import jax.numpy as jnp

# With more columns, relative to the features, both orders are equally fast.
FEATURES_PER_COLUMN = 4


def thin_product(x: Any, weights: Any) -> jax.Array:
  """Multiplies rows by a matrix, with a fast gradient if it has few columns.

  Equal to `x @ weights` in values and in derivatives of any mode and order, up
  to rounding; it is `x @ weights` unless there are four times as many features
  as columns.

  Args:
    x: rows, (..., features).
    weights: (features, columns).

  Returns:
    The products, (..., columns).

  Raises:
    ValueError: if the weights are no matrix.
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
    dimension_numbers: of the product of the last axis of rows with the first
      axis of weights.
    **keywords: of `jax.lax.dot_general`; all None.

  Returns:
    The products, (..., columns).

  Raises:
    ValueError: for another product, or for an option.
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
