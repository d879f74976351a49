"""Order of rows: whole epochs for any batch size."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def steps_per_epoch(rows: int, size: int) -> int:
  """Number of batches in an epoch."""
  return -(-rows // size)


def batch_at(key: jax.Array, step: Any, rows: int, size: int) -> jax.Array:
  """Indices of the rows of a step, (size,), by a permutation per epoch.

  If an epoch is not a whole number of batches, its last batch repeats the first
  rows of the epoch: `counted` counts the visits of each row.
  """
  epoch, batch = jnp.divmod(step, steps_per_epoch(rows, size))
  order = jax.random.permutation(jax.random.fold_in(key, 1_000 + epoch), rows)
  return order[(batch * size + jnp.arange(size)) % rows]


class Counted(NamedTuple):
  """State of `counted`.

  Attributes:
    visits: number of batches with each row so far, int32 (rows,).
    inner: the state of the solver.
  """

  visits: jax.Array
  inner: Any


def counted(
  solver: Any, rows: int, index: Any
) -> optax.GradientTransformationExtraArgs:
  """Wraps a solver so that it counts the visits of each row."""

  def update_fn(batch, state, params=None, **extra_args):
    updates, inner = solver.update(batch, state.inner, params, **extra_args)
    return updates, Counted(state.visits.at[index(batch)].add(1), inner)

  return optax.GradientTransformationExtraArgs(
    lambda params: Counted(jnp.zeros(rows, jnp.int32), solver.init(params)),
    update_fn,
  )
