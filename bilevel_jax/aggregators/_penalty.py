"""The weighted sum of an objective and a penalty."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import _functions, _trees, states, types
from bilevel_jax.aggregators import _rows


def _check_weight(value: Any, where: str, what: str, positive: bool) -> None:
  if isinstance(value, jax.core.Tracer):
    return
  # NumPy works inside a traced function too.
  array = np.asarray(value)
  real = array.dtype.kind in 'iuf' or hasattr(value, 'dtype')
  fits = real and not array.ndim and (array > 0 if positive else array >= 0)
  if not fits:
    bound = '> 0' if positive else '>= 0'
    raise ValueError(
      f'{what} is a weight {bound}, a scalar; got {value!r}{where}.'
    )


def checked_schedule(
  weight: types.ScalarOrSchedule,
  what: str = 'the penalty',
  *,
  positive: bool = False,
) -> Callable[[chex.Numeric], chex.Numeric]:
  """Checks a weight and converts it to a schedule.

  Args:
    weight: a constant or a schedule from the count, nonnegative.
    what: the name of the weight, for the error.
    positive: whether zero is invalid too. Compiled steps cannot raise errors:
      there, a value that is not positive becomes NaN.

  Returns:
    A schedule.

  Raises:
    ValueError: if the weight is negative or not a scalar. A schedule is checked
      at zero and at powers of ten up to a million.
  """
  if not callable(weight):
    _check_weight(weight, '', what, positive)
    schedule = lambda count: weight
  else:
    # A compiled step cannot raise errors, so the schedule is sampled now.
    for step in (0, *(10**k for k in range(7))):
      where = f' from the schedule at step {step}'
      with _functions.explained(f'the schedule of {what}', ('count',), (step,)):
        value = weight(step)
      _check_weight(value, where, what, positive)
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
  """The weights of an objective and its penalty.

  Args:
    penalty: a constant or a schedule from the count, nonnegative.
    rescale: whether to multiply both weights by min(1 / penalty, 1).

  Returns:
    A function of the number of updates so far and a dtype to two scalars.

  Raises:
    ValueError: as in `checked_schedule`.
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

  The curvature of the sum grows with :math:`\gamma`, so a stable step size
  shrinks as its inverse. The factor :math:`c_k` has that effect: step sizes
  need no retuning when :math:`\gamma` changes.

  Args:
    penalty: weight :math:`\gamma_k \ge 0`, dimensionless; a constant, or a
      schedule from the number of updates so far.
    rescale: whether to multiply by :math:`c_k`.

  Returns:
    A transformation from a `Jacobian` with two rows (objective, penalty) to
    gradients of the parameters' structure.

  Raises:
    ValueError: if the penalty is negative, or if a `Jacobian` does not have two
      rows.
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
      # Written as a sum so that XLA never builds the stacked rows.
      total = objective * rows[0] + penalised * rows[1]
      return total.astype(rows.dtype)

    gradients = jax.tree.map(weigh, jacobian.rows)
    gradients = _rows.with_rest(gradients, jacobian.rest)
    return gradients, ScaleByPenaltyState(optax.safe_increment(state.count))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
