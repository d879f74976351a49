"""CAGrad: the best worst case within a ball around the mean gradient."""

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.aggregators import _quadratic, _weighted

_HALVINGS = 40


def cagrad(
  objectives: int, *, radius: float = 0.4
) -> optax.GradientTransformationExtraArgs:
  r"""CAGrad: raises the least progress, within a ball around the mean gradient.

  .. math::
    d = \arg\max_{d} \min_m \nabla f_m^\top d \quad \text{where} \quad
    \| d - g_0 \| \le c \| g_0 \|, \quad g_0 = \frac{1}{M} \sum_m \nabla f_m

  By its dual, :math:`d = g_0 + c \|g_0\| g_w / \|g_w\|` with weights
  :math:`w` on the simplex that minimise
  :math:`g_w^\top g_0 + c \|g_0\| \|g_w\|`. They are found to machine precision:
  for a given length of :math:`g_w` they solve a quadratic program, and the
  length is bisected.

  Args:
    objectives: the number of rows.
    radius: :math:`c`, dimensionless, usually in (0, 1); 0 gives the mean.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
    ValueError: if they have another number of rows, or the radius is negative.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.cagrad(2, radius=0.5)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[2.0, 0.0], [0.0, 2.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0])
    [1.5 1.5]

  References:
    Liu, Liu, Jin, Stone and Liu, `Conflict-Averse Gradient Descent for
    Multi-task Learning <https://arxiv.org/abs/2110.14048>`_, 2021.
  """
  _weighted.require_positive('cagrad', zero=True, radius=radius)

  def choose(seen):
    gramian = _quadratic.normalised(seen.gramian())
    size, dtype = gramian.shape[0], gramian.dtype
    mean = jnp.full([size], 1 / size, dtype)
    pull = gramian @ mean
    square = jnp.maximum(mean @ pull, 0)
    reach = jnp.asarray(radius, dtype) * jnp.sqrt(square)
    tiny = jnp.finfo(dtype).eps

    def weights_at(length):
      # reach * |g_w| <= reach / 2 * (|g_w|^2 / length + length), with equality
      # at the right length. On the simplex the linear term is a quadratic one,
      # and a constant makes the whole convex.
      curve = reach * gramian / length
      constant = square * length / jnp.maximum(reach, tiny) + 1
      linear = pull[:, None] + pull[None, :]
      return _quadratic.min_norm_weights(curve + linear + constant)

    def norm(weights):
      return jnp.sqrt(jnp.maximum(weights @ gramian @ weights, 0))

    def halve(_, ends):
      low, high = ends
      middle = (low + high) / 2
      longer = norm(weights_at(middle)) > middle
      return (
        jnp.where(longer, middle, low),
        jnp.where(longer, high, middle),
      )

    most = jnp.sqrt(jnp.max(jnp.diagonal(gramian))) + tiny
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (0 * most, most))
    chosen = weights_at((low + high) / 2)
    length = norm(chosen)
    # Where the shortest combination vanishes, no direction helps all.
    stationary = length < 1e-4
    share = reach / jnp.where(stationary, 1, length)
    return jnp.where(stationary, 0, mean + share * chosen), ()

  return _weighted.by_weights('cagrad', objectives, choose)
