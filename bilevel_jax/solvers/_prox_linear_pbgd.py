"""Penalty-based bilevel descent with the norm of the slope as penalty."""

import optax

from bilevel_jax import descent, oracles, projections, types


def prox_linear_pbgd(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  step: types.ScalarOrSchedule,
  iterations: int = 10,
  upper_set: projections.Projection | None = None,
  lower_set: projections.Projection | None = None,
) -> descent.Solver:
  r"""Prox-linear steps on the upper loss plus the norm of the lower slope.

  .. math::
    z_{k+1} = \arg\min_{z \in C \times U} \;
      \langle \nabla f(z_k), z - z_k \rangle
      + \gamma \| \nabla_y g(z_k) + \nabla \nabla_y g(z_k) (z - z_k) \|
      + \frac{1}{2 \alpha} \| z - z_k \|^2

  The penalty is exact: for a sufficiently large finite :math:`\gamma`, its
  minimisers have :math:`\nabla_y g = 0`. If the lower loss is quadratic, the
  step size does not depend on :math:`\gamma`: it is below two over the
  curvature of f. In general it is about :math:`1 / (L_f + \gamma L_2)`, with
  the Lipschitz constant :math:`L_2` of the lower Hessian. An update takes 2
  `iterations` + 3 Hessian-vector products. Like `g_pbgd` it can stop at lower
  stationary points that are not minimisers.

  The step is not a mean over examples. So each update sees its batch in one
  part: micro-batches and mapped axes are refused, and batches may be sharded
  under `jax.jit`.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule.
    step: :math:`\alpha_k > 0`, the step size of both variables.
    iterations: iterations of the subproblem's dual, see `prox_linear`.
    upper_set: projection on the set of the upper variable.
    lower_set: projection on the set of the lower variable; the penalty still
      asks for a slope of zero.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `upper`, `lower`, `penalty`
    and `multiplier`. If the multiplier is below :math:`\gamma`, then
    :math:`\gamma` is large enough.

  Raises:
    ValueError: if a number is negative, a set is empty or `iterations` is below
      1.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2) + jnp.sum(x**2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> solver = bj.solvers.prox_linear_pbgd(problem, penalty=2.0, step=0.3)
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> params, _ = bj.testing.run(solver, params, 100)
    >>> print(params.upper.round(3), params.lower.round(3))
    [0.5 0.5] [0.5 0.5]

  References:
    Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method
    <https://arxiv.org/abs/2302.05185>`_, 2023.
  """
  oracle = oracles.prox_linear(
    problem,
    penalty=penalty,
    step=step,
    iterations=iterations,
    upper_set=upper_set,
    lower_set=lower_set,
  )
  # The sets again, as division and multiplication by the step size round.
  return descent.descend(
    oracle,
    upper=types.Sequence(optax.sgd(step), set=upper_set),
    lower=types.Sequence(optax.sgd(step), set=lower_set),
  )
