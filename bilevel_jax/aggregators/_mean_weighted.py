"""Equal weights and other constant weights."""

from collections.abc import Sequence

import chex
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax.aggregators import _by_weights


def mean(objectives: int) -> optax.GradientTransformationExtraArgs:
  r"""Weighs all objectives equally: the baseline of every comparison.

  .. math::
    d = \frac{1}{M} \sum_{m=1}^{M} \nabla f_m

  Args:
    objectives: the number of rows :math:`M`.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if they have another number of rows.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.mean(2)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[1.0, 0.0], [0.0, 3.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0])
    [0.5 1.5]
  """
  equal = lambda jacobian, state: (jnp.full(objectives, 1 / objectives), ())
  return _by_weights.by_weights('mean', objectives, equal)


def weighted(
  weights: Sequence[float] | chex.Array,
) -> optax.GradientTransformationExtraArgs:
  r"""Weighs objectives by constants: linear scalarisation.

  .. math::
    d = \sum_{m=1}^{M} w_m \nabla f_m

  Args:
    weights: :math:`w`, (objectives,).

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`.
    ValueError: if the weights are not a vector, or differ in number from the
      rows.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.weighted([1.0, 2.0])
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[1.0, 0.0], [0.0, 3.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0])
    [1. 6.]
  """
  if np.ndim(weights) != 1:
    raise ValueError(
      f'weighted takes a number for each objective, got {weights!r}.'
    )
  constants = jnp.asarray(weights)
  fixed = lambda jacobian, state: (constants, ())
  return _by_weights.by_weights('weighted', len(constants), fixed)
