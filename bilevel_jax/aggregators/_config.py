"""ConFIG: a direction with preferred cosines to all gradients."""

from collections.abc import Sequence

import chex
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _trees
from bilevel_jax.aggregators import _by_weights, _quadratic, _rows


def config(
  objectives: int,
  *,
  preference: Sequence[float] | chex.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""ConFIG: the direction whose cosines with the gradients match a preference.

  .. math::
    u = \frac{U^+ p}{\| U^+ p \|}, \qquad
    d = \Big( \sum_m \nabla f_m^\top u \Big) u

  The rows of :math:`U` are the gradients divided by their lengths, and
  :math:`U^+` is the pseudo-inverse. A zero gradient is left out, and the
  direction is zero if no direction has the preferred cosines. A QR
  factorisation of the rows resolves angles down to about 1e-6 in float32; from
  a `Gramian`, which has only products, down to about 1e-3.

  Args:
    objectives: the number of rows.
    preference: :math:`p \ge 0`, (objectives,): the ratios of the cosines; equal
      by default, so that the direction conflicts with no gradient while these
      are linearly independent.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if they have another number of rows, or a preference is
      negative.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.config(2)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[4.0, 0.0], [0.0, 1.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0].round(2))
    [2.5 2.5]

  References:
    Liu, Chu and Thuerey, `ConFIG: Towards Conflict-free Training of Physics
    Informed Neural Networks <https://arxiv.org/abs/2408.11104>`_, 2024.
  """
  shares = _checks.preferences('config', objectives, preference)

  def choose(factor):
    lengths, lower = factor.lengths, factor.lower
    target = jnp.asarray(shares, lengths.dtype)
    longest = jnp.max(lengths)
    inverse, _ = _quadratic.triangular_inverse(lower)
    # U^+ p in the basis of the rows, and the cosines that it attains.
    toward = inverse @ target
    along = lower @ toward
    size = jnp.linalg.norm(toward)
    # If the preferred cosines are unreachable, only the rounding of the inverse
    # and of its product is left.
    eps = jnp.finfo(lengths.dtype).eps
    rounding = objectives * eps * jnp.linalg.norm(inverse)
    attained = size > rounding * jnp.linalg.norm(target)
    unit = jnp.where(attained, toward / jnp.where(attained, size, 1), 0)
    share = _trees.ratio(lengths, longest)
    # The length of d is the sum of |f_m| u_m' u, where u_m' u = along / size.
    total = share @ jnp.where(attained, along / jnp.where(attained, size, 1), 0)
    unit_weights = inverse.T @ (total * unit)
    return longest * total * unit, _rows.row_weights(
      factor, unit_weights, longest
    )

  return _by_weights.by_factor('config', objectives, choose)
