"""An upper loss beside a penalty: as two rows, or fused into one loss."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences, _trees, types
from bilevel_jax.aggregators import _penalty
from bilevel_jax.oracles import base

# (upper variable, lower variable, params, batch, what `prepare` gave or None)
# -> (penalty, (lower loss, its outputs))
PenaltyFn = Callable[[Any, Any, Any, Any, Any], tuple[chex.Array, tuple]]


def penalised(
  problem: types.BilevelProblem,
  penalty_fn: PenaltyFn,
  *,
  name: str,
  sequences: tuple[str, ...],
  counts: Mapping[str, int],
  penalty: types.ScalarOrSchedule | None,
  rescale: bool,
  prepare: Callable[[base.Mean, Any, Any], Any] | None = None,
) -> base.Oracle:
  """Makes an oracle from a penalty that replaces the lower problem.

  Args:
    problem: the upper and the lower loss.
    penalty_fn: the penalty, and the lower loss with its auxiliary outputs, as a
      function of the two variables, of all params (for sequences that are held
      fixed) and of the batch.
    name: the name of the penalty in `bj.values`.
    sequences: the sequences that the parameters must have.
    counts: what one evaluation costs.
    penalty: None for two rows; a weight or a schedule for the fused form.
    rescale: for the fused form, as in `scale_by_penalty`.
    prepare: for a penalty that is not linear in the samples, what it needs to
      be linear in those of a part, from (mean, params, batch): the last
      argument of `penalty_fn`, which is else None.

  Returns:
    An oracle that measures `upper`, `lower` and the penalty.
  """
  upper = base.Loss(problem.upper, 'upper')
  shared: dict[str, Any] = {
    'names': ('upper', 'lower', name),
    'counts': counts,
    'moves': ('upper', 'lower'),
    'needs': sequences,
    'outputs': problem.outputs,
  }

  def given(above, below):
    """The outputs asked for, if any, as a last result."""
    return base.outputs_of(problem, upper=above, lower=below)

  def rows(batch, params, known):
    x, y = params.upper, params.lower
    (above, one), above_slope = jax.value_and_grad(
      upper.full, (0, 1), has_aux=True
    )(x, y, batch)
    (height, (below, two)), height_slope = jax.value_and_grad(
      penalty_fn, (0, 1), has_aux=True
    )(x, y, params, batch, known)
    stacked = jax.tree.map(
      lambda *r: jnp.stack(r), above_slope, tuple(height_slope)
    )
    slopes = _sequences.only(params, upper=stacked[0], lower=stacked[1])
    measured = (above, below, height)
    return measured, types.Jacobian(slopes), given(one, two)

  def fused(batch, params, known, upper_weight, height_weight):
    def loss(x, y):
      above, one = upper.full(x, y, batch)
      height, (below, two) = penalty_fn(x, y, params, batch, known)
      total = upper_weight * above + height_weight * height
      return total, ((above, below, height), given(one, two))

    slopes, (values, outputs) = jax.grad(loss, (0, 1), has_aux=True)(
      params.upper, params.lower
    )
    gradients = _sequences.only(params, upper=slopes[0], lower=slopes[1])
    return values, gradients, outputs

  def averaged(mean, prepare=prepare):
    def fn(params, batch, count):
      known: Any = None
      evaluate: Callable[..., Any] = rows
      more: tuple[Any, ...] = ()
      if prepare is not None:
        known = prepare(mean, params, batch)
      if penalty is not None:
        evaluate, more = fused, weights(count.count, _trees.dtype_of(params))
        count = base.UpdateCount(optax.safe_increment(count.count))
      values, gradients, outputs = mean.of(
        evaluate, batch, params, known, *more
      )
      return values, gradients, count, *outputs

    return fn

  if penalty is not None:
    weights = _penalty.penalty_weights(penalty, rescale=rescale)
    zero = lambda params: base.UpdateCount(jnp.zeros([], jnp.int32))
    shared['init'] = zero
  return base.oracle(
    averaged(base.WHOLE, None),
    **shared,
    linear=prepare is None,
    averaged=None if prepare is None else averaged,
  )
