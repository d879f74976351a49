"""Pytrees as vectors, and the dtypes in which sums are accumulated."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


def widest_dtype(tree: Any) -> Any:
  """The widest real dtype among the leaves, at least float32."""
  leaves = [jnp.asarray(x).dtype for x in jax.tree.leaves(tree)]
  floats = [d for d in leaves if jnp.issubdtype(d, jnp.floating)]
  return functools.reduce(jnp.promote_types, floats, jnp.dtype(jnp.float32))


def require_real(params: Any) -> None:
  """Raises TypeError unless all leaves are real floats.

  Whole numbers and keys have no derivatives, and steps along complex gradients
  would need conjugates.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    numeric = isinstance(leaf, bool | int | float | complex)
    if not numeric and not hasattr(leaf, 'dtype'):
      raise TypeError(
        f'a leaf of the parameters ({jax.tree_util.keystr(path) or "itself"}) '
        f'is {type(leaf).__name__}, expected an array: call '
        'solver.init(params) with the parameters alone.'
      )
    dtype = jnp.asarray(leaf).dtype
    if dtype == jnp.float16:
      raise TypeError(
        f'a leaf of the parameters ({jax.tree_util.keystr(path) or "itself"}) '
        'is float16, in which constants of optimisers are zero (1e-8 of '
        'optax.adam): hold it in bfloat16, or in float32 with casts in the '
        'loss.'
      )
    if jnp.issubdtype(dtype, jnp.floating):
      continue
    where = jax.tree_util.keystr(path) or 'itself'
    remedy = (
      'hold its real and imaginary parts as two leaves'
      if jnp.issubdtype(dtype, jnp.complexfloating)
      else 'write a number that is trained as a float, for instance 0.0; put '
      'what is not trained into the batch (in flax, separate it by '
      'nnx.split(model, nnx.Param, ...))'
    )
    raise TypeError(
      f'a leaf of the parameters ({where}) is {dtype}, but only real floats '
      f'can be moved along gradients: {remedy}.'
    )


def accumulator_like(tree: Any, dtype: Any = jnp.float32) -> Any:
  """Zeros for a sum, each leaf in its own dtype promoted with `dtype`.

  A sum in bfloat16 stops growing after a few hundred terms.

  Args:
    tree: the terms; leaves that are not floats keep their dtype.
    dtype: the narrowest dtype of a sum.
  """

  def zero(leaf):
    # Like the leaf, so that it is sharded in the same way.
    zeros = jnp.zeros_like(leaf)
    return zeros.astype(wide(zeros.dtype, dtype))

  return jax.tree.map(zero, tree)


def wide(dtype: Any, narrowest: Any = jnp.float32) -> Any:
  """The dtype of a sum: promoted with `narrowest` if it is inexact."""
  if jnp.issubdtype(dtype, jnp.inexact):
    return jnp.promote_types(dtype, narrowest)
  return dtype


def zeros(shape: Any, dtype: Any) -> chex.Array:
  """Zeros for a state, copied from the host without compiling a program."""
  return jax.device_put(np.zeros(shape, dtype))


def mean_of_rows(rows: chex.Array) -> chex.Array:
  """The mean over the leading axis, by a product with ones.

  XLA's sum over a leading axis takes 15 to 30 times as long on CPUs for long
  rows.
  """
  count = rows.shape[0]
  total = jnp.tensordot(
    jnp.ones(count, rows.dtype),
    rows,
    1,
    precision='highest',
    preferred_element_type=wide(rows.dtype),
  )
  return (total / count).astype(rows.dtype)


def cast_like(tree: Any, like: Any) -> Any:
  """The tree with each leaf cast to the dtype of the other's."""
  return jax.tree.map(
    lambda x, y: jnp.asarray(x).astype(jnp.asarray(y).dtype), tree, like
  )


def add_scaled(x: Any, scale: chex.Numeric, y: Any) -> Any:
  """X + scale y, in the dtypes of x."""
  return jax.tree.map(
    lambda a, b: a + jnp.asarray(scale, a.dtype) * b.astype(a.dtype), x, y
  )


def scaled(scale: chex.Numeric, x: Any) -> Any:
  """Scale times x, in the dtypes of x."""
  return jax.tree.map(lambda a: jnp.asarray(scale, a.dtype) * a, x)


def dot(x: Any, y: Any) -> chex.Array:
  """The inner product of two trees, summed in at least float32."""
  dtype = jnp.promote_types(widest_dtype(x), widest_dtype(y))
  parts = [
    jnp.vdot(a.astype(dtype), b.astype(dtype))
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
  ]
  return sum(parts, jnp.zeros([], dtype))


def ratio(above: chex.Numeric, below: chex.Numeric) -> chex.Array:
  """A quotient, 0 where the divisor is not positive."""
  return jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 0)
