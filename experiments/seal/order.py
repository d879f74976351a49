"""In which order rows are seen: whole epochs, whatever the batch size."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def steps_of_epoch(rows: int, size: int) -> int:
  """Batches in an epoch."""
  return -(-rows // size)


def batch_at(key: jax.Array, step: Any, rows: int, size: int) -> jax.Array:
  """The rows of a step, (size,), by a permutation of each epoch.

  Where an epoch is not whole batches, the last one is filled up from the
  epoch's beginning: `counted` says how often a row was seen.
  """
  epoch, place = jnp.divmod(step, steps_of_epoch(rows, size))
  order = jax.random.permutation(jax.random.fold_in(key, 1_000 + epoch), rows)
  return order[(place * size + jnp.arange(size)) % rows]


class Counted(NamedTuple):
  """State of `counted`.

  Attributes:
    visits: how often each row was in a batch, int32, (rows,).
    inner: the state of the solver.
  """

  visits: jax.Array
  inner: Any


def counted(
  solver: Any, rows: int, index: Any
) -> optax.GradientTransformationExtraArgs:
  """A solver that also counts how often each row was in a batch."""

  def update_fn(batch, state, params=None, **extra_args):
    updates, inner = solver.update(batch, state.inner, params, **extra_args)
    return updates, Counted(state.visits.at[index(batch)].add(1), inner)

  return optax.GradientTransformationExtraArgs(
    lambda params: Counted(jnp.zeros(rows, jnp.int32), solver.init(params)),
    update_fn,
  )
