"""An upper loss and a penalty, as two rows or fused into one loss."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _trees, states, types
from bilevel_jax.aggregators import _penalty
from bilevel_jax.oracles import base

# (upper variable, lower variable, params, batch, result of `prepare` or None)
# -> (penalty, (lower loss, its outputs, other measured values, ...))
PenaltyFn = Callable[[Any, Any, Any, Any, Any], tuple[chex.Array, tuple]]


class Penalty(NamedTuple):
  """A penalty that replaces the lower problem.

  Attributes:
    fn: the penalty and the lower loss with its auxiliary outputs, as a function
      of the two variables, of all params (for sequences that are constant in
      the derivative) and of the batch.
    names: name of the penalty in `bj.values`, `lower` if it is that loss; then
      names of the other values that `fn` measures after the outputs.
    counts: the cost of one evaluation.
    sequences: names of the sequences that the parameters must have.
    prepare: for a penalty that is not linear in the samples, a function of
      (mean, params, batch). Given its result as the last argument, `fn` is
      linear in the samples of a part. None for other penalties.
  """

  fn: PenaltyFn
  names: tuple[str, ...]
  counts: Mapping[str, int]
  sequences: tuple[str, ...] = ('upper', 'lower', 'value')
  prepare: Callable[[base.Mean, Any, Any], Any] | None = None


def penalised(
  problem: types.BilevelProblem,
  height: Penalty,
  *,
  penalty: types.ScalarOrSchedule | None,
  rescale: bool,
  of: tuple[str, ...] = ('upper', 'lower'),
) -> base.Oracle:
  """Makes an oracle from a penalty that replaces the lower problem.

  Args:
    problem: the upper and the lower loss.
    height: the penalty.
    penalty: the weight of the penalty for the fused form, a number or a
      schedule; None for two rows.
    rescale: for the fused form, as in `scale_by_penalty`.
    of: the sequences to differentiate.

  Returns:
    An oracle that measures `upper`, `lower` and the penalty.
  """
  upper = base.checked_upper(problem)
  prepare = height.prepare
  measures_height = height.names[0] != 'lower'
  shared: dict[str, Any] = {
    'names': tuple(dict.fromkeys(('upper', 'lower', *height.names))),
    'counts': height.counts,
    'moves': of,
    'needs': height.sequences,
    'outputs': problem.outputs,
  }

  def above_at(fields, params, batch):
    z = params._replace(**fields)
    return upper.full(z.upper, z.lower, batch)

  def height_at(fields, params, batch, known):
    z = params._replace(**fields)
    return height.fn(z.upper, z.lower, params, batch, known)

  def result(above, one, height, lower, gradients):
    below, two, *more = lower
    values = (above, below, *([height] if measures_height else []), *more)
    outputs = base.requested_outputs(problem, upper=one, lower=two)
    return values, gradients, outputs

  def rows(batch, params, known):
    fields = {n: getattr(params, n) for n in of}
    (above, one), first = jax.value_and_grad(above_at, has_aux=True)(
      fields, params, batch
    )
    (height, below), second = jax.value_and_grad(height_at, has_aux=True)(
      fields, params, batch, known
    )
    stacked = jax.tree.map(lambda *r: jnp.stack(r), first, second)
    jacobian = types.Jacobian(base.gradients(params, **stacked))
    return result(above, one, height, below, jacobian)

  def fused(batch, params, known, weigh_above, weigh_height):
    def loss(fields):
      above, one = above_at(fields, params, batch)
      height, below = height_at(fields, params, batch, known)
      total = weigh_above * above + weigh_height * height
      return total, (above, one, height, below)

    fields = {n: getattr(params, n) for n in of}
    slopes, (above, one, height, below) = jax.grad(loss, has_aux=True)(fields)
    gradients = base.gradients(params, **slopes)
    return result(above, one, height, below, gradients)

  def evaluate(mean, params, batch, count):
    known: Any = None
    parts: Callable[..., Any] = rows
    more: tuple[Any, ...] = ()
    if prepare is not None and mean is not base.WHOLE:
      known = prepare(mean, params, batch)
    if penalty is not None:
      now = count.count if scheduled else None
      parts, more = fused, weights(now, _trees.widest_dtype(params))
      if scheduled:
        count = count.next()
    values, gradients, outputs = mean.of(parts, batch, params, known, *more)
    return values, gradients, count, *outputs

  # A constant weight needs no count, which saves a buffer.
  scheduled = callable(penalty)
  if penalty is not None:
    weights = _penalty.penalty_weights(penalty, rescale=rescale)
  if scheduled:
    shared['init'] = states.no_updates
  at_once = functools.partial(evaluate, base.WHOLE)
  return base.oracle(
    at_once if prepare is None else base.ByMean(evaluate),
    **shared,
    linear=prepare is None,
  )
