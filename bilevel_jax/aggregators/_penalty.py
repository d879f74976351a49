"""Weighs an objective and a penalty into one gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import _trees, states, types
from bilevel_jax.aggregators import _rows


def _check_weight(value: Any, where: str, what: str, positive: bool) -> None:
  if isinstance(value, jax.core.Tracer):
    return
  # By numpy, so that it also works while a function is traced.
  fits = np.asarray(value) > 0 if positive else np.asarray(value) >= 0
  if np.ndim(value) or not fits:
    bound = '> 0' if positive else '>= 0'
    raise ValueError(
      f'{what} is a weight {bound}, a scalar; got {value}{where}.'
    )


def checked_schedule(
  weight: types.ScalarOrSchedule,
  what: str = 'the penalty',
  *,
  positive: bool = False,
) -> Callable[[chex.Numeric], chex.Numeric]:
  """A weight as a schedule, checked where it can be.

  Args:
    weight: a constant or a schedule from the count, never negative.
    what: what the error calls it.
    positive: whether zero is refused too. Values that only a compiled step
      knows cannot be: there, one that is not positive is NaN.

  Returns:
    A schedule.

  Raises:
    ValueError: if the weight, or the schedule at a power of ten up to a million
      or at zero, is negative or no scalar.
  """
  if not callable(weight):
    _check_weight(weight, '', what, positive)
    schedule = lambda count: weight
  else:
    # What a schedule gives inside a compiled step cannot raise: sample it now.
    for step in (0, *(10**k for k in range(7))):
      where = f' from the schedule at step {step}'
      _check_weight(weight(step), where, what, positive)
    schedule = weight
  if not positive:
    return schedule

  def above_zero(count):
    value = jnp.asarray(schedule(count))
    return jnp.where(value > 0, value, jnp.nan)

  return above_zero


def penalty_weights(
  penalty: types.ScalarOrSchedule, *, rescale: bool
) -> Callable[[chex.Numeric, Any], tuple[chex.Array, chex.Array]]:
  """The weights of an objective and of its penalty, by count and dtype.

  Args:
    penalty: a constant or a schedule from the count, never negative.
    rescale: whether to multiply both weights by min(1 / penalty, 1).

  Returns:
    A function of the number of updates so far and of a dtype to two scalars.

  Raises:
    ValueError: if the penalty, or the schedule at a power of ten up to a
      million or at zero, is negative or no scalar.
  """
  schedule = checked_schedule(penalty)

  def weights(count, dtype):
    gamma = jnp.asarray(schedule(count), dtype)
    scale = 1 / jnp.maximum(gamma, 1) if rescale else jnp.ones_like(gamma)
    return scale, scale * gamma

  return weights


@states.counts_updates
class ScaleByPenaltyState(NamedTuple):
  """State of `scale_by_penalty`.

  Attributes:
    count: updates so far, an int32 scalar.
  """

  count: chex.Array


def scale_by_penalty(
  penalty: types.ScalarOrSchedule, *, rescale: bool = True
) -> optax.GradientTransformationExtraArgs:
  r"""Weighs an objective and a penalty into one gradient.

  .. math::
    d_k = c_k \, (\nabla f + \gamma_k \nabla p), \qquad
    c_k = \min(1 / \gamma_k, 1)

  The curvature of the sum grows with :math:`\gamma`, and a stable step shrinks
  as its inverse; the factor :math:`c_k` does that, so that step sizes need no
  retuning when :math:`\gamma` changes.

  Args:
    penalty: weight :math:`\gamma_k \ge 0`, dimensionless; a constant, or a
      schedule from the number of updates so far.
    rescale: whether to multiply by :math:`c_k`.

  Returns:
    A transformation from a `Jacobian` with two rows (objective, penalty) to
    gradients of the parameters' structure.

  Raises:
    ValueError: if the penalty is negative, or if a `Jacobian` has not two rows.
    TypeError: if the incoming gradients are not a `Jacobian`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.scale_by_penalty(10.0)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(rows=jnp.array([[1.0, 0.0], [0.0, 1.0]]))
    >>> updates, _ = link.update(jacobian, link.init(params), params)
    >>> print(updates)
    [0.1 1. ]

  References:
    Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method
    <https://arxiv.org/abs/2302.05185>`_, 2023.
  """
  weights = penalty_weights(penalty, rescale=rescale)

  def init_fn(params):
    del params
    return ScaleByPenaltyState(count=jnp.zeros([], jnp.int32))

  def update_fn(jacobian, state, params=None, **extra_args):
    del params, extra_args
    _rows.require(jacobian, 'scale_by_penalty', 2, rows=True)

    def weigh(rows):
      objective, penalised = weights(state.count, _trees.widest_dtype(rows))
      # Written out: XLA then never builds the stacked rows.
      total = objective * rows[0] + penalised * rows[1]
      return total.astype(rows.dtype)

    gradients = jax.tree.map(weigh, jacobian.rows)
    gradients = _rows.with_rest(gradients, jacobian.rest)
    return gradients, ScaleByPenaltyState(optax.safe_increment(state.count))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
