"""Measurements of several objectives: stationarity, conflict, bias."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import types
from bilevel_jax.aggregators import _quadratic, _rows


def pareto_stationarity(jacobian: types.Jacobian | types.Gramian) -> chex.Array:
  r"""The distance of a point from Pareto stationarity.

  .. math::
    \min_{w \in \Delta} \| J^\top w \|

  Args:
    jacobian: the Jacobian of the objectives, preferably without noise.

  Returns:
    The norm of the shortest convex combination of the rows; zero if and only if
    no direction decreases all objectives.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> rows = jnp.array([[3.0, 4.0], [3.0, -4.0]])
    >>> print(bj.diagnostics.pareto_stationarity(bj.Jacobian(rows)))
    3.0
  """
  gramian = _rows.gramian(jacobian)
  return _rows.norm(gramian, _quadratic.min_norm_weights(gramian))


def conflict_cosines(jacobian: types.Jacobian | types.Gramian) -> chex.Array:
  r"""The cosines between all pairs of gradients; negative where they conflict.

  .. math::
    C_{ij} = \frac{\nabla f_i^\top \nabla f_j}
      {\|\nabla f_i\| \, \|\nabla f_j\|}

  Args:
    jacobian: the Jacobian of the objectives.

  Returns:
    (objectives, objectives); zero for a gradient that vanishes.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> rows = jnp.array([[1.0, 0.0], [-2.0, 0.0]])
    >>> print(bj.diagnostics.conflict_cosines(bj.Jacobian(rows)))
    [[ 1. -1.]
     [-1.  1.]]
  """
  return _rows.gramian(jacobian).cosines


def objective_weights(state: Any) -> chex.Array:
  """The weights of the last update, from a solver's state at any depth.

  Args:
    state: the state of a solver with an aggregator.

  Returns:
    (objectives,), with leading axes if the state has them.

  Raises:
    ValueError: if no part of the state has weights.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> losses = lambda x, batch: jnp.stack([x @ x, batch @ x])
    >>> solver = optax.chain(
    ...   bj.multi_objective(losses, 2), bj.aggregators.mgda(2), optax.adam(0.1)
    ... )
    >>> print(bj.diagnostics.objective_weights(solver.init(jnp.zeros(2))))
    [0.5 0.5]
  """
  weights: list[Any] = []

  def look(node):
    if {'count', 'weights'} <= set(getattr(node, '_fields', ())):
      weights.append(node.weights)
      return
    is_here = lambda x: x is not node and isinstance(x, tuple)
    for part in jax.tree.leaves(node, is_leaf=is_here):
      if isinstance(part, tuple):
        look(part)

  look(state)
  if not weights:
    raise ValueError(
      'no aggregator in this state has weights: chain one after the oracle, '
      'for instance bj.aggregators.mgda(objectives).'
    )
  return weights[-1]


class MultiGradientBias(NamedTuple):
  """The mean error of an aggregated direction.

  Attributes:
    at_own_weights: norm of the mean direction minus the true gradients with the
      mean of the method's weights.
    from_min_norm: norm of the mean direction minus the shortest convex
      combination of the true gradients.
    direction: norm of the mean direction.
    noise: root mean square distance of the directions from their mean.
  """

  at_own_weights: chex.Array
  from_min_norm: chex.Array
  direction: chex.Array
  noise: chex.Array


def multi_gradient_bias(
  oracle: optax.GradientTransformation,
  aggregator: optax.GradientTransformation,
  state: Any,
  params: Any,
  batches: Any,
  truth: types.Jacobian,
  *,
  remember: bool = False,
) -> MultiGradientBias:
  r"""The bias of a multi-gradient direction at one point of a run.

  .. math::
    \Big\| \mathbb{E}_\xi [ d(\xi) ] -
      \nabla F^\top \mathbb{E}_\xi [ \lambda(\xi) ] \Big\|, \qquad
    \Big\| \mathbb{E}_\xi [ d(\xi) ] - \min_{w \in \Delta} \nabla F^\top w
      \Big\|

  Args:
    oracle: an oracle that gives a `Jacobian`.
    aggregator: an aggregator with weights.
    state: the aggregator's state at this point.
    params: the point.
    batches: fresh batches, stacked along a leading axis.
    truth: the Jacobian without noise.
    remember: whether the aggregator's state passes from batch to batch at the
      fixed point. Then the expectation includes the memory of the method.
      Otherwise it is over the next batch only, and the current noise of the
      memory counts as a bias.

  Returns:
    A `MultiGradientBias`, scalars in units of a gradient norm.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> losses = lambda x, noise: jnp.stack(
    ...   [(1 + noise[0]) * x[0], (1 + noise[1]) * x[1]]
    ... )
    >>> oracle, link = bj.multi_objective(losses, 2), bj.aggregators.mean(2)
    >>> params = jnp.zeros(2)
    >>> bias = bj.diagnostics.multi_gradient_bias(
    ...   oracle, link, link.init(params), params,
    ...   jnp.array([[1.0, 0.0], [-1.0, 0.0]]), bj.Jacobian(jnp.eye(2)),
    ... )
    >>> print(bias.at_own_weights, bias.noise)
    0.0 0.5
  """
  begin = oracle.init(params)

  def one(batch, memory):
    jacobian, _ = oracle.update(batch, begin, params)
    direction, after = aggregator.update(jacobian, memory, params)
    return direction, objective_weights(after), after

  def add(carry, batch):
    total, memory = carry
    direction, weights, after = one(batch, memory)
    square = optax.tree.norm(direction, squared=True)
    total = jax.tree.map(jnp.add, total, (direction, weights, square))
    return (total, after if remember else memory), None

  first = jax.tree.map(lambda leaf: leaf[0], batches)
  direction, weights, _ = jax.eval_shape(one, first, state)
  square = jax.ShapeDtypeStruct((), weights.dtype)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), (direction, weights, square)
  )
  (total, _), _ = jax.lax.scan(add, (zeros, state), batches)
  count = jax.tree.leaves(batches)[0].shape[0]
  direction, weights, square = jax.tree.map(lambda x: x / count, total)
  shortest = _quadratic.min_norm_weights(_rows.gramian(truth))

  def distance(chosen):
    ideal = _rows.combine(truth, chosen)
    return optax.tree.norm(optax.tree.sub(direction, ideal))

  norm = optax.tree.norm(direction)
  return MultiGradientBias(
    at_own_weights=distance(weights),
    from_min_norm=distance(shortest),
    direction=norm,
    noise=jnp.sqrt(jnp.maximum(square - norm**2, 0)),
  )
