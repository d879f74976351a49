"""What aggregators by weights share; equal and fixed weights."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import _sequences, _trees
from bilevel_jax.aggregators import _rows


@_sequences.counts_updates
class WeightsState(NamedTuple):
  """State of an aggregator that weighs objectives.

  Attributes:
    count: updates so far, an int32 scalar.
    weights: the weights of the last update, (objectives,).
    inner: what else the aggregator remembers, for instance a key.
  """

  count: chex.Array
  weights: chex.Array
  inner: Any


class Seen(NamedTuple):
  """What an aggregator sees when it chooses weights.

  Attributes:
    gramian: gives the Gram matrix (objectives, objectives); a function, so that
      nothing is computed for who does not ask.
    values: the losses (objectives,), or None.
    state: the state before.
  """

  gramian: Callable[[], chex.Array]
  values: chex.Array | None
  state: WeightsState


def require_objectives(objectives: Any, who: str) -> None:
  """Raises unless a number of objectives is a whole number from 1."""
  if isinstance(objectives, bool) or not isinstance(objectives, int):
    raise TypeError(
      f'{who} takes the number of objectives first, got {objectives!r}.'
    )
  if objectives < 1:
    raise ValueError(f'{who} takes at least one objective, got {objectives}.')


def require_positive(who: str, *, zero: bool = False, **numbers: Any) -> None:
  """Raises if a constant is not above zero; schedules and tracers pass."""
  for name, number in numbers.items():
    if callable(number) or isinstance(number, jax.core.Tracer):
      continue
    number = np.asarray(number)
    if not np.all(number >= 0 if zero else number > 0):
      bound = '>= 0' if zero else '> 0'
      raise ValueError(f'{who}: {name} is a number {bound}, got {number}.')


def at(number: Any, count: chex.Array, dtype: Any) -> chex.Array:
  """A constant or a schedule as a scalar of a dtype."""
  return jnp.asarray(number(count) if callable(number) else number, dtype)


def require_values(values: Any, who: str) -> chex.Array:
  """Raises if the losses were not measured; else they are given back."""
  if values is None:
    raise ValueError(
      f'{who} needs the losses beside their gradients: put '
      'bj.multi_objective(losses) before it, or set Jacobian(values=...).'
    )
  return values


def by_weights(
  who: str,
  objectives: int,
  choose: Callable[[Seen], tuple[chex.Array, Any]],
  start: Callable[[Any], Any] = lambda dtype: (),
) -> optax.GradientTransformationExtraArgs:
  """Makes an aggregator from a function that chooses weights.

  Args:
    who: its name, for errors.
    objectives: the number of rows.
    choose: from what is seen to the weights and what to remember.
    start: makes what is remembered first, from a dtype.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.
  """
  require_objectives(objectives, who)

  def init_fn(params):
    dtype = _trees.dtype_of(params)
    return WeightsState(
      count=jnp.zeros([], jnp.int32),
      weights=jnp.full([objectives], 1 / objectives, dtype),
      inner=start(dtype),
    )

  def update_fn(jacobian, state, params=None, **extra_args):
    del params, extra_args
    _rows.require_rows(jacobian, who, objectives)
    dtype = state.weights.dtype
    values = jacobian.values
    seen = Seen(
      gramian=lambda: _rows.gramian(jacobian).astype(dtype),
      values=None if values is None else values.astype(dtype),
      state=state,
    )
    weights, inner = choose(seen)
    weights = jnp.asarray(weights, dtype)
    gradients = _rows.combine(jacobian, weights)
    count = optax.safe_increment(state.count)
    return gradients, WeightsState(count, weights, inner)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mean(objectives: int) -> optax.GradientTransformationExtraArgs:
  r"""Weighs all objectives equally: the control of every comparison.

  .. math::
    d = \frac{1}{M} \sum_{m=1}^{M} \nabla f_m

  Args:
    objectives: the number of rows :math:`M`.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
    ValueError: if they have another number of rows.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> link = bj.aggregators.mean(2)
    >>> params = jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[1.0, 0.0], [0.0, 3.0]]))
    >>> print(link.update(jacobian, link.init(params), params)[0])
    [0.5 1.5]
  """
  return by_weights(
    'mean', objectives, lambda seen: (jnp.full(objectives, 1 / objectives), ())
  )


def weighted(
  weights: Sequence[float] | chex.Array,
) -> optax.GradientTransformationExtraArgs:
  r"""Weighs objectives by given numbers: linear scalarisation.

  .. math::
    d = \sum_{m=1}^{M} w_m \nabla f_m

  Args:
    weights: :math:`w`, (objectives,).

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient.

  Raises:
    TypeError: if the incoming gradients are no Jacobian.
    ValueError: if the weights are no vector, or of another length than the
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
  given = jnp.asarray(weights)
  return by_weights('weighted', given.shape[0], lambda seen: (given, ()))
