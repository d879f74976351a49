"""Aggregators from functions that choose weights of the rows."""

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
    inner: further state of the aggregator, a PRNG key for instance.
  """

  count: chex.Array
  weights: chex.Array
  inner: Any


# Maps the parameters and a dtype to the initial inner state.
Start = Callable[[Any, Any], Any]


def no_state(params: Any, dtype: Any) -> Any:
  """The inner state of a stateless aggregator."""
  del params, dtype
  return ()


def init(
  name: str, objectives: int, start: Start = no_state
) -> Callable[[Any], WeightsState]:
  """The `init` of an aggregator, with equal initial weights.

  Args:
    name: the aggregator's name, for errors.
    objectives: the number of objectives.
    start: maps the parameters and a dtype to the initial inner state.
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


def aggregator(
  name: str,
  objectives: int,
  aggregate: Callable[[Any, WeightsState], tuple[Any, chex.Array, Any]],
  start: Start = no_state,
  *,
  samples: int = 1,
  rows: bool = False,
  losses: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Makes an aggregator from a function of the rows and the state.

  Args:
    name: the aggregator's name, for errors.
    objectives: the number of objectives.
    aggregate: maps a `Jacobian` without `rest`, or a `Gramian`, and the state
      to the gradient, the weights (objectives,) and the next inner state.
    start: as in `init`.
    samples: the number of Jacobians whose rows are stacked.
    rows: whether a `Gramian` is refused.
    losses: whether `values` must be measured; they get the dtype of the
      weights.
  """

  def update_fn(jacobian, state, params=None, **extra_args):
    del params, extra_args
    _rows.require(jacobian, name, objectives * samples, rows=rows)
    rest = getattr(jacobian, 'rest', None)
    if rest:
      jacobian = jacobian._replace(rest=None)
    if losses:
      if jacobian.values is None:
        raise ValueError(
          f'{name} needs the losses as well as their gradients: put '
          'bj.multi_objective(losses) before it, or set Jacobian(values=...).'
        )
      values = jacobian.values.astype(state.weights.dtype)
      jacobian = jacobian._replace(values=values)
    gradients, weights, inner = aggregate(jacobian, state)
    count = optax.safe_increment(state.count)
    return (
      _rows.with_rest(gradients, rest),
      WeightsState(count, weights, inner),
    )

  init_fn = init(name, objectives, start)
  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def by_weights(
  name: str,
  objectives: int,
  choose: Callable[[Any, WeightsState], tuple[chex.Array, Any]],
  start: Start = no_state,
  *,
  losses: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Makes an aggregator from a function that chooses weights of the rows.

  Args:
    name: the aggregator's name, for errors.
    objectives: the number of rows.
    choose: maps a `Jacobian` or a `Gramian` and a `WeightsState` to the weights
      (objectives,) and the next inner state. In the state, `count` is the
      number of updates so far, `weights` are those of the last update, and
      `inner` is the inner state.
    start: maps the parameters and the dtype of the weights to the initial inner
      state. Arrays of that dtype keep it for parameters of any dtype.
    losses: whether `choose` reads the losses, `values`: then missing losses are
      an error, and they have the dtype of the weights.

  Returns:
    A transformation from a `Jacobian` or a `Gramian` to one gradient. At the
    call it raises TypeError for anything else, and ValueError for another
    number of rows or missing losses.

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

  def aggregate(jacobian, state):
    weights, inner = choose(jacobian, state)
    weights = jnp.asarray(weights, state.weights.dtype)
    return _rows.combine(jacobian, weights), weights, inner

  return aggregator(name, objectives, aggregate, start, losses=losses)


def by_gramian(
  name: str,
  objectives: int,
  choose: Callable[[types.Gramian, WeightsState], tuple[chex.Array, Any]],
  start: Start = no_state,
  *,
  losses: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Makes an aggregator from weights that depend on lengths and cosines.

  Like `by_weights`, but lengths are right from 1e-30 to 1e30 in float32, where
  squares of the entries leave the range of floats. The result is NaN if lengths
  differ too much for weights.

  Args:
    name: the aggregator's name, for errors.
    objectives: the number of rows.
    choose: as in `by_weights`, from a `Gramian` whose `lengths` and `cosines`
      have the dtype of the weights.
    start: as in `by_weights`.
    losses: as in `by_weights`.

  Returns:
    As in `by_weights`.

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


# Maps the rows' factor to the direction in its basis and to the weights of the
# rows with that direction.
Choose = Callable[[_rows.Factor], tuple[chex.Array, chex.Array]]


def _apply(choose: Choose, factor: _rows.Factor) -> tuple[Any, chex.Array]:
  """The gradient and the weights chosen from a factor."""
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
  """The gradient and weights from the Gram matrix, or else from the rows.

  Args:
    accurate: whether those from the Gram matrix are accurate.
    fast: the gradient and weights from the Gram matrix.
    choose: computes both from the factor of the rows.
    jacobian: the rows, without `rest`, which the loop would copy.
    lengths: the norms of the rows.
  """
  constants = jax.lax.stop_gradient((jacobian, lengths))

  def factor_rows(carry):
    # The barrier stops the compiler from hoisting constants out of the loop.
    inputs, _ = jax.lax.optimization_barrier((constants, carry[0]))
    gradients, weights = _apply(choose, _rows.factor(*inputs))
    return True, (gradients, weights.astype(fast[1].dtype))

  # A loop of at most one iteration, as in `_rows.gramian`. It carries gradients
  # and no basis, which would be allocated even if the loop does not run.
  start = (accurate, fast)
  return _quadratic.loop(lambda c: ~c[0], factor_rows, start, constants)[1]


def by_gramian_or_factor(
  name: str,
  objectives: int,
  choose: Callable[[types.Gramian], chex.Array],
  choose_exactly: Choose,
) -> optax.GradientTransformationExtraArgs:
  """As `by_gramian`, but from the rows' factor if the rows nearly cancel.

  Then the cosines have too few digits for the direction.

  Args:
    name: the aggregator's name, for errors.
    objectives: the number of rows.
    choose: maps a Gramian to the weights.
    choose_exactly: maps the rows' factor to the direction and the weights.
  """

  def aggregate(jacobian, state):
    gramian = _cast(_rows.gramian(jacobian), state)
    weights = _rows.in_range(gramian, choose(gramian))
    result = (_rows.combine(jacobian, weights), weights)
    if isinstance(jacobian, types.Jacobian):
      accurate = _quadratic.separate(gramian.cosines)
      result = unless(
        accurate, result, choose_exactly, jacobian, gramian.lengths
      )
    return *result, state.inner

  return aggregator(name, objectives, aggregate)


def by_factor(
  name: str, objectives: int, choose: Choose
) -> optax.GradientTransformationExtraArgs:
  """As `by_gramian`, for directions that depend on small angles between rows.

  If the factor of the cosines is not accurate, the rows are factored instead;
  then the result has no derivative.

  Args:
    name: the aggregator's name, for errors.
    objectives: the number of rows.
    choose: maps the rows' factor to the direction in its basis and to the
      weights of the rows with that direction.
  """

  def aggregate(jacobian, state):
    gram = _rows.gramian(jacobian)
    factor, accurate = _rows.cosine_factor(gram)
    result = _apply(choose, factor)
    if isinstance(jacobian, types.Jacobian):
      constant = jax.lax.stop_gradient(result)
      slow = unless(accurate, constant, choose, jacobian, gram.lengths)
      result = jax.tree.map(
        lambda x, y: jnp.where(accurate, x, y), result, slow
      )
    gradients, weights = result
    return gradients, weights.astype(state.weights.dtype), state.inner

  return aggregator(name, objectives, aggregate)


def current(number: Any, state: Any) -> chex.Array:
  """The value of a constant or a schedule in an update.

  Args:
    number: a constant, or a function of the number of updates so far.
    state: a `WeightsState`, or another state with `count` and `weights`.

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
