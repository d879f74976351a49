"""ConFIG: a direction at given angles to all gradients."""

from collections.abc import Sequence

import chex
import jax.numpy as jnp
import optax

from bilevel_jax import _trees
from bilevel_jax.aggregators import _by_weights, _rows


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
  the direction is zero where no direction has the cosines.

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
  given = _by_weights.preferences('config', objectives, preference)

  def choose(found, inner):
    lengths, cosines = found.lengths, found.cosines
    wanted = jnp.asarray(given, lengths.dtype)
    longest = jnp.max(lengths)
    pulls = jnp.linalg.pinv(cosines, hermitian=True) @ wanted
    along = cosines @ pulls
    square = pulls @ along
    # Where the preferred cosines are out of reach, only rounding is left.
    room = objectives * jnp.finfo(lengths.dtype).eps
    fine = square > room * jnp.sum(wanted**2)
    total = _trees.ratio(lengths, longest) @ along
    scale = jnp.where(fine, total / jnp.where(fine, square, 1), 0)
    return _rows.of_unit_rows(found, pulls * scale, longest), inner

  return _by_weights.by_gramian('config', objectives, choose)
