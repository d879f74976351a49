"""Descent along the implicit hypergradient, also with linear equations."""

from bilevel_jax import _checks, descent, linear_solvers, oracles, types


@_checks.system_in_solve
def aipod(
  problem: types.BilevelProblem,
  *,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  solve: oracles.Solve | None = None,
) -> descent.Solver:
  r"""AiPOD: alternating projected steps of both levels in affine sets.

  .. math::
    y_{k+1} &= \Pi_{Y(x_k)} (y - \beta \nabla_y g(x_k, y))
      \quad \text{(S times from } y_k \text{)} \\
    x_{k+1} &= \Pi_X (x_k - \alpha \nabla F(x_k, y_{k+1})),
      \qquad Y(x) = \{ y : A y + h(x) = c \}

  with the hypergradient of `implicit`. Each update projects the lower variable
  S times and the upper variable once; `e_aipod` needs fewer projections.

  Args:
    problem: the upper and the lower loss; the lower loss is strongly convex
      along its set.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`, for
      instance with another affine set; steps of the order 1 / sqrt(updates).
    lower: how the lower variable moves, with S `steps` and its equations as the
      `set`, see `bj.projections.affine_set`.
    solve: the linear solver, or a `bj.linear_solvers.LinearSystem`, see
      `implicit`; by default ten conjugate gradients. The authors use
      `random_neumann`.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `lower` and `upper`,
    `bj.counts` the projections.

  Raises:
    TypeError: if the lower set is not an `AffineSet`, or without a key for a
      random solver.
    ValueError: at init, if a set is empty.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2) + jnp.sum(x**2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> solver = bj.aipod(
    ...   problem,
    ...   upper=bj.Sequence(
    ...     optax.sgd(0.1), set=bj.projections.affine_set([[1.0, -1.0]], [1.0])
    ...   ),
    ...   lower=bj.Sequence(
    ...     optax.sgd(0.3), steps=3,
    ...     set=bj.projections.affine_set([[1.0, 1.0]], [1.0]),
    ...   ),
    ... )
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> params, _ = bj.testing.run(solver, params, 200)
    >>> print(params.upper.round(3), params.lower.round(3))
    [ 0.5 -0.5] [1. 0.]

  References:
    Xiao, Shen, Yin and Chen, `Alternating Projected SGD for
    Equality-constrained Bilevel Optimization
    <https://arxiv.org/abs/2211.07096>`_, 2023.
  """
  low = types.as_sequence(lower, 'lower')
  # The hypergradient is evaluated at the new lower variable.
  return descent.descend(
    oracles.lower_gradient(problem),
    oracles.implicit(
      problem,
      solve=linear_solvers.as_system(solve, warm_start=False),
      lower_set=low.set,
    ),
    upper=upper,
    lower=low,
  )


@_checks.system_in_solve
def aid_bilevel(
  problem: types.BilevelProblem,
  *,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  solve: oracles.Solve | None = None,
) -> descent.Solver:
  r"""Approximate implicit differentiation: `aipod` without a lower set.

  .. math::
    y_{k+1} &= y - \beta \nabla_y g(x_k, y)
      \quad \text{(S times from } y_k \text{)} \\
    x_{k+1} &= \Pi_X \left( x_k - \alpha (\nabla_x f - \nabla_{xy} g \, q)
      \right), \qquad \nabla_{yy} g \, q \approx \nabla_y f

  Linear solvers: `conjugate_gradient` for all data or large batches; `neumann`
  or `random_neumann` for fresh small batches; `nystrom` for few products that
  are evaluated at once.

  The lower variable has taken few steps since the upper variable moved: train
  it again on the lower loss before you report a result.

  Args:
    problem: the upper and the lower loss; the lower loss is strongly convex.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, with S `steps`.
    solve: the linear solver, or a `bj.linear_solvers.LinearSystem`, see
      `implicit`; by default ten conjugate gradients with a warm start.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `lower` and `upper`.

  Raises:
    TypeError: without a key for a random solver.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> sgd = optax.sgd(0.3)
    >>> solver = bj.aid_bilevel(
    ...   toy.problem, upper=sgd, lower=sgd,
    ...   solve=bj.linear_solvers.nystrom(2, 1e-3),
    ... )
    >>> params, _ = bj.testing.run(solver, toy.params, 50)
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
    solve=linear_solvers.as_system(solve, warm_start=True),
  )
