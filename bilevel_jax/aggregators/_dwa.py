"""DWA: weights from the decrease of each loss over the last two epochs."""

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks
from bilevel_jax.aggregators import _by_weights


def dwa(
  objectives: int, *, temperature: float = 2.0, period: int = 1
) -> optax.GradientTransformationExtraArgs:
  r"""DWA: dynamic weight averages from the recent decrease of each loss.

  With the mean losses :math:`L^{t}` of epoch t,

  .. math::
    d = J^\top w, \qquad w_m = M \operatorname{softmax}_m \left(
      \frac{L_m^{t-1}}{L_m^{t-2}} \Big/ T \right)

  and :math:`w = 1` in the first two epochs.

  Args:
    objectives: the number of rows :math:`M`.
    temperature: :math:`T > 0`; larger values give more equal weights.
    period: updates per epoch. With one, the weights follow the noise of each
      batch.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` with positive losses to
    one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if they have another number of rows or no losses, or a number is
      out of range.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link, params = bj.aggregators.dwa(2), jnp.zeros(2)
    >>> state = link.init(params)
    >>> for losses in ([4.0, 4.0], [1.0, 4.0], [1.0, 4.0]):
    ...   jacobian = bj.Jacobian(jnp.eye(2), values=jnp.array(losses))
    ...   direction, state = link.update(jacobian, state, params)
    >>> print(direction.round(1))  # The first loss fell to a quarter.
    [0.8 1.2]

  References:
    Liu, Johns and Davison, `End-to-End Multi-Task Learning with Attention
    <https://arxiv.org/abs/1803.10704>`_, 2019.
  """
  _checks.within('dwa', 'temperature', temperature, 0, open_low=True)
  _checks.whole_number('dwa', 'updates in a period', period)

  def choose(jacobian, state):
    # The mean losses of the current epoch so far and of the last two epochs.
    new_epoch = state.count % period == 0
    shifted = jnp.roll(state.inner, 1, axis=0).at[0].set(0)
    means = jnp.where(new_epoch, shifted, state.inner)
    early = state.count < 2 * period
    fall = jnp.where(early, 1, means[1] / jnp.where(early, 1, means[2]))
    weights = objectives * jax.nn.softmax(fall / temperature)
    return weights, means.at[0].add(jacobian.values / period)

  start = lambda params, dtype: jnp.zeros([3, objectives], dtype)
  return _by_weights.by_weights('dwa', objectives, choose, start, losses=True)
