"""Measures of every step beside a solver's own losses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax


class MeasuredState(NamedTuple):
  """State of `measured`.

  Attributes:
    inner: of the solver.
    values: what was measured in the last update, by name.
  """

  inner: Any
  values: dict[str, chex.Array]


def measured(
  solver: optax.GradientTransformationExtraArgs,
  measure: Callable[[Any, Any], dict[str, chex.Array]],
) -> optax.GradientTransformationExtraArgs:
  """A solver that measures at every step, where `evaluate` does at records.

  Args:
    solver: what updates.
    measure: `(params, updates)` to scalars by name, which `train` records as
      losses: means over the steps of a chunk, `loss/name`.

  Returns:
    A solver with the same updates.
  """

  def init_fn(params):
    shapes = jax.eval_shape(measure, params, params)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return MeasuredState(solver.init(params), zeros)

  def update_fn(batch, state, params=None, **extra_args):
    updates, inner = solver.update(batch, state.inner, params, **extra_args)
    return updates, MeasuredState(inner, measure(params, updates))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
