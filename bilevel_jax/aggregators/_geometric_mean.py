"""The geometric mean of the losses, a scale-invariant objective."""

import jax.numpy as jnp
import optax

from bilevel_jax.aggregators import _by_weights


def geometric_mean(
  objectives: int,
) -> optax.GradientTransformationExtraArgs:
  r"""The gradient of the losses' geometric mean.

  .. math::
    d = \nabla \Big( \prod_m f_m \Big)^{1 / M}
      = \Big( \prod_m f_m \Big)^{1 / M} \frac{1}{M} \sum_m
        \frac{\nabla f_m}{f_m}

  Multiplying a loss by a constant multiplies the direction by its M-th root and
  does not turn the direction.

  Args:
    objectives: the number of rows :math:`M`.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` with positive losses to
    one gradient, which is NaN if a loss is not positive.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if they have another number of rows or no losses.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link, params = bj.aggregators.geometric_mean(2), jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.eye(2), values=jnp.array([1.0, 4.0]))
    >>> print(link.update(jacobian, link.init(params), params)[0])
    [1.   0.25]

  References:
    Chennupati, Sistu, Yogamani and Rawashdeh, `MultiNet++: Multi-Stream Feature
    Aggregation and Geometric Loss Strategy for Multi-Task Learning
    <https://arxiv.org/abs/1904.08492>`_, 2019.
  """

  def choose(jacobian, state):
    del state
    logs = jnp.log(jacobian.values)
    return jnp.exp(jnp.mean(logs) - logs) / objectives, ()

  return _by_weights.by_weights(
    'geometric_mean', objectives, choose, losses=True
  )
