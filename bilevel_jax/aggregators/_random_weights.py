"""RLW: random weights, a baseline for learned weights."""

import chex
import jax
import optax

from bilevel_jax import _keys
from bilevel_jax.aggregators import _by_weights


def random_weights(
  objectives: int, *, key: chex.PRNGKey | int
) -> optax.GradientTransformationExtraArgs:
  r"""RLW: draws random weights in each update, a baseline for learned weights.

  .. math::
    d = J^\top w, \qquad w = \operatorname{softmax}(u), \quad
    u \sim \mathcal{N}(0, I)

  The expected direction is the mean of the gradients: RLW is gradient descent
  with more noise.

  Args:
    objectives: the number of rows.
    key: PRNG key of the weights, or a whole number.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian` or a `Gramian`, or
      the key is missing.
    ValueError: if they have another number of rows.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link, params = bj.aggregators.random_weights(2, key=0), jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.eye(2))
    >>> direction, _ = link.update(jacobian, link.init(params), params)
    >>> print(direction.sum().round(3))
    1.0

  References:
    Lin, Ye, Zhang and Tsang, `Reasonable Effectiveness of Random Weighting: A
    Litmus Test for Multi-Task Learning <https://arxiv.org/abs/2111.10603>`_,
    2022.
  """

  def choose(jacobian, state):
    del jacobian
    key, now = jax.random.split(state.inner)
    weights = state.weights
    drawn = jax.random.normal(now, weights.shape, weights.dtype)
    return jax.nn.softmax(drawn), key

  start = lambda params, dtype: _keys.as_key(key, 'random_weights')
  return _by_weights.by_weights('random_weights', objectives, choose, start)
