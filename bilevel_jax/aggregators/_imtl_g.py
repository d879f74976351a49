"""IMTL-G: equal projections onto all gradients."""

import jax.numpy as jnp
import optax

from bilevel_jax import _trees
from bilevel_jax.aggregators import _by_weights, _quadratic


def imtl_g(objectives: int) -> optax.GradientTransformationExtraArgs:
  r"""IMTL-G: the combination with equal projections onto all unit gradients.

  .. math::
    d = J^\top w, \quad \sum_m w_m = 1, \qquad
    \frac{\nabla f_m^\top d}{\|\nabla f_m\|} \text{ equal for all } m

  Weights may be negative. A zero gradient is left out. For linearly dependent
  gradients, :math:`d` and so all projections may be zero.

  Args:
    objectives: the number of rows.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if they have another number of rows.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.imtl_g(2)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[4.0, 0.0], [0.0, 1.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0].round(3))
    [0.8 0.8]

  References:
    Liu, Li, Kuang, Xue, Chen, Yang, Liao and Zhang, Towards Impartial
    Multi-task Learning, 2021.
  """

  def choose(factor):
    lengths, lower = factor.lengths, factor.lower
    longest = jnp.max(lengths)
    shortest = jnp.min(jnp.where(lengths > 0, lengths, longest))
    # How much each unit row counts in the sum of weights, in units of the
    # shortest row to prevent overflow.
    shares = _trees.ratio(shortest, lengths)
    inverse, regular = _quadratic.triangular_inverse(lower)
    # The direction with unit projections is the first row plus a part
    # orthogonal to it. 1 - first comes from the orthogonal parts of a row,
    # because the difference has only rounding left at small angles.
    first = lower[:, 0]
    orthogonal = jnp.sum(lower[:, 1:] ** 2, axis=1)
    difference = orthogonal / (1 + jnp.abs(first))
    difference = jnp.where(first > 0, difference, 1 - first)
    equal = (inverse @ difference).at[0].set(1)
    equal = equal / ((inverse @ shares) @ equal)
    # For linearly dependent rows, least squares for the weights and the common
    # projection.
    nonzero = (lengths > 0).astype(lengths.dtype)
    system = jnp.block(
      [
        [lower @ lower.T + jnp.diag(1 - nonzero), -nonzero[:, None]],
        [shares[None, :], jnp.zeros((1, 1), lengths.dtype)],
      ]
    )
    unit_weights = jnp.where(
      regular, inverse.T @ equal, jnp.linalg.pinv(system)[:-1, -1]
    )
    direction = jnp.where(regular, equal, lower.T @ unit_weights)
    return shortest * direction, unit_weights * shares

  return _by_weights.by_factor('imtl_g', objectives, choose)
