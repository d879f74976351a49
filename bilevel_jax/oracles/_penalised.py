"""An upper loss beside a penalty: as two rows, or fused into one loss."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences, _trees, types
from bilevel_jax.aggregators import _penalty
from bilevel_jax.oracles import _oracle

# (upper variable, lower variable, params, batch) -> (penalty, lower loss)
PenaltyFn = Callable[[Any, Any, Any, Any], tuple[chex.Array, chex.Array]]


def penalised(
  problem: types.BilevelProblem,
  penalty_fn: PenaltyFn,
  *,
  who: str,
  name: str,
  sequences: tuple[str, ...],
  counts: Mapping[str, int],
  penalty: types.ScalarOrSchedule | None,
  rescale: bool,
) -> optax.GradientTransformationExtraArgs:
  """Makes an oracle from a penalty that replaces the lower problem.

  Args:
    problem: the upper and the lower loss.
    penalty_fn: the penalty and the lower loss, as a function of the two
      variables, of all params (for sequences that are held fixed) and of the
      batch.
    who: the name of the oracle, for errors.
    name: the name of the penalty in `bj.values`.
    sequences: the sequences that the parameters must have.
    counts: what one evaluation costs.
    penalty: None for two rows; a weight or a schedule for the fused form.
    rescale: for the fused form, as in `scale_by_penalty`.

  Returns:
    An oracle that measures `upper`, `lower` and the penalty.
  """
  upper = _oracle.scalar_loss(problem.upper, 'upper')
  names = ('upper', 'lower', name)

  def rows(params, batch, inner):
    _sequences.require_sequences(params, sequences, who)
    x, y = params.upper, params.lower
    above, above_slope = jax.value_and_grad(upper, (0, 1))(x, y, batch)
    (height, below), height_slope = jax.value_and_grad(
      penalty_fn, (0, 1), has_aux=True
    )(x, y, params, batch)
    stacked = jax.tree.map(
      lambda *r: jnp.stack(r), above_slope, tuple(height_slope)
    )
    slopes = _sequences.only(params, upper=stacked[0], lower=stacked[1])
    return (above, below, height), types.Jacobian(slopes), inner

  if penalty is None:
    return _oracle.oracle(rows, names, counts=counts)
  weights = _penalty.penalty_weights(penalty, rescale=rescale)

  def fused(params, batch, count):
    _sequences.require_sequences(params, sequences, who)
    dtype = _trees.dtype_of(params)
    upper_weight, height_weight = weights(count.count, dtype)

    def loss(x, y):
      above = upper(x, y, batch)
      height, below = penalty_fn(x, y, params, batch)
      total = upper_weight * above + height_weight * height
      return total, (above, below, height)

    slopes, values = jax.grad(loss, (0, 1), has_aux=True)(
      params.upper, params.lower
    )
    gradients = _sequences.only(params, upper=slopes[0], lower=slopes[1])
    count = _oracle.UpdateCount(optax.safe_increment(count.count))
    return values, gradients, count

  zero = lambda params: _oracle.UpdateCount(jnp.zeros([], jnp.int32))
  return _oracle.oracle(fused, names, zero, counts=counts)
