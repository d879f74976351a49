"""Weights from the losses: smooth Tchebycheff, learned uncertainties."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import types
from bilevel_jax.aggregators import _weighted


def stch(
  objectives: int,
  *,
  smoothing: types.ScalarOrSchedule,
  preference: Sequence[float] | chex.Array | None = None,
  reference: Sequence[float] | chex.Array | float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  r"""STCH: the gradient of a smooth maximum of the weighted losses.

  .. math::
    d = \nabla \, \mu \log \sum_m \exp \frac{p_m (f_m - z_m)}{\mu}

  Every Pareto-optimal point is the minimiser for some preference, which sums
  of losses cannot offer where the front is not convex.

  Args:
    objectives: the number of rows.
    smoothing: :math:`\mu > 0`, in units of weighted losses; a constant or a
      schedule.
    preference: :math:`p`, (objectives,); equal ones that sum to one by default.
    reference: :math:`z`, a loss or one for each objective.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` with losses to one
    gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
    ValueError: if they have another number of rows or no losses, or a number
      is out of range.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.stch(2, smoothing=0.01)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.eye(2), values=jnp.array([1.0, 2.0]))
    >>> print(link.update(jacobian, link.init(params), params)[0].round(3))
    [0.  0.5]

  References:
    Lin, Zhang, Yang, Liu, Wang and Zhang, `Smooth Tchebycheff Scalarization for
    Multi-Objective Optimization <https://arxiv.org/abs/2402.19078>`_, 2024.
  """
  _weighted.require_positive('stch', smoothing=smoothing)
  if preference is not None:
    _weighted.require_positive('stch', preference=preference)
    if np.shape(preference) != (objectives,):
      raise ValueError(
        f'stch: preference has shape {np.shape(preference)}, expected a '
        f'number for each of {objectives} objectives.'
      )

  def choose(seen):
    values = _weighted.require_values(seen.values, 'stch')
    dtype = values.dtype
    scale = jnp.full([objectives], 1 / objectives, dtype)
    if preference is not None:
      scale = jnp.asarray(preference, dtype)
    smooth = _weighted.at(smoothing, seen.state.count, dtype)
    distance = scale * (values - jnp.asarray(reference, dtype))
    return scale * jax.nn.softmax(distance / smooth), ()

  return _weighted.by_weights('stch', objectives, choose)


def uncertainty_weighting(
  objectives: int, *, rate: types.ScalarOrSchedule = 0.025
) -> optax.GradientTransformationExtraArgs:
  r"""Uncertainty weighting: a variance for each objective is learned as well.

  .. math::
    d = \sum_m \tfrac{1}{2} e^{-s_m} \nabla f_m, \qquad
    s \leftarrow s - \eta \nabla_s \sum_m \tfrac{1}{2}
      \left( e^{-s_m} f_m + s_m \right)

  The log-variances :math:`s` are parameters of its own, held in its state.

  Args:
    objectives: the number of rows.
    rate: step size :math:`\eta`; a constant or a schedule.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` with losses to one
    gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
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
  _weighted.require_positive('uncertainty_weighting', zero=True, rate=rate)

  def choose(seen):
    values = _weighted.require_values(seen.values, 'uncertainty_weighting')
    variance = seen.state.inner
    weights = jnp.exp(-variance) / 2
    step = _weighted.at(rate, seen.state.count, values.dtype)
    return weights, variance - step * (0.5 - weights * values)

  start = lambda dtype: jnp.zeros([objectives], dtype)
  return _weighted.by_weights(
    'uncertainty_weighting', objectives, choose, start
  )
