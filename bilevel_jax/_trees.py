"""Pytrees as vectors, and the dtypes in which sums are kept."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


def dtype_of(tree: Any) -> Any:
  """The widest real dtype among the leaves, at least float32."""
  leaves = [jnp.asarray(x).dtype for x in jax.tree.leaves(tree)]
  floats = [d for d in leaves if jnp.issubdtype(d, jnp.floating)]
  return functools.reduce(jnp.promote_types, floats, jnp.dtype(jnp.float32))


def require_real(params: Any) -> None:
  """Raises TypeError unless all leaves are real floats, and says which is not.

  Derivatives in whole numbers and keys do not exist, and steps along complex
  ones would need conjugates.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    dtype = jnp.asarray(leaf).dtype
    if jnp.issubdtype(dtype, jnp.floating):
      continue
    where = jax.tree_util.keystr(path) or 'itself'
    mend = (
      'hold its real and imaginary parts as two leaves'
      if jnp.issubdtype(dtype, jnp.complexfloating)
      else 'write a number that is trained as a float, 0.0 for instance; what '
      'is not trained goes into the batch (in flax, nnx.split(model, '
      'nnx.Param, ...) parts it)'
    )
    raise TypeError(
      f'a leaf of the parameters ({where}) is {dtype}, but only real floats '
      f'can be moved along gradients: {mend}.'
    )


def accumulator_like(tree: Any, dtype: Any = jnp.float32) -> Any:
  """Zeros to sum in: each leaf's dtype, made as wide as `dtype`.

  A sum in bfloat16 stops growing after a few hundred terms.

  Args:
    tree: what is to be summed; leaves that are no floats stay as they are.
    dtype: the least width of a sum.
  """

  def zero(leaf):
    # Like the leaf, so that it is sharded as it is.
    zeros = jnp.zeros_like(leaf)
    return zeros.astype(wide(zeros.dtype, dtype))

  return jax.tree.map(zero, tree)


def wide(dtype: Any, least: Any = jnp.float32) -> Any:
  """A leaf's dtype in a sum: promoted with `least` if it is inexact."""
  if jnp.issubdtype(dtype, jnp.inexact):
    return jnp.promote_types(dtype, least)
  return dtype


def zeros(shape: Any, dtype: Any) -> chex.Array:
  """Zeros for a state, copied from the host: no program is compiled for it."""
  return jax.device_put(np.zeros(shape, dtype))


def mean_of_rows(rows: chex.Array) -> chex.Array:
  """The mean over the leading axis.

  By a product: XLA's own sum over a leading axis takes 15 to 30 times as long
  on CPUs where rows are long.
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


def as_dtypes_of(tree: Any, like: Any) -> Any:
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
  dtype = jnp.promote_types(dtype_of(x), dtype_of(y))
  parts = [
    jnp.vdot(a.astype(dtype), b.astype(dtype))
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
  ]
  return sum(parts, jnp.zeros([], dtype))


def ratio(above: chex.Numeric, below: chex.Numeric) -> chex.Array:
  """A quotient, 0 where the divisor is not positive."""
  return jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 0)
