"""Half spaces and budgets: joint sets of several sequences."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import _trees
from bilevel_jax.projections import _affine, _set_handlers


def _spread(weight: Any, sequence: Any) -> Any:
  """Broadcasts weights to a sequence; a number is the weight of all entries."""
  if jax.tree_util.all_leaves([weight]) and jnp.ndim(weight) == 0:
    number = weight
    weight = jax.tree.map(lambda leaf: number, sequence)
  return jax.tree.map(
    lambda a, z: jnp.broadcast_to(jnp.asarray(a, z.dtype), z.shape),
    weight,
    sequence,
  )


def _joint(
  name: str, weights: Any, bound: Any, project: Callable[[Any, Any], Any]
) -> _set_handlers.Joint:
  """A `Joint` from a projection of (sequences, weights)."""
  if not isinstance(weights, Mapping) or not weights:
    raise TypeError(
      f'{name} takes weights by name of the sequence, '
      "{'lower': 1.0, 'upper': -1.0} for instance, got "
      f'{type(weights).__name__}.'
    )
  concrete = filter(_affine.is_concrete, jax.tree.leaves((weights, bound)))
  if any(np.any(np.isnan(np.asarray(x, np.float64))) for x in concrete):
    raise ValueError(
      f'{name}: the weights and the bound must not be NaN, got {weights} and '
      f'{bound}.'
    )

  values = tuple(weights.values())

  def projection(sequences):
    spread = tuple(map(_spread, values, sequences))
    return project(tuple(sequences), spread)

  return _set_handlers.Joint(projection, tuple(weights)[1:])


def half_space(weights: Mapping[str, Any], bound: float) -> _set_handlers.Joint:
  r"""The half space of sequences whose weighted sum is bounded.

  .. math::
    \Big\{ (z, z', \dots) : \langle a, z \rangle + \langle a', z' \rangle +
      \dots \le b \Big\}

  Args:
    weights: :math:`a` by name of the sequence, a number for all of its entries
      or a pytree of its structure. The set belongs to the first sequence.
    bound: :math:`b`.

  Returns:
    A set for the record of the first sequence; the whole space if all weights
    are zero.

  Raises:
    TypeError: if the weights are not a mapping, or empty.
    ValueError: if a weight or the bound is NaN.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> joint = bj.projections.half_space({'lower': 1.0, 'upper': -1.0}, 0.0)
    >>> lower, upper = joint.projection((jnp.array([3.0]), jnp.array([1.0])))
    >>> print(lower, upper, joint.others)  # y <= x
    [2.] [2.] ('upper',)
  """

  def project(point, weight):
    excess = jnp.maximum(_trees.dot(weight, point) - bound, 0)
    step = _trees.ratio(excess, _trees.dot(weight, weight))
    return _trees.add_scaled(point, -step, weight)

  return _joint('half_space', weights, bound, project)


def budget(
  weights: Mapping[str, Any],
  total: float,
  *,
  lower: float = 0.0,
  upper: float = math.inf,
) -> _set_handlers.Joint:
  r"""The box of several sequences whose weighted sum is bounded.

  .. math::
    \Big\{ (z, z', \dots) : l \le z \le u, \; l \le z' \le u, \; \dots, \;
      \langle a, z \rangle + \langle a', z' \rangle + \dots \le b \Big\},
    \qquad a \ge 0

  The nearest point is :math:`[z - \mu a]_l^u` for the smallest
  :math:`\mu \ge 0` within the budget. Bisection finds which entries are at a
  bound; the other entries determine :math:`\mu`.

  Args:
    weights: :math:`a` by name of the sequence, a number for all of its entries
      or a pytree of its structure. The set belongs to the first sequence.
    total: the budget :math:`b`.
    lower: :math:`l`, the lower bound of all entries.
    upper: :math:`u`, the upper bound of all entries.

  Returns:
    A set for the record of the first sequence. If the lowest corner of the box
    exceeds the budget, the projection is NaN.

  Raises:
    TypeError: if the weights are not a mapping, or empty.
    ValueError: if a weight is negative or NaN, the total is NaN, the lower
      bound is not finite, or the bounds cross.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> joint = bj.projections.budget({'lower': 1.0, 'upper': 2.0}, 4.0)
    >>> lower, upper = joint.projection((jnp.array([3.0]), jnp.array([3.0])))
    >>> print(lower.round(2), upper.round(2))  # 9 - 5 mu = 4
    [2.] [1.]
  """
  concrete = filter(_affine.is_concrete, jax.tree.leaves(weights))
  if any(np.any(np.asarray(leaf) < 0) for leaf in concrete):
    raise ValueError(f'budget: weights are numbers >= 0, got {weights}.')
  if not (math.isfinite(lower) and lower <= upper):
    raise ValueError(
      'budget: the box needs a finite lower bound and an upper bound above it, '
      f'got [{lower}, {upper}].'
    )

  def project(point, weight):
    dtype = _trees.widest_dtype(point)
    at = lambda mu: jax.tree.map(
      lambda z, a: jnp.clip(z - mu.astype(z.dtype) * a, lower, upper),
      point,
      weight,
    )
    spent = lambda mu: _trees.dot(weight, at(mu))
    zero = jnp.abs(0 * _trees.dot(weight, point))
    # Above this mu, every entry with a weight is at its lower bound.
    reach = lambda z, a: jnp.max(_trees.ratio(z - lower, a), initial=0)
    reaches = jax.tree.leaves(jax.tree.map(reach, point, weight))
    highest = zero + jnp.max(jnp.stack([x.astype(dtype) for x in reaches]))

    # Bisects the bit patterns of floats, not their distance, to find mu to its
    # last digit for weights of any size.
    bits = jnp.finfo(dtype).bits
    count = lambda mu: jax.lax.bitcast_convert_type(mu, f'int{bits}')
    number = lambda mu: jax.lax.bitcast_convert_type(mu, dtype)

    def halve(_, ends):
      low, high = ends
      middle = low + (high - low) // 2
      fits = spent(number(middle)) <= total
      return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    ends = (count(zero), count(jnp.abs(highest)))
    low, high = map(number, jax.lax.fori_loop(0, bits, halve, ends))
    middle = low
    free = jax.tree.map(
      lambda z, a: jnp.where(
        (z - middle.astype(z.dtype) * a > lower)
        & (z - middle.astype(z.dtype) * a < upper),
        a,
        0,
      ),
      point,
      weight,
    )
    square = _trees.dot(free, free)
    # The sum is linear in mu until another entry reaches a bound.
    exact = middle + _trees.ratio(spent(middle) - total, square)
    mu = jnp.where(square > 0, jnp.clip(exact, low, high), high)
    mu = jnp.where(spent(zero) <= total, zero, mu)
    ones = jax.tree.map(jnp.ones_like, point)
    corner = lower * _trees.dot(weight, ones)
    tolerance = 8 * jnp.finfo(dtype).eps * jnp.abs(corner)
    return at(jnp.where(corner <= total + tolerance, mu, jnp.nan))

  return _joint('budget', weights, total, project)
