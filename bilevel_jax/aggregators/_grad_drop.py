"""GradDrop: in each coordinate, only entries of one random sign."""

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _keys
from bilevel_jax.aggregators import _by_weights


def drop_signs(rows: chex.Array, uniform: chex.Array) -> chex.Array:
  """Sums the entries of one sign, drawn for each coordinate."""
  zero = jnp.zeros_like(rows[0])

  def add(parts, row):
    above, below = parts
    return (above + jnp.maximum(row, 0), below + jnp.minimum(row, 0)), None

  # Row by row, since XLA's sums over a leading axis are much slower on CPUs.
  (above, below), _ = jax.lax.scan(add, (zero, zero), rows)
  return jnp.where(uniform * (above - below) < above, above, below)


def grad_drop(
  objectives: int, *, key: chex.PRNGKey | int
) -> optax.GradientTransformationExtraArgs:
  r"""GradDrop: sums in each coordinate only the entries of one random sign.

  .. math::
    d_j = \sum_m J_{mj} \, 1[\operatorname{sign} J_{mj} = s_j], \qquad
    P(s_j = +1) = \tfrac{1}{2} \left( 1 +
      \frac{\sum_m J_{mj}}{\sum_m |J_{mj}|} \right)

  Args:
    objectives: the number of rows.
    key: PRNG key of the signs, or a whole number.

  Returns:
    A transformation from a `Jacobian` to one gradient. It has no weights: those
    in its state stay equal.

  Raises:
    TypeError: if the incoming gradients are not a `Jacobian`, or the key is
      missing.
    ValueError: if they have another number of rows.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> link = bj.aggregators.grad_drop(2, key=jax.random.key(0))
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[1.0, -2.0], [3.0, -1.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0])
    [ 4. -3.]

  References:
    Chen, Ngiam, Huang, Luong, Kretzschmar, Chai and Anguelov, `Just Pick a
    Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout
    <https://arxiv.org/abs/2010.06808>`_, 2020.
  """

  def aggregate(jacobian, state):
    key, now = jax.random.split(state.inner)
    leaves, structure = jax.tree.flatten(jacobian.rows)
    drawn = [
      drop_signs(leaf, jax.random.uniform(k, leaf.shape[1:], leaf.dtype))
      for leaf, k in zip(leaves, jax.random.split(now, len(leaves)))
    ]
    return jax.tree.unflatten(structure, drawn), state.weights, key

  start = lambda params, dtype: _keys.as_key(key, 'grad_drop')
  return _by_weights.aggregator(
    'grad_drop', objectives, aggregate, start, rows=True
  )
