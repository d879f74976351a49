"""MGDA: the shortest vector in the convex hull of the gradients."""

import jax.numpy as jnp
import optax

from bilevel_jax.aggregators import _by_weights, _quadratic, _rows


def mgda(
  objectives: int, *, normalise: bool = False
) -> optax.GradientTransformationExtraArgs:
  r"""MGDA: the shortest convex combination of the gradients, solved exactly.

  .. math::
    d = J^\top w^*, \qquad w^* = \arg\min_{w \in \Delta} \| J^\top w \|^2

  Its negative descends every objective, and it is zero only at Pareto
  stationary points. With noisy gradients it is biased, because the weights
  depend on the noise; see `moco`. `smg`, the stochastic multi-gradient method,
  is another name for it.

  For almost linearly dependent rows, a QR factorisation of the rows is used: if
  they nearly cancel, at angles down to about 1e-5 in float32, the short
  direction still conflicts with none of them. From a `Gramian`, which has only
  products, this holds down to about 1e-2.

  Args:
    objectives: the number of rows.
    normalise: whether each row is first divided by its norm, as in multi-task
      code for losses of different scales. The weights in the state are those of
      the rows before division.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if they have another number of rows.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.mgda(2)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[2.0, 0.0], [0.0, 2.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0])
    [1. 1.]

  References:
    Desideri, Multiple-gradient descent algorithm (MGDA) for multiobjective
    optimization, 2012. Sener and Koltun, `Multi-Task Learning as
    Multi-Objective Optimization <https://arxiv.org/abs/1810.04650>`_, 2018.
    Liu and Vicente, `The stochastic multi-gradient algorithm for
    multi-objective optimization <https://arxiv.org/abs/1907.04472>`_, 2021.
  """

  def choose(gram):
    if not normalise:
      return _quadratic.min_norm_weights(gram)
    unit = gram._replace(lengths=jnp.sign(gram.lengths))
    unit_weights = _quadratic.min_norm_weights(unit)
    return _rows.row_weights(gram, unit_weights)

  def choose_exactly(factor):
    columns = _quadratic.full_rank(factor.lower)
    lengths = factor.lengths
    if normalise:
      lengths = jnp.sign(lengths)
    image, weights = _quadratic.min_norm(lengths, columns)
    if normalise:
      weights = _rows.row_weights(factor, weights)
    return image[:objectives], weights

  return _by_weights.by_gramian_or_factor(
    'mgda', objectives, choose, choose_exactly
  )


smg = mgda  # The name of MGDA with gradients of mini-batches.
