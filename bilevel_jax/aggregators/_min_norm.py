"""The shortest vector in the convex hull of gradients."""

import jax.numpy as jnp
import optax

from bilevel_jax.aggregators import _quadratic, _weighted


def mgda(
  objectives: int, *, normalise: bool = False
) -> optax.GradientTransformationExtraArgs:
  r"""MGDA: the shortest convex combination of the gradients, solved exactly.

  .. math::
    d = J^\top w^*, \qquad w^* = \arg\min_{w \in \Delta} \| J^\top w \|^2

  Its negative descends every objective, and it is zero only at Pareto
  stationary points. It is that of the gradients it is given: with noisy ones
  it is biased, because the weights depend on the noise; see `moco`.

  Args:
    objectives: the number of rows, any; two have a closed form, more an active
      set method.
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
  """

  def choose(seen):
    gramian = seen.gramian()
    if not normalise:
      return _quadratic.min_norm_weights(gramian), ()
    norms = jnp.sqrt(jnp.diagonal(gramian))
    inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    unit = gramian * inverse[:, None] * inverse[None, :]
    return _quadratic.min_norm_weights(unit) * inverse, ()

  return _weighted.by_weights('mgda', objectives, choose)


def smg(objectives: int) -> optax.GradientTransformationExtraArgs:
  """SMG, the stochastic multi-gradient method: `mgda` on noisy gradients.

  The same link under the name that comparisons use: what differs is only that
  the oracle before it sees a mini-batch. Its direction is biased.

  Args:
    objectives: the number of rows.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.smg(2)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[1.0, 1.0], [1.0, -1.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0])
    [1. 0.]

  References:
    Liu and Vicente, `The stochastic multi-gradient algorithm for
    multi-objective optimization <https://arxiv.org/abs/1907.04472>`_, 2021.
  """
  return mgda(objectives)
