"""STCH: the gradient of a smooth maximum of the losses."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, types
from bilevel_jax.aggregators import _by_weights


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

  Every Pareto-optimal point minimises it for some preference. Weighted sums of
  losses miss the points of a front that is not convex.

  Args:
    objectives: the number of rows.
    smoothing: :math:`\mu > 0`, in units of weighted losses; a constant or a
      schedule.
    preference: :math:`p`, (objectives,); equal ones that sum to one by default.
    reference: :math:`z`, one loss or one for each objective.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` with losses to one
    gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
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
  _checks.within('stch', 'smoothing', smoothing, 0, open_low=True)
  shares = _checks.preferences('stch', objectives, preference, open_low=True)

  def choose(jacobian, state):
    dtype = state.weights.dtype
    scale = jnp.asarray(shares, dtype)
    distance = scale * (jacobian.values - jnp.asarray(reference, dtype))
    smooth = _by_weights.current(smoothing, state)
    return scale * jax.nn.softmax(distance / smooth), ()

  return _by_weights.by_weights('stch', objectives, choose, losses=True)
