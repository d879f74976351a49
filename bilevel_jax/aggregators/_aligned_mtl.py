"""Aligned-MTL: principal components of one size."""

import jax.numpy as jnp
import optax

from bilevel_jax import _trees
from bilevel_jax.aggregators import _by_weights


def aligned_mtl(objectives: int) -> optax.GradientTransformationExtraArgs:
  r"""Aligned-MTL: rescales the principal components of the gradients alike.

  With the singular value decomposition :math:`J = U \Sigma V^\top` and the
  least nonzero singular value :math:`\sigma_r`,

  .. math::
    d = J^\top w, \qquad
    w = \sigma_r \, U \Sigma^{-1} U^\top \frac{1}{M} \mathbf{1}

  A singular value below :math:`M \epsilon` times the largest one counts as
  zero, where :math:`\epsilon` is the spacing of floats: a gradient that is a
  million times shorter than another one is left out in float32.

  Args:
    objectives: the number of rows :math:`M`.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
    ValueError: if they have another number of rows.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.aligned_mtl(2)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[4.0, 0.0], [0.0, 1.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0].round(3))
    [0.5 0.5]

  References:
    Senushkin, Patakin, Kuznetsov and Konushin, `Independent Component Alignment
    for Multi-Task Learning <https://arxiv.org/abs/2305.19000>`_, 2023.
  """

  def choose(found, inner):
    spacing = objectives * jnp.finfo(found.lengths.dtype).eps
    # By a square root of the cosines: in the Gram matrix itself, half of the
    # digits of the small singular values would be lost.
    values, vectors = jnp.linalg.eigh(found.cosines)
    values = jnp.where(values > spacing * values[-1], values, 0)
    lengths = _trees.ratio(found.lengths, jnp.max(found.lengths))
    square = lengths[:, None] * vectors * jnp.sqrt(values)
    left, sizes, _ = jnp.linalg.svd(square)
    present = sizes > spacing * sizes[0]
    least = jnp.min(jnp.where(present, sizes, jnp.inf))
    scale = jnp.where(present, least / jnp.where(present, sizes, 1), 0)
    return left @ (scale * jnp.mean(left, axis=0)), inner

  return _by_weights.by_gramian('aligned_mtl', objectives, choose)
