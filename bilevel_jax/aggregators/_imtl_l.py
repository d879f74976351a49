"""IMTL-L: learned scales that make all losses equal."""

import jax.numpy as jnp
import optax

from bilevel_jax import _checks, types
from bilevel_jax.aggregators import _by_weights


def imtl_l(
  objectives: int, *, rate: types.ScalarOrSchedule = 0.025
) -> optax.GradientTransformationExtraArgs:
  r"""IMTL-L: learns scales that make all losses equal.

  .. math::
    d = \sum_m e^{s_m} \nabla f_m, \qquad
    s \leftarrow s - \eta \nabla_s \sum_m \left( e^{s_m} f_m - s_m \right)

  For constant losses, the scaled losses converge to one.

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
    >>> link, params = bj.aggregators.imtl_l(2, rate=0.5), jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.eye(2), values=jnp.array([0.5, 2.0]))
    >>> state = link.init(params)
    >>> for _ in range(30):
    ...   direction, state = link.update(jacobian, state, params)
    >>> print((state.weights * jacobian.values).round(2))
    [1. 1.]

  References:
    Liu, Li, Kuang, Xue, Chen, Yang, Liao and Zhang, Towards Impartial
    Multi-task Learning, 2021.
  """
  _checks.within('imtl_l', 'rate', rate, 0)

  def choose(jacobian, state):
    weights = jnp.exp(state.inner)
    step = _by_weights.current(rate, state)
    return weights, state.inner - step * (weights * jacobian.values - 1)

  start = lambda params, dtype: jnp.zeros([objectives], dtype)
  return _by_weights.by_weights(
    'imtl_l', objectives, choose, start, losses=True
  )
