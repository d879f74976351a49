"""IMTL-G: equal projections on all gradients."""

import jax.numpy as jnp
import optax

from bilevel_jax import _trees
from bilevel_jax.aggregators import _by_weights, _quadratic


def imtl_g(objectives: int) -> optax.GradientTransformationExtraArgs:
  r"""IMTL-G: the combination with equal projections on all unit gradients.

  .. math::
    d = J^\top w, \quad \sum_m w_m = 1, \qquad
    \frac{\nabla f_m^\top d}{\|\nabla f_m\|} \text{ equal for all } m

  Weights may be negative. A gradient that vanishes is left out. Where gradients
  depend on each other, :math:`d` may be zero: then so are all projections.

  Args:
    objectives: the number of rows.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
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
    # How much each row of length one counts in the sum of weights, in units of
    # the shortest one, so that nothing overflows.
    counts = _trees.ratio(shortest, lengths)
    inverse, regular = _quadratic.triangular_inverse(lower)
    # The direction with projections of one is the first row and a part across
    # it. By how much a unit row's part along the first is less than one, from
    # its parts across: as a difference it would be rounding at small angles.
    first = lower[:, 0]
    across = jnp.sum(lower[:, 1:] ** 2, axis=1)
    near = across / (1 + jnp.abs(first))
    lacking = jnp.where(first > 0, near, 1 - first)
    equal = (inverse @ lacking).at[0].set(1)
    equal = equal / ((inverse @ counts) @ equal)
    # Where rows depend on each other, the least squares of the equations for
    # the weights and what all projections are equal to.
    there = (lengths > 0).astype(lengths.dtype)
    system = jnp.block(
      [
        [lower @ lower.T + jnp.diag(1 - there), -there[:, None]],
        [counts[None, :], jnp.zeros((1, 1), lengths.dtype)],
      ]
    )
    pulls = jnp.where(
      regular, inverse.T @ equal, jnp.linalg.pinv(system)[:-1, -1]
    )
    direction = jnp.where(regular, equal, lower.T @ pulls)
    return shortest * direction, pulls * counts

  return _by_weights.by_factor('imtl_g', objectives, choose)
