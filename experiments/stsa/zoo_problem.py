"""What a problem of the comparison of stochastic bilevel methods is made of."""

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp

import bilevel_jax as bj


class Problem(NamedTuple):
  """A nested problem in fixed batches, and how its runs are judged.

  Attributes:
    name: before the names of its metrics; '' where there is only one problem.
    title: above its picture.
    losses: functions of (x, y, batch); `batch['upper']` and `batch['lower']`
      are the numbers of the fixed batches that they see, `batch['data']` is
      `data`.
    data: a pytree of arrays.
    batches: how many fixed batches each of the two losses has.
    start: PRNG key -> parameters at the start.
    measure: (parameters, data) -> scalars by name, lower is better.
    tune_by: the measure that chooses step sizes.
    judge_by: the measure that the table and the picture show.
    label: of it, in words.
    lower_size: numbers in the lower variable: a whole Hessian is so many calls.
    upper_scale: an upper step of one ratio is so many lower ones: where a
      number of x moves the loss by little, its steps are long.
    curvature: the least of the lower loss, for the method that asks for it.
    logarithmic: whether the picture is.
    references: levels to read the values by, such as what a control without
      two levels reaches, by name.
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
  """Splits an array into fixed batches; what is left over is dropped.

  Args:
    rows: an array whose first axis is of samples.
    size: samples in a batch.

  Returns:
    float32 or integers, (batches, size, ...).
  """
  rows = jnp.asarray(rows)
  if jnp.issubdtype(rows.dtype, jnp.floating):
    rows = rows.astype(jnp.float32)
  count = rows.shape[0] // size
  return rows[: count * size].reshape(count, size, *rows.shape[1:])
