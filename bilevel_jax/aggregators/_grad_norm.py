"""GradNorm: weights that equalise the training rates of the objectives."""

import jax.numpy as jnp
import optax

from bilevel_jax import _checks, types
from bilevel_jax.aggregators import _by_weights


def grad_norm(
  objectives: int,
  *,
  rate: types.ScalarOrSchedule = 0.025,
  alpha: float = 1.5,
) -> optax.GradientTransformationExtraArgs:
  r"""GradNorm: learns weights that equalise the training rates.

  With the losses relative to their initial values, :math:`p_m = f_m / f_m^0`,
  and the inverse training rates :math:`r_m = p_m / \bar p`,

  .. math::
    d = \sum_m w_m \nabla f_m, \qquad
    w \leftarrow w - \eta \nabla_w \sum_m \left| w_m \| \nabla f_m \|
      - \overline{w \| \nabla f \|} \, r_m^\alpha \right|, \qquad
    \sum_m w_m = M

  where the target :math:`\overline{w \| \nabla f \|} \, r^\alpha` is constant
  in the derivative. The direction uses the weights before the step. A step sets
  weights that would become negative to zero, and is skipped if all would.

  Args:
    objectives: the number of rows :math:`M`.
    rate: step size :math:`\eta`, in units of one over a gradient norm; a
      constant or a schedule.
    alpha: :math:`\alpha \ge 0`, how strongly slow objectives are favoured; 0
      gives all weighted gradients the same length.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` with positive losses to
    one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if they have another number of rows or no losses, or a number is
      negative.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.grad_norm(2, rate=0.1)
    >>> params = jnp.zeros(2)
    >>> rows = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    >>> jacobian = bj.Jacobian(rows, values=jnp.ones(2))
    >>> state = link.init(params)
    >>> for _ in range(2):
    ...   direction, state = link.update(jacobian, state, params)
    >>> print(state.weights.round(1))  # 1 - 0.3, 1 + 0.1, scaled
    [0.8 1.2]

  References:
    Chen, Badrinarayanan, Lee and Rabinovich, `GradNorm: Gradient Normalization
    for Adaptive Loss Balancing in Deep Multitask Networks
    <https://arxiv.org/abs/1711.02257>`_, 2018.
  """
  _checks.within('grad_norm', 'rate', rate, 0)
  _checks.within('grad_norm', 'alpha', alpha, 0)

  def choose(gramian, state):
    first, weights = state.inner
    first = jnp.where(state.count == 0, gramian.values, first)
    progress = gramian.values / first
    rates = (progress / jnp.mean(progress)) ** alpha
    norms = weights * gramian.lengths
    slope = gramian.lengths * jnp.sign(norms - jnp.mean(norms) * rates)
    step = _by_weights.current(rate, state) * slope
    after = jnp.maximum(weights - step, 0)
    total = jnp.sum(after)
    after = jnp.where(total > 0, objectives * after / total, weights)
    return weights, jnp.stack([first, after])

  start = lambda params, dtype: jnp.ones([2, objectives], dtype)
  return _by_weights.by_gramian(
    'grad_norm', objectives, choose, start, losses=True
  )
