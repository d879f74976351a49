"""Rows of a Jacobian: their products with each other and with weights."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _sequences, _trees, types

# Columns of a skinny product that the CPU does at once: one product over all
# columns is several times slower there.
CHUNK = 8192


def require_rows(jacobian: Any, who: str, objectives: int) -> None:
  """Raises unless given a Jacobian or a Gramian of so many objectives."""
  if isinstance(jacobian, types.Gramian):
    found = jacobian.matrix.shape[0]
  elif isinstance(jacobian, types.Jacobian):
    found = count(jacobian.rows)
  else:
    raise TypeError(
      f'{who} aggregates the rows of a Jacobian, got '
      f'{type(jacobian).__name__}: put an oracle that gives rows before it in '
      'the chain, bj.multi_objective(losses) for instance.'
    )
  if found != objectives:
    raise ValueError(
      f'{who} was made for {objectives} rows, but the Jacobian has {found}: '
      'give it the number of objectives, and samples if the oracle is wrapped '
      'in bj.evaluation.independent.'
    )


def require_jacobian(jacobian: Any, who: str) -> None:
  """Raises where rows themselves are needed, not only their Gram matrix."""
  if isinstance(jacobian, types.Gramian):
    raise TypeError(
      f'{who} needs the rows of the Jacobian, not only their Gram matrix: use '
      'bj.multi_objective without gramian=True.'
    )


def count(rows: Any) -> int:
  """The number of rows: the length of the leading axis."""
  leaves = jax.tree.leaves(rows)
  if not leaves:
    raise ValueError('the Jacobian has no leaves: no parameter is shared.')
  return leaves[0].shape[0]


def products(ours: Any, theirs: Any = None) -> chex.Array:
  r"""The matrix :math:`A B^\top` of all inner products of rows.

  Args:
    ours: a pytree whose leaves have a leading axis of rows.
    theirs: another of the same structure; by default `ours`.

  Returns:
    (rows of ours, rows of theirs), in float32 or wider.
  """
  theirs = ours if theirs is None else theirs
  dtype = _trees.dtype_of((ours, theirs))

  def dot(a, b):
    return jax.lax.dot_general(
      a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype
    )

  total = jnp.zeros([], dtype)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    columns = a.shape[1]
    if columns < 2 * CHUNK or jax.default_backend() != 'cpu':
      total = total + dot(a, b)
      continue
    chunks = columns // CHUNK

    def add(i, sum_, a=a, b=b):
      cut = functools.partial(
        jax.lax.dynamic_slice_in_dim,
        start_index=i * CHUNK,
        slice_size=CHUNK,
        axis=1,
      )
      return sum_ + dot(cut(a), cut(b))

    start = jnp.zeros((a.shape[0], b.shape[0]), dtype)
    axes = _sequences.varying_axes(a) | _sequences.varying_axes(b)
    total = total + jax.lax.fori_loop(
      0, chunks, add, _sequences.vary(start, axes)
    )
    rest = chunks * CHUNK
    total = total + dot(a[:, rest:], b[:, rest:])
  return total


def gramian(jacobian: types.Jacobian | types.Gramian) -> chex.Array:
  """The Gram matrix of a Jacobian's rows."""
  if isinstance(jacobian, types.Gramian):
    return jacobian.matrix
  return products(jacobian.rows)


def weigh(rows: Any, weights: chex.Array) -> Any:
  """The sum of rows times weights, a pytree of the parameters' shapes."""
  return jax.tree.map(
    lambda row: jnp.tensordot(weights.astype(row.dtype), row, axes=1), rows
  )


def combine(
  jacobian: types.Jacobian | types.Gramian, weights: chex.Array
) -> Any:
  """The weighted gradient, with what no weight may touch in its place."""
  if isinstance(jacobian, types.Gramian):
    return jacobian.combine(weights)
  return with_rest(weigh(jacobian.rows, weights), jacobian)


def with_rest(gradients: Any, jacobian: types.Jacobian) -> Any:
  """Puts the gradients that no weight may touch in their places."""
  if not jacobian.rest:
    return gradients
  return gradients._replace(**jacobian.rest)


def part(jacobian: types.Jacobian, index: int, objectives: int) -> Any:
  """The rows of one of several samples that are stacked in a Jacobian."""
  start = index * objectives
  return jax.tree.map(lambda x: x[start : start + objectives], jacobian.rows)
