"""Recursive momentum: a gradient also at the previous point, on one batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import types
from bilevel_jax.oracles import base


class StormState(NamedTuple):
  """State of `storm`.

  Attributes:
    count: updates so far, an int32 scalar.
    previous: the parameters of the update before.
    direction: the estimate, of the structure that `like` gives.
    inner: the state of the oracle.
  """

  count: chex.Array
  previous: Any
  direction: Any
  inner: Any


def storm(
  oracle: optax.GradientTransformation,
  decay: types.ScalarOrSchedule,
  *,
  like: Callable[[Any], Any] = lambda params: params,
) -> optax.GradientTransformationExtraArgs:
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
      dtypes of what the oracle gives; by default that of the parameters. A
      sequence for which the oracle gives None may be None here as well, and
      else takes memory without use.

  Returns:
    An oracle; `bj.counts` counts both evaluations, `bj.values` are those at the
    new point.

  Raises:
    ValueError: if a constant decay is outside [0, 1], or at the call, if the
      oracle gives another structure than `like`.

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
  if (
    not callable(decay)
    and not isinstance(decay, jax.core.Tracer)
    and not 0 <= np.asarray(decay) <= 1
  ):
    raise ValueError(f'the decay is in [0, 1], got {decay}.')
  evaluated = optax.with_extra_args_support(oracle)

  def init_fn(params):
    return StormState(
      count=jnp.zeros([], jnp.int32),
      # Copies: a buffer that params and state share could not be donated.
      previous=jax.tree.map(lambda x: jnp.array(x, copy=True), params),
      direction=jax.tree.map(jnp.zeros_like, like(params)),
      inner=evaluated.init(params),
    )

  def update_fn(batch, state, params=None, **extra_args):
    behind, other = evaluated.update(
      batch, state.inner, state.previous, **extra_args
    )
    ahead, inner = evaluated.update(batch, state.inner, params, **extra_args)
    inner = base.also_spent(inner, state.inner, other)
    rate = decay(state.count) if callable(decay) else decay
    keep = jnp.where(state.count == 0, 0, 1 - jnp.asarray(rate, jnp.float32))

    def correct(new, old, estimate):
      return (new + keep * (estimate - old)).astype(estimate.dtype)

    kept = map_given('storm', correct, ahead, behind, estimate=state.direction)
    direction = jax.tree.map(
      lambda new, estimate: None if new is None else estimate,
      ahead,
      kept,
      is_leaf=_is_none,
    )
    count = optax.safe_increment(state.count)
    previous = jax.tree.map(
      lambda new, old: new.astype(old.dtype), params, state.previous
    )
    return direction, StormState(count, previous, kept, inner)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_none(node: Any) -> bool:
  return node is None


def map_given(
  who: str,
  fn: Callable[..., chex.Array],
  given: Any,
  *others: Any,
  estimate: Any,
) -> Any:
  """Maps leaves of gradients and of an estimate; where given None, it stays.

  Args:
    who: the wrapper, for the error.
    fn: of leaves of `given`, `others` and `estimate`, in this order.
    given: gradients, None for a sequence that is left alone.
    *others: of the structure of `given`.
    estimate: of the same structure, with anything where `given` is None.

  Returns:
    The new estimate.

  Raises:
    ValueError: if the structures differ.
  """

  def one(leaf, *rest):
    *middle, held = rest
    return held if leaf is None else fn(leaf, *middle, held)

  try:
    return jax.tree.map(one, given, *others, estimate, is_leaf=_is_none)
  except (ValueError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{who}: the oracle gives {jax.tree.structure(given)}, the state holds '
      f'{jax.tree.structure(estimate)}: pass `like`, a function from the '
      "parameters to a pytree of the oracle's structure."
    ) from error
