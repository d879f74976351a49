"""Uncertainty weighting: learned variances of the losses."""

import jax.numpy as jnp
import optax

from bilevel_jax import _checks, types
from bilevel_jax.aggregators import _by_weights


def uncertainty_weighting(
  objectives: int, *, rate: types.ScalarOrSchedule = 0.025
) -> optax.GradientTransformationExtraArgs:
  r"""Uncertainty weighting: learns a variance for each objective.

  .. math::
    d = \sum_m \tfrac{1}{2} e^{-s_m} \nabla f_m, \qquad
    s \leftarrow s - \eta \nabla_s \sum_m \tfrac{1}{2}
      \left( e^{-s_m} f_m + s_m \right)

  The log-variances :math:`s` are in the state of the aggregator.

  Args:
    objectives: the number of rows.
    rate: step size :math:`\eta`; a constant or a schedule.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` with losses to one
    gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if they have another number of rows or no losses, or the rate
      is negative.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.uncertainty_weighting(2)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.eye(2), values=jnp.array([1.0, 2.0]))
    >>> print(link.update(jacobian, link.init(params), params)[0])
    [0.5 0.5]

  References:
    Kendall, Gal and Cipolla, `Multi-Task Learning Using Uncertainty to Weigh
    Losses for Scene Geometry and Semantics
    <https://arxiv.org/abs/1705.07115>`_, 2018.
  """
  _checks.within('uncertainty_weighting', 'rate', rate, 0)

  def choose(jacobian, state):
    variance = state.inner
    weights = jnp.exp(-variance) / 2
    step = _by_weights.current(rate, state)
    return weights, variance - step * (0.5 - weights * jacobian.values)

  return _by_weights.by_weights(
    'uncertainty_weighting',
    objectives,
    choose,
    lambda params, dtype: jnp.zeros([objectives], dtype),
    losses=True,
  )
