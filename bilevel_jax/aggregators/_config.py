"""ConFIG: a direction at given angles to all gradients."""

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
  r"""ConFIG: the direction whose cosines with the gradients are as preferred.

  .. math::
    u = \frac{U^+ p}{\| U^+ p \|}, \qquad
    d = \Big( \sum_m \nabla f_m^\top u \Big) u

  The rows of :math:`U` are the gradients divided by their lengths, and
  :math:`U^+` is the pseudo-inverse. A gradient that vanishes is left out, and
  the direction is zero where no direction has the cosines. It is computed from
  the rows by a QR factorisation, so that angles down to some 1e-6 count in
  float32; from a `Gramian`, which has only products, down to some 1e-3.

  Args:
    objectives: the number of rows.
    preference: :math:`p \ge 0`, (objectives,): the ratios of the cosines; equal
      by default, so that no gradient is conflicted with while all are linearly
      independent.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
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
    wanted = jnp.asarray(shares, lengths.dtype)
    longest = jnp.max(lengths)
    inverse, _ = _quadratic.triangular_inverse(lower)
    # U^+ p in the basis of the rows, and the cosines that it attains.
    toward = inverse @ wanted
    along = lower @ toward
    size = jnp.linalg.norm(toward)
    # Where the preferred cosines are out of reach, only rounding is left: that
    # of the inverse, which multiplies a rounding of its own.
    room = objectives * jnp.finfo(lengths.dtype).eps * jnp.linalg.norm(inverse)
    fine = size > room * jnp.linalg.norm(wanted)
    unit = jnp.where(fine, toward / jnp.where(fine, size, 1), 0)
    share = _trees.ratio(lengths, longest)
    # |f_m| u_m' u sums to the length; u_m' u is what is attained over the size.
    total = share @ jnp.where(fine, along / jnp.where(fine, size, 1), 0)
    pulls = inverse.T @ (total * unit)
    return longest * total * unit, _rows.of_unit_rows(factor, pulls, longest)

  return _by_weights.by_factor('config', objectives, choose)
