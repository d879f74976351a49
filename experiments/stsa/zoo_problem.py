"""Interface of the problems of the bilevel comparison."""

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp

import bilevel_jax as bj


class Problem(NamedTuple):
  """A bilevel problem in fixed batches, and its measures.

  Attributes:
    name: coordinate of its metrics; '' for a single problem.
    title: title of its plot.
    losses: functions of (x, y, batch); `batch['upper']` and `batch['lower']`
      are indices of fixed batches, `batch['data']` is `data`.
    data: a pytree of arrays.
    batches: numbers of fixed batches of the upper and the lower loss.
    start: PRNG key -> initial params.
    measure: (params, data) -> scalars by name, lower is better.
    tune_by: measure that chooses step sizes.
    judge_by: measure in table and plot.
    label: axis label of `judge_by`.
    lower_size: dimension of the lower variable, the calls of a full Hessian.
    upper_scale: unit of the ratio of upper to lower step sizes; large if the
      loss is insensitive to single entries of x.
    curvature: smallest curvature of the lower loss, for STABLE.
    logarithmic: whether the plot has a logarithmic axis.
    references: reference levels by name, such as a single-level control.
  """

  name: str
  title: str
  losses: bj.BilevelProblem
  data: Any
  batches: tuple[int, int]
  start: Callable[[chex.PRNGKey], bj.BilevelParams]
  measure: Callable[[bj.BilevelParams, Any], dict[str, chex.Array]]
  tune_by: str
  judge_by: str
  label: str
  lower_size: int
  upper_scale: float = 1.0
  curvature: float = 0.1
  logarithmic: bool = True
  references: Mapping[str, float] = types.MappingProxyType({})


def in_batches(rows: chex.ArrayTree, size: int) -> chex.Array:
  """Splits an array into fixed batches; drops a remainder.

  Args:
    rows: array with a leading axis of samples.
    size: samples per batch.

  Returns:
    float32 or integers, (batches, size, ...).
  """
  rows = jnp.asarray(rows)
  if jnp.issubdtype(rows.dtype, jnp.floating):
    rows = rows.astype(jnp.float32)
  count = rows.shape[0] // size
  return rows[: count * size].reshape(count, size, *rows.shape[1:])
