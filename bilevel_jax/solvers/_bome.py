"""BOME: descends the upper loss behind a barrier on the value gap."""

from collections.abc import Callable
from typing import Any

import optax

from bilevel_jax import aggregators, combinators, oracles, types
from bilevel_jax.solvers import _pbgd


def bome(
  problem: types.BilevelProblem,
  *,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  value: optax.GradientTransformation | None = None,
  inner_steps: int,
  eta: types.ScalarOrSchedule = 0.5,
  inner_batch: Callable[[Any, Any], Any] | None = None,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
  r"""BOME: no penalty weight; the value gap has to fall at a given rate.

  With :math:`w` the lower variable after T steps of descent,

  .. math::
    q = g(x, y) - g(x, w), \qquad
    (x, y)_{k+1} = (x, y)_k - \alpha (\nabla f + \lambda_k \nabla q)

  and :math:`\lambda_k` from `dynamic_barrier`. The multiplier grows by itself
  as the gap closes, so that there is no error of order one over a penalty. Two
  others take its place. The slope of q in x is short by what the inner loop
  leaves undone, a bias that falls geometrically with T. And the step has to
  decay for the last digits: with a constant one, the two variables jump across
  the set where the gap vanishes.

  For problems without sets: where a projection takes a part of the step back,
  the gap no longer falls as the barrier asks, and the method stops too early.

  Args:
    problem: the upper and the lower loss.
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable.
    value: optimiser of the value sequence; by default the one of `lower`.
    inner_steps: steps :math:`T` of the value sequence, which begins at the
      lower variable in each update.
    eta: rate :math:`\eta \ge 0` at which the gap has to fall, a constant or a
      schedule.
    inner_batch: the batch of inner step t, from (batch, t).
    wrap: wraps each oracle.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `value`, `upper`, `lower`,
    `gap`.

  Raises:
    ValueError: if eta is negative or `inner_steps` is below 1.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> sgd = optax.sgd(0.1)
    >>> solver = bj.bome(problem, upper=sgd, lower=sgd, inner_steps=5)
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(200):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.upper.round(2))
    [1. 1.]

  References:
    Liu, Ye, Wright, Stone and Liu, `BOME! Bilevel Optimization Made Easy: A
    Simple First-Order Approach <https://arxiv.org/abs/2209.08709>`_, 2022.
  """
  follow = _pbgd.follow_value(
    problem, lower if value is None else value, wrap=wrap
  )
  descend = optax.chain(
    wrap(oracles.value_gap(problem)),
    aggregators.dynamic_barrier(eta),
    combinators.per_sequence(upper=upper, lower=lower),
  )
  return combinators.auxiliary(
    combinators.alternate(
      combinators.repeat(follow, inner_steps, inner_batch), descend
    ),
    restart=('value',),
    value=lambda params: params.lower,
  )
