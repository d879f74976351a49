"""The shortest vector in the convex hull of gradients."""

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
  stationary points. It is that of the gradients it is given: with noisy ones
  it is biased, because the weights depend on the noise; see `moco`. `smg`, the
  stochastic multi-gradient method, is another name of it.

  Where rows are almost linearly dependent, it is computed from the rows by a QR
  factorisation, so that the short direction that is left of rows which nearly
  cancel, down to angles of some 1e-5 in float32, conflicts with none of them.
  From a `Gramian`, which has only products, this holds down to some 1e-2.

  Args:
    objectives: the number of rows.
    normalise: whether each row is first divided by its norm, as multi-task
      codes do where losses have different scales. The weights reported are
      those of the rows as given.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
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

  def choose(found):
    if not normalise:
      return _quadratic.min_norm_weights(found)
    unit = found._replace(lengths=jnp.sign(found.lengths))
    pulls = _quadratic.min_norm_weights(unit)
    return _rows.of_unit_rows(found, pulls)

  def choose_exactly(factor):
    columns = _quadratic.full_rank(factor.lower)
    lengths = factor.lengths
    if normalise:
      lengths = jnp.sign(lengths)
    image, weights = _quadratic.min_norm(lengths, columns)
    if normalise:
      weights = _rows.of_unit_rows(factor, weights)
    return image[:objectives], weights

  return _by_weights.by_gramian_or_factor(
    'mgda', objectives, choose, choose_exactly
  )


# Names of the same link, by what the oracle before it sees.
smg = mgda  # A mini-batch.
