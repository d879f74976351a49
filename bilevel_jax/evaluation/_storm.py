"""STORM: recursive momentum with a second gradient at the previous point."""

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
    started: whether there is a previous point.
    previous: the parameters of the previous evaluation.
    direction: the estimate, with the structure that `like` returns.
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
  r"""Corrects a running estimate by the same batch at the previous point.

  .. math::
    d_k = G(z_k; \xi_k) + (1 - a_k) \, [d_{k-1} - G(z_{k-1}; \xi_k)],
    \qquad d_0 = G(z_0; \xi_0)

  Both evaluations use the same batch and oracle state, PRNG keys included, so
  their difference is small after a small step: the error of the estimate falls
  along a run whose steps and :math:`a_k` fall. :math:`a = 1` gives the oracle
  itself, and :math:`a = 0` between updates with :math:`a = 1` gives SPIDER. The
  oracle may return a gradient, a Jacobian of several objectives, a
  hypergradient or the inner values of a composition.

  Args:
    oracle: the oracle to evaluate, at two points per update.
    decay: :math:`a_k` in [0, 1]; a constant, or a schedule from the number of
      updates so far.
    like: maps the parameters to a pytree with the structure, shapes and dtypes
      of the oracle's gradients. By default the parameters, with None for named
      sequences that the oracle does not move.
    accumulator_dtype: smallest dtype of the stored estimate; the result has the
      oracle's dtypes.

  Returns:
    An oracle; `bj.counts` counts both evaluations, `bj.values` has the losses
    at the new point.

  Raises:
    ValueError: if a constant decay is outside [0, 1]; at the call, if the
      oracle returns another structure or other shapes than `like`.

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
      # Copies, since shared buffers of params and state cannot be donated.
      previous=jax.tree.map(lambda x: jnp.array(x, copy=True), params),
      direction=_trees.accumulator_like(like(params), accumulator_dtype),
      inner=evaluated.init(params),
    )

  def update_fn(batch, state, params=None, **extra_args):
    before, other = evaluated.update(
      batch, state.inner, state.previous, **extra_args
    )
    here, inner = evaluated.update(batch, state.inner, params, **extra_args)
    inner = states.also_spent(inner, state.inner, other)
    rate = decay(state.count) if callable(decay) else decay
    keep = jnp.where(state.started, 1 - rate, 0)

    def correct(new, old, estimate):
      dtype = estimate.dtype
      change = estimate - old.astype(dtype)
      return new.astype(dtype) + keep.astype(dtype) * change

    estimate = matching('storm', here, state.direction)
    corrected = jax.tree.map(correct, here, before, estimate)
    return _trees.cast_like(corrected, here), StormState(
      optax.safe_increment(state.count),
      jnp.ones_like(state.started),
      _trees.cast_like(params, state.previous),
      replaced(here, corrected, state.direction),
      inner,
    )

  again = lambda one: storm(
    one, decay, like=like, accumulator_dtype=accumulator_dtype
  )
  return base.wrapped(evaluated, init_fn, update_fn, again=again, inside=True)


def like_moved(oracle: optax.GradientTransformation) -> Callable[[Any], Any]:
  """A function to the parameters that an oracle moves, None for the others."""
  moves = base.as_oracle(oracle).moves

  def like(params):
    if moves is None or not _sequences.is_sequences(params):
      return params
    _sequences.require_sequences(params, moves, 'an oracle')
    return _sequences.only(params, **{n: getattr(params, n) for n in moves})

  return like


def _is_none(node: Any) -> bool:
  return node is None


def matching(caller: str, gradients: Any, stored: Any) -> Any:
  """The stored tree, with None where the gradients are None.

  Args:
    caller: the wrapper's name, for the error.
    gradients: an oracle's, with None for a sequence that it leaves alone.
    stored: of the same structure, with anything where `gradients` are None.

  Returns:
    The stored tree in the structure of the gradients.

  Raises:
    ValueError: if structures or shapes differ.
  """
  try:
    matched = only_moved(gradients, stored)
  except (ValueError, TypeError):  # Only different structures raise these.
    matched = stored
  structures: Any = [jax.tree.structure(tree) for tree in (gradients, matched)]
  shapes = [
    [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    for tree in (gradients, matched)
  ]
  if structures[0] != structures[1] or shapes[0] != shapes[1]:
    raise ValueError(
      f'{caller}: the oracle returns {structures[0]} of the shapes {shapes[0]},'
      f' but the state has {structures[1]} of {shapes[1]}: pass `like`, a '
      "function from the parameters to a pytree of the oracle's structure."
    )
  return matched


def only_moved(gradients: Any, stored: Any) -> Any:
  """The stored tree, with None where the gradients are None; no checks."""
  pick = lambda gradient, old: None if gradient is None else old
  return jax.tree.map(pick, gradients, stored, is_leaf=_is_none)


def replaced(gradients: Any, new: Any, stored: Any) -> Any:
  """The stored tree, with new values where the gradients are not None."""
  pick = lambda gradient, new, old: old if gradient is None else new
  return jax.tree.map(pick, gradients, new, stored, is_leaf=_is_none)
