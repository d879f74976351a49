"""SPIDER for any oracle: recursive differences between fresh estimates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _trees, states
from bilevel_jax.evaluation import _storm
from bilevel_jax.oracles import base


class RecursiveState(NamedTuple):
  """State of `recursive`.

  Attributes:
    age: evaluations since the last fresh estimate, an int32 scalar; 0 if the
      next one is fresh.
    previous: the parameters of the previous evaluation.
    direction: the estimate, with the structure that `like` returns.
    inner: the state of the oracle.
  """

  age: chex.Array
  previous: Any
  direction: Any
  inner: Any


def recursive(
  oracle: optax.GradientTransformation,
  period: int,
  *,
  small_batch: Callable[[Any], Any] = lambda batch: batch,
  large_batch: Callable[[Any], Any] = lambda batch: batch,
  like: Callable[[Any], Any] | None = None,
  accumulator_dtype: Any = jnp.float32,
) -> base.Oracle:
  r"""Updates an estimate by differences and renews it once per period.

  .. math::
    d_k = \begin{cases}
      G(z_k; \Xi_k) & \text{if the period divides } k \\
      d_{k-1} + G(z_k; \xi_k) - G(z_{k-1}; \xi_k) & \text{otherwise}
    \end{cases}

  A difference uses the same small batch :math:`\xi` and oracle state at both
  points, so its noise is small where the step is small. A fresh estimate uses a
  large batch :math:`\Xi`; if that is the whole finite data set, the noise
  vanishes along a run with constant steps. Under `jax.vmap` with different
  ages, each evaluation costs as much as a fresh estimate plus a difference.

  Args:
    oracle: the oracle to evaluate, at one point or at two.
    period: evaluations from one fresh estimate to the next, at least 1.
    small_batch: maps the batch to that of a difference; by default the same.
    large_batch: maps the batch to that of a fresh estimate; by default the
      same.
    like: maps the parameters to a pytree with the structure, shapes and dtypes
      of the oracle's gradients. By default the parameters, with None for named
      sequences that the oracle does not move.
    accumulator_dtype: smallest dtype of the stored estimate; the result has the
      oracle's dtypes.

  Returns:
    An oracle; `bj.counts` counts each evaluation, `bj.values` has the losses at
    the new point.

  Raises:
    ValueError: if the period is below 1; at the call, if the oracle returns
      another structure or other shapes than `like`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> loss = lambda params, batch: batch * params**2 / 2
    >>> oracle = bj.evaluation.recursive(bj.gradient(loss), 2)
    >>> state = oracle.init(jnp.float32(1.0))
    >>> first, state = oracle.update(2.0, state, jnp.float32(1.0))
    >>> second, state = oracle.update(4.0, state, jnp.float32(0.5))
    >>> print(first, second, bj.counts(state))  # 2 + (2 - 4)
    2.0 0.0 {'gradients/loss': 3}

  References:
    Fang, Li, Lin and Zhang, `SPIDER: Near-Optimal Non-Convex Optimization via
    Stochastic Path Integrated Differential Estimator
    <https://arxiv.org/abs/1807.01695>`_, 2018.
  """
  _checks.whole_number('recursive', 'evaluations in a period', period)
  evaluated = optax.with_extra_args_support(oracle)
  like = like or _storm.like_moved(oracle)

  def init_fn(params):
    return RecursiveState(
      age=_trees.zeros([], jnp.int32),
      # Copies, since shared buffers of params and state cannot be donated.
      previous=jax.tree.map(lambda x: jnp.array(x, copy=True), params),
      direction=_trees.accumulator_like(like(params), accumulator_dtype),
      inner=evaluated.init(params),
    )

  def update_fn(batch, state, params=None, **extra_args):
    evaluate = lambda batch, z: evaluated.update(
      batch, state.inner, z, **extra_args
    )
    estimate = lambda gradients: _storm.matching(
      'recursive', gradients, state.direction
    )

    def fresh():
      here, inner = evaluate(large_batch(batch), params)
      return here, _trees.cast_like(here, estimate(here)), inner

    def difference():
      small = small_batch(batch)
      here, inner = evaluate(small, params)
      before, other = evaluate(small, state.previous)
      corrected = jax.tree.map(
        lambda d, a, b: d + (a.astype(d.dtype) - b.astype(d.dtype)),
        estimate(here),
        here,
        before,
      )
      return here, corrected, states.also_spent(inner, state.inner, other)

    here, direction, inner = jax.lax.cond(state.age == 0, fresh, difference)
    return _trees.cast_like(direction, here), RecursiveState(
      (state.age + 1) % period,
      _trees.cast_like(params, state.previous),
      _storm.replaced(here, direction, state.direction),
      inner,
    )

  again = lambda one: recursive(
    one,
    period,
    small_batch=small_batch,
    large_batch=large_batch,
    like=like,
    accumulator_dtype=accumulator_dtype,
  )
  return base.wrapped(oracle, init_fn, update_fn, again=again, inside=True)
