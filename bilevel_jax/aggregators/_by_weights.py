"""What aggregators by weights share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _trees, states, types
from bilevel_jax.aggregators import _quadratic, _rows


@states.counts_updates
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


# From the parameters and a dtype to what is remembered first.
Start = Callable[[Any, Any], Any]


def nothing(params: Any, dtype: Any) -> Any:
  """Of an aggregator that remembers nothing."""
  del params, dtype
  return ()


def init(
  name: str, objectives: int, start: Start = nothing
) -> Callable[[Any], WeightsState]:
  """The first state of an aggregator: equal weights.

  Args:
    name: of the aggregator, for errors.
    objectives: the number of objectives.
    start: makes what it remembers first, from the parameters and a dtype.
  """
  _checks.whole_number(name, 'objectives', objectives)

  def init_fn(params):
    dtype = _trees.widest_dtype(params)
    return WeightsState(
      count=_trees.zeros([], jnp.int32),
      weights=jnp.full([objectives], 1 / objectives, dtype),
      inner=start(params, dtype),
    )

  return init_fn


def step(state: WeightsState, weights: Any, inner: Any) -> WeightsState:
  """The state after an update."""
  return WeightsState(optax.safe_increment(state.count), weights, inner)


def by_weights(
  name: str,
  objectives: int,
  choose: Callable[[Any, WeightsState], tuple[chex.Array, Any]],
  start: Start = nothing,
  *,
  losses: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Makes an aggregator from a function that chooses weights of the rows.

  Args:
    name: of the aggregator, for errors.
    objectives: the number of rows.
    choose: from a `Jacobian` or a `Gramian` and a `WeightsState` to the weights
      (objectives,) and what to remember. In the state, `count` is the number of
      updates so far, `weights` are those of the last update, and `inner` is
      what was remembered.
    start: makes what is remembered first, from the parameters and the dtype of
      the weights: an array of it keeps its dtype whatever the parameters' is.
    losses: whether `choose` reads `values`, the losses: then they are there, in
      the dtype of the weights.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient. At the
    call it raises TypeError for anything else, ValueError for another number of
    rows or missing losses.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> def largest(objectives):
    ...   choose = lambda jacobian, state: (
    ...     jax.nn.one_hot(jnp.argmax(jacobian.values), objectives), ()
    ...   )
    ...   return bj.aggregators.by_weights(
    ...     'largest', objectives, choose, losses=True
    ...   )
    >>> link, params = largest(2), jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.eye(2), values=jnp.array([1.0, 3.0]))
    >>> print(link.update(jacobian, link.init(params), params)[0])
    [0. 1.]
  """

  def update_fn(jacobian, state, params=None, **extra_args):
    del params, extra_args
    _rows.require(jacobian, name, objectives)
    measured, dtype = jacobian, state.weights.dtype
    if losses:
      measured = jacobian._replace(values=values(jacobian, name, dtype))
    weights, inner = choose(measured, state)
    weights = jnp.asarray(weights, dtype)
    gradients = _rows.combine(jacobian, weights)
    return gradients, step(state, weights, inner)

  init_fn = init(name, objectives, start)
  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def by_gramian(
  name: str,
  objectives: int,
  choose: Callable[[types.Gramian, WeightsState], tuple[chex.Array, Any]],
  start: Start = nothing,
  *,
  losses: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """As `by_weights`, for weights that depend on the rows' lengths and cosines.

  Lengths are right from 1e-30 to 1e30 in float32, where squares of the entries
  are not. Where they are too far apart for weights, the result is NaN.

  Args:
    name: of the aggregator, for errors.
    objectives: the number of rows.
    choose: as in `by_weights`, from a `Gramian`, whose `lengths` and `cosines`
      have the dtype of the weights.
    start: as in `by_weights`.
    losses: as in `by_weights`.

  Returns:
    As `by_weights`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> def unit_lengths(objectives):
    ...   choose = lambda gramian, state: (1 / gramian.lengths, ())
    ...   return bj.aggregators.by_gramian('unit_lengths', objectives, choose)
    >>> link, params = unit_lengths(2), jnp.zeros(2)
    >>> jacobian = bj.Jacobian(jnp.array([[3.0, 0.0], [0.0, 0.1]]))
    >>> print(link.update(jacobian, link.init(params), params)[0])
    [1. 1.]
  """

  def from_gramian(jacobian, state):
    gramian = _cast(_rows.gramian(jacobian), state)
    weights, inner = choose(gramian, state)
    return _rows.in_range(gramian, weights), inner

  return by_weights(name, objectives, from_gramian, start, losses=losses)


def _cast(gram: types.Gramian, state: WeightsState) -> types.Gramian:
  """Lengths and cosines in the dtype of the weights."""
  dtype = state.weights.dtype
  return gram._replace(
    lengths=gram.lengths.astype(dtype), cosines=gram.cosines.astype(dtype)
  )


# From the rows' factor to the direction in its basis and to weights of the rows
# that give it.
Choose = Callable[[_rows.Factor], tuple[chex.Array, chex.Array]]


def _aggregate(choose: Choose, factor: _rows.Factor) -> tuple[Any, chex.Array]:
  """The gradient and the weights that are chosen."""
  coordinates, weights = (
    _rows.in_range(factor, numbers) for numbers in choose(factor)
  )
  return factor.combine(coordinates, weights), weights


def unless(
  accurate: chex.Array,
  fast: tuple[Any, chex.Array],
  choose: Choose,
  jacobian: types.Jacobian,
  lengths: chex.Array,
) -> tuple[Any, chex.Array]:
  """The gradient and weights from the Gram matrix, or from the rows themselves.

  Args:
    accurate: whether the first ones are.
    fast: the gradient and weights from the Gram matrix.
    choose: from the factor of the rows, where they are not.
    jacobian: the rows, without what no weight may touch: it would be copied.
    lengths: their norms.
  """
  constants = jax.lax.stop_gradient((jacobian, lengths))

  def factor_rows(carry):
    # Tied to the carry: the compiler moves what is constant before the loop.
    inputs, _ = jax.lax.optimization_barrier((constants, carry[0]))
    gradients, weights = _aggregate(choose, _rows.factor(*inputs))
    return True, (gradients, weights.astype(fast[1].dtype))

  # A loop of at most one round, as in `_rows.gramian`. It carries gradients
  # and no basis: a basis would be filled even where the loop does not run.
  start = (accurate, fast)
  return _quadratic.loop(lambda c: ~c[0], factor_rows, start, constants)[1]


def by_gramian_or_factor(
  who: str,
  objectives: int,
  choose: Callable[[types.Gramian], chex.Array],
  choose_exactly: Choose,
) -> optax.GradientTransformationExtraArgs:
  """As `by_gramian`, and from the rows' factor where they nearly cancel.

  That is where the cosines keep too few digits of the direction.

  Args:
    who: its name, for errors.
    objectives: the number of rows.
    choose: from a Gramian to the weights.
    choose_exactly: the same from the factor.
  """

  def update_fn(jacobian, state, params=None, **extra_args):
    del params, extra_args
    _rows.require(jacobian, who, objectives)
    gramian = _cast(_rows.gramian(jacobian), state)
    weights = _rows.in_range(gramian, choose(gramian))
    if isinstance(jacobian, types.Gramian):
      gradients = _rows.combine(jacobian, weights)
    else:
      rows = jacobian._replace(rest=None)
      fast = (_rows.weigh(rows, weights), weights)
      accurate = _quadratic.separate(gramian.cosines)
      gradients, weights = unless(
        accurate, fast, choose_exactly, rows, gramian.lengths
      )
      gradients = _rows.with_rest(gradients, jacobian.rest)
    return gradients, step(state, weights, state.inner)

  return optax.GradientTransformationExtraArgs(init(who, objectives), update_fn)


def by_factor(
  name: str, objectives: int, choose: Choose
) -> optax.GradientTransformationExtraArgs:
  """As `by_gramian`, for directions that depend on small angles between rows.

  Where the factor of the cosines is not accurate, the rows themselves are
  factored. There the result has no derivative.

  Args:
    name: of the aggregator, for errors.
    objectives: the number of rows.
    choose: from the rows' factor to the direction in its basis and to weights
      of the rows that give it.
  """

  def from_rows(jacobian):
    gram = _rows.gramian(jacobian)
    factor, accurate = _rows.cosine_factor(gram)
    fast = _aggregate(choose, factor)
    constant = jax.lax.stop_gradient(fast)
    slow = unless(accurate, constant, choose, jacobian, gram.lengths)
    return jax.tree.map(lambda x, y: jnp.where(accurate, x, y), fast, slow)

  def update_fn(jacobian, state, params=None, **extra_args):
    del params, extra_args
    _rows.require(jacobian, name, objectives)
    if isinstance(jacobian, types.Gramian):
      factor, _ = _rows.cosine_factor(jacobian)
      gradients, weights = _aggregate(choose, factor)
    else:
      # The loop would copy gradients that no weight may touch.
      gradients, weights = from_rows(jacobian._replace(rest=None))
      gradients = _rows.with_rest(gradients, jacobian.rest)
    weights = weights.astype(state.weights.dtype)
    return gradients, step(state, weights, state.inner)

  return optax.GradientTransformationExtraArgs(
    init(name, objectives), update_fn
  )


def current(number: Any, state: Any) -> chex.Array:
  """The value of a constant or a schedule in an update.

  Args:
    number: a constant, or a function of the number of updates so far.
    state: a `WeightsState`, or another with `count` and `weights`.

  Returns:
    A scalar of the dtype of the weights.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> state = bj.aggregators.mean(2).init(jnp.zeros(3))
    >>> print(bj.aggregators.current(lambda count: 0.5 / (count + 1), state))
    0.5
  """
  value = number(state.count) if callable(number) else number
  return jnp.asarray(value, state.weights.dtype)


def values(jacobian: Any, who: str, dtype: Any) -> chex.Array:
  """The losses in a dtype, or an error if they were not measured."""
  if jacobian.values is None:
    raise ValueError(
      f'{who} needs the losses beside their gradients: put '
      'bj.multi_objective(losses) before it, or set Jacobian(values=...).'
    )
  return jacobian.values.astype(dtype)
