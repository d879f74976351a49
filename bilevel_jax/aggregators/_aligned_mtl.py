"""Aligned-MTL: principal components of the gradients, scaled to one size."""

import jax.numpy as jnp
import optax

from bilevel_jax import _trees
from bilevel_jax.aggregators import _by_weights, _quadratic


def aligned_mtl(objectives: int) -> optax.GradientTransformationExtraArgs:
  r"""Aligned-MTL: scales the gradients' principal components to one size.

  With the singular value decomposition :math:`J = U \Sigma V^\top` and the
  smallest nonzero singular value :math:`\sigma_r`,

  .. math::
    d = J^\top w, \qquad
    w = \sigma_r \, U \Sigma^{-1} U^\top \frac{1}{M} \mathbf{1}

  A singular value below :math:`(M + 2) \epsilon` times the largest one counts
  as zero, where :math:`\epsilon` is the float spacing: that is the rounding of
  the QR factorisation of the rows. So in float32 a gradient a million times
  shorter than another is left out. A `Gramian`, which has only products, does
  not resolve angles below about 1e-3 in float32.

  Args:
    objectives: the number of rows :math:`M`.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
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

  def choose(factor):
    spacing = (objectives + 2) * jnp.finfo(factor.lengths.dtype).eps
    longest = jnp.max(factor.lengths)
    share = _trees.ratio(factor.lengths, longest)
    left, sizes, right = jnp.linalg.svd(share[:, None] * factor.lower)
    present = sizes > spacing * sizes[0]
    inverse, regular = _quadratic.triangular_inverse(factor.lower)
    # The SVD rounds every singular value relative to the largest one. The
    # largest one of the inverse has the digits of the smallest.
    over = inverse * _trees.ratio(1, share)
    smallest = jnp.where(
      regular & jnp.all(present),
      _trees.ratio(1, jnp.linalg.norm(over, 2)),
      jnp.min(jnp.where(present, sizes, jnp.inf)),
    )
    mean = jnp.mean(left, axis=0)
    scale = jnp.where(present, smallest, 0) * mean
    unit_weights = left @ jnp.where(
      present, scale / jnp.where(present, sizes, 1), 0
    )
    return longest * (scale @ right), unit_weights

  return _by_weights.by_factor('aligned_mtl', objectives, choose)
