"""Recursive momentum: a gradient also at the previous point, on one batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _sequences, _trees, states, types
from bilevel_jax.oracles import base


@states.counts_updates
class StormState(NamedTuple):
  """State of `storm`.

  Attributes:
    count: updates of the solver so far, an int32 scalar, for the schedule.
    started: whether there is a point before.
    previous: the parameters of the evaluation before.
    direction: the estimate, of the structure that `like` gives.
    inner: the state of the oracle.
  """

  count: chex.Array
  started: chex.Array
  previous: Any
  direction: Any
  inner: Any


def storm(
  oracle: optax.GradientTransformation,
  decay: types.ScalarOrSchedule,
  *,
  like: Callable[[Any], Any] | None = None,
  accumulator_dtype: Any = jnp.float32,
) -> base.Oracle:
  r"""Corrects a running estimate by the same batch at the point before.

  .. math::
    d_k = G(z_k; \xi_k) + (1 - a_k) \, [d_{k-1} - G(z_{k-1}; \xi_k)],
    \qquad d_0 = G(z_0; \xi_0)

  Both evaluations see one batch and one oracle state, keys included, so that
  their difference is small where the step was: the error of the estimate falls
  along a run whose steps and :math:`a_k` do. For :math:`a = 1` it is the
  oracle itself, for :math:`a = 0` between updates with :math:`a = 1` it is
  SPIDER. The oracle may be anything that depends on the parameters: a gradient,
  rows of several objectives, a hypergradient, the inner values of a
  composition.

  Args:
    oracle: what to evaluate, at two points an update.
    decay: :math:`a_k` in [0, 1]; a constant, or a schedule from the number of
      updates so far.
    like: makes, from the parameters, a pytree of the structure, shapes and
      dtypes of what the oracle gives. By default that of the parameters, with
      None for named sequences that the oracle does not move.
    accumulator_dtype: what the estimate is kept in, at least; the result has
      the oracle's dtypes.

  Returns:
    An oracle; `bj.counts` counts both evaluations, `bj.values` are those at the
    new point.

  Raises:
    ValueError: if a constant decay is outside [0, 1], or at the call, if the
      oracle gives another structure or other shapes than `like`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> loss = lambda params, batch: batch * params**2 / 2
    >>> oracle = bj.evaluation.storm(bj.gradient(loss), 0.5)
    >>> state = oracle.init(jnp.float32(1.0))
    >>> first, state = oracle.update(2.0, state, jnp.float32(1.0))
    >>> second, state = oracle.update(4.0, state, jnp.float32(0.5))
    >>> print(first, second, bj.counts(state))
    2.0 1.0 {'gradients/loss': 4}

  References:
    Cutkosky and Orabona, `Momentum-Based Variance Reduction in Non-Convex SGD
    <https://arxiv.org/abs/1905.10018>`_, 2019.
  """
  _checks.within('storm', 'the decay', decay, 0, 1)
  evaluated = base.as_oracle(oracle)
  like = like or like_moved(oracle)

  def init_fn(params):
    return StormState(
      count=_trees.zeros([], jnp.int32),
      started=_trees.zeros([], bool),
      # Copies: a buffer that params and state share could not be donated.
      previous=jax.tree.map(lambda x: jnp.array(x, copy=True), params),
      direction=_trees.accumulator_like(like(params), accumulator_dtype),
      inner=evaluated.init(params),
    )

  def update_fn(batch, state, params=None, **extra_args):
    behind, other = evaluated.update(
      batch, state.inner, state.previous, **extra_args
    )
    ahead, inner = evaluated.update(batch, state.inner, params, **extra_args)
    inner = states.also_spent(inner, state.inner, other)
    rate = decay(state.count) if callable(decay) else decay
    keep = jnp.where(state.started, 1 - rate, 0)

    def correct(new, old, estimate):
      dtype = estimate.dtype
      change = estimate - old.astype(dtype)
      return new.astype(dtype) + keep.astype(dtype) * change

    held = where_given('storm', ahead, state.direction)
    found = jax.tree.map(correct, ahead, behind, held)
    return _trees.cast_like(found, ahead), StormState(
      optax.safe_increment(state.count),
      jnp.ones_like(state.started),
      _trees.cast_like(params, state.previous),
      with_given(ahead, found, state.direction),
      inner,
    )

  again = lambda one: storm(
    one, decay, like=like, accumulator_dtype=accumulator_dtype
  )
  return base.wrapped(evaluated, init_fn, update_fn, again=again, inside=True)


def like_moved(oracle: optax.GradientTransformation) -> Callable[[Any], Any]:
  """From parameters to those that an oracle moves; None for the others."""
  moves = base.as_oracle(oracle).moves

  def like(params):
    if moves is None or not _sequences.is_sequences(params):
      return params
    _sequences.require_sequences(params, moves, 'an oracle')
    return _sequences.only(params, **{n: getattr(params, n) for n in moves})

  return like


def _is_none(node: Any) -> bool:
  return node is None


def where_given(who: str, given: Any, estimate: Any) -> Any:
  """What is held for the gradients given; None where they are None.

  Args:
    who: the wrapper, for the error.
    given: gradients, None for a sequence that is left alone.
    estimate: of the same structure, with anything where `given` is None.

  Returns:
    The estimate in the structure of `given`.

  Raises:
    ValueError: if structures or shapes differ.
  """
  try:
    held = only_given(given, estimate)
  except (ValueError, TypeError):  # The structures: nothing else can raise.
    held = estimate
  ours: Any = jax.tree.structure(given)
  theirs: Any = jax.tree.structure(held)
  shapes = lambda tree: [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
  if ours != theirs or shapes(given) != shapes(held):
    raise ValueError(
      f'{who}: the oracle gives {ours} of the shapes {shapes(given)}, but the '
      f'state holds {theirs} of {shapes(held)}: pass `like`, a function from '
      "the parameters to a pytree of the oracle's structure."
    )
  return held


def only_given(given: Any, held: Any) -> Any:
  """What is held, with None where the gradients given are None."""
  pick = lambda one, held: None if one is None else held
  return jax.tree.map(pick, given, held, is_leaf=_is_none)


def with_given(given: Any, found: Any, estimate: Any) -> Any:
  """The estimate with what was found, where gradients are given."""
  pick = lambda one, new, old: old if one is None else new
  return jax.tree.map(pick, given, found, estimate, is_leaf=_is_none)
