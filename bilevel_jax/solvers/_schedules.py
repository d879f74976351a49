"""Schedules of step sizes and of penalties."""

from collections.abc import Callable

import chex
import jax.numpy as jnp

from bilevel_jax import _checks


def power_schedule(
  scale: float, exponent: float, offset: float = 1.0
) -> Callable[[chex.Numeric], chex.Numeric]:
  r"""Step sizes that decrease with a power of the number of updates.

  .. math::
    \alpha_k = c \, (k + k_0)^{-p}

  For one timescale, use the same exponent in all sequences; for two, a smaller
  exponent in the faster sequences. With :math:`p = 1`, the fast rate needs
  :math:`c > 1 / (2 \lambda)`, where :math:`\lambda` is the smallest real part
  of an eigenvalue of the joint Jacobian; stability needs :math:`c / k_0 \le 1 /
  L`.

  Args:
    scale: :math:`c > 0`, in units of a step size.
    exponent: :math:`p \ge 0`; 0 for a constant step.
    offset: :math:`k_0 > 0`, in updates.

  Returns:
    A schedule.

  Raises:
    ValueError: if a number is outside these bounds.

  Example:
    >>> import bilevel_jax as bj
    >>> schedule = bj.solvers.power_schedule(2.0, 1.0, 20.0)
    >>> print(schedule(0), schedule(20))
    0.1 0.05
  """
  if not scale > 0 or not exponent >= 0 or not offset > 0:
    raise ValueError(
      'power_schedule takes scale > 0, exponent >= 0 and offset > 0, got '
      f'{scale}, {exponent} and {offset}.'
    )

  def schedule(count: chex.Numeric) -> chex.Numeric:
    # The sum of an int and a float has the default float dtype, also under x64.
    return scale * (jnp.asarray(count) + float(offset)) ** -exponent

  return schedule


@_checks.renamed(least='minimum')
def seal_penalty(
  start: float = 1.0, *, decay: float, epoch: int, minimum: float = 0.01
) -> Callable[[chex.Numeric], chex.Numeric]:
  r"""The published penalty of `seal`: the upper share falls in each epoch.

  .. math::
    w_e = \max(w_0 - e \, \delta, w_{min}), \qquad
    \gamma_k = \frac{1 - w_e}{w_e}, \qquad e = \lfloor k / K \rfloor

  Args:
    start: the share :math:`w_0` of the upper loss in the first epoch, in
      (0, 1]; with 1, the lower loss does not move the model in that epoch.
    decay: :math:`\delta \ge 0`, the decrease in each epoch.
    epoch: :math:`K`, updates in an epoch.
    minimum: the smallest share, in (0, 1].

  Returns:
    A schedule.

  Raises:
    ValueError: if a number is outside these bounds.

  Example:
    >>> import bilevel_jax as bj
    >>> schedule = bj.solvers.seal_penalty(1.0, decay=0.2, epoch=10)
    >>> print(f'{schedule(9):.2f} {schedule(10):.2f} {schedule(20):.2f}')
    0.00 0.25 0.67
  """
  _checks.whole_number('seal_penalty', 'updates in an epoch', epoch)
  for name, number in (('start', start), ('minimum', minimum)):
    _checks.within('seal_penalty', name, number, 0, 1, open_low=True)
  _checks.within('seal_penalty', 'the decay', decay, 0)

  def schedule(count: chex.Numeric) -> chex.Numeric:
    epochs = jnp.asarray(count) // epoch
    share = jnp.maximum(start - epochs * float(decay), min(minimum, start))
    return (1 - share) / share

  return schedule
