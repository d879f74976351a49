"""Descent along the implicit hypergradient, also in equality constraints."""

from collections.abc import Callable
from typing import Any

import optax

from bilevel_jax import combinators, oracles, projections, types

Wrapper = Callable[
  [optax.GradientTransformationExtraArgs],
  optax.GradientTransformationExtraArgs,
]


def same(oracle: optax.GradientTransformationExtraArgs):
  """Wraps nothing."""
  return oracle


def lower_descent(
  problem: types.BilevelProblem,
  wrap: Wrapper,
  lower: optax.GradientTransformation,
  *links: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """One step of the lower variable down the lower loss, then the links."""
  oracle = oracles.gradient(
    lambda params, batch: problem.lower(params.upper, params.lower, batch),
    name='lower',
    of='lower',
  )
  move = combinators.per_sequence(lower=lower)
  return optax.chain(wrap(oracle), move, *links)


def aipod(
  problem: types.BilevelProblem,
  *,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  lower_set: projections.AffineSet | None = None,
  upper_set: projections.Projection | None = None,
  inner_steps: int = 1,
  inner_batch: Callable[[Any, Any], Any] | None = None,
  solve: oracles.Solve | None = None,
  linear_batch: Callable[[Any, Any], Any] | None = None,
  warm_start: bool = False,
  key: Any = 0,
  wrap: Wrapper = same,
) -> optax.GradientTransformationExtraArgs:
  r"""AiPOD: alternates projected steps of both levels, each in its affine set.

  .. math::
    y_{k+1} &= \Pi_{Y(x_k)} (y - \beta \nabla_y g(x_k, y))
      \quad \text{(S times from } y_k \text{)} \\
    x_{k+1} &= \Pi_X (x_k - \alpha \nabla F(x_k, y_{k+1})),
      \qquad Y(x) = \{ y : A y + h(x) = c \}

  with the hypergradient of `implicit`. Each update projects S times below and
  once above; `e_aipod` needs fewer.

  Args:
    problem: the upper and the lower loss, the lower one strongly convex along
      its set.
    upper: optimiser of the upper variable; of the order 1 / sqrt(updates).
    lower: optimiser of the lower variable; likewise.
    lower_set: the lower variable's equations, see `affine_set`; None for none.
    upper_set: projects the upper variable, for instance another `affine_set`;
      None for the whole space.
    inner_steps: steps S of the lower variable in one update.
    inner_batch: the batch of inner step t, from (batch, t); by default the
      whole batch.
    solve: the linear solver, see `implicit`; by default ten conjugate
      gradients. The published one is `random_neumann`.
    linear_batch: the batch of product t of the solver, from (batch, t).
    warm_start: whether the solver starts from its last solution.
    key: PRNG key of a random solver, or a whole number.
    wrap: wraps each oracle, for instance `lambda o: bj.accumulate(o, 4)`.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `lower` and `upper`,
    `bj.counts` the projections.

  Raises:
    TypeError: if `lower_set` is no `AffineSet`.
    ValueError: if `inner_steps` is below 1, or at init, if a set has no point
      in it.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2) + jnp.sum(x**2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> solver = bj.aipod(
    ...   problem, upper=optax.sgd(0.1), lower=optax.sgd(0.3), inner_steps=3,
    ...   lower_set=bj.affine_set([[1.0, 1.0]], [1.0]),
    ...   upper_set=bj.affine_set([[1.0, -1.0]], [1.0]),
    ... )
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(200):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.upper.round(3), params.lower.round(3))
    [ 0.5 -0.5] [1. 0.]

  References:
    Xiao, Shen, Yin and Chen, `Alternating Projected SGD for
    Equality-constrained Bilevel Optimization
    <https://arxiv.org/abs/2211.07096>`_, 2023.
  """
  below = lower_descent(
    problem, wrap, lower, projections.project(lower=lower_set)
  )
  oracle = oracles.implicit(
    problem,
    solve=solve,
    lower_set=lower_set,
    warm_start=warm_start,
    linear_batch=linear_batch,
    key=key,
  )
  above = optax.chain(
    wrap(oracle),
    combinators.per_sequence(upper=upper),
    projections.project(upper=upper_set),
  )
  # The hypergradient is taken at the new lower variable.
  return combinators.alternate(
    combinators.repeat(below, inner_steps, inner_batch), above
  )


def aid_bilevel(
  problem: types.BilevelProblem,
  *,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  solve: oracles.Solve | None = None,
  upper_set: projections.Projection | None = None,
  inner_steps: int = 1,
  inner_batch: Callable[[Any, Any], Any] | None = None,
  linear_batch: Callable[[Any, Any], Any] | None = None,
  warm_start: bool = True,
  key: Any = 0,
  wrap: Wrapper = same,
) -> optax.GradientTransformationExtraArgs:
  r"""Approximate implicit differentiation: `aipod` without a lower set.

  .. math::
    y_{k+1} &= y - \beta \nabla_y g(x_k, y)
      \quad \text{(S times from } y_k \text{)} \\
    x_{k+1} &= \Pi_X \left( x_k - \alpha (\nabla_x f - \nabla_{xy} g \, q)
      \right), \qquad \nabla_{yy} g \, q \approx \nabla_y f

  Which linear solver: `conjugate_gradient` where losses are over all data or
  large batches; `neumann` or `random_neumann` with fresh small batches;
  `nystrom` where few products, all at once, are to do.

  Args:
    problem: the upper and the lower loss, the lower one strongly convex.
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable.
    solve: the linear solver, see `implicit`; by default ten conjugate
      gradients.
    upper_set: projects the upper variable; None for the whole space.
    inner_steps: steps S of the lower variable in one update.
    inner_batch: the batch of inner step t, from (batch, t).
    linear_batch: the batch of product t of the solver, from (batch, t).
    warm_start: whether the solver starts from its last solution.
    key: PRNG key of a random solver, or a whole number.
    wrap: wraps each oracle.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `lower` and `upper`.

  Raises:
    ValueError: if `inner_steps` is below 1.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> sgd = optax.sgd(0.3)
    >>> solver = bj.aid_bilevel(
    ...   problem, upper=sgd, lower=sgd, solve=bj.nystrom(2, 1e-3)
    ... )
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(50):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.upper.round(3))
    [1. 1.]

  References:
    Ji, Yang and Liang, `Bilevel Optimization: Convergence Analysis and Enhanced
    Design <https://arxiv.org/abs/2010.07962>`_, 2021.

    Pedregosa, `Hyperparameter optimization with approximate gradient
    <https://arxiv.org/abs/1602.02355>`_, 2016.
  """
  return aipod(
    problem,
    upper=upper,
    lower=lower,
    upper_set=upper_set,
    inner_steps=inner_steps,
    inner_batch=inner_batch,
    solve=solve,
    linear_batch=linear_batch,
    warm_start=warm_start,
    key=key,
    wrap=wrap,
  )
