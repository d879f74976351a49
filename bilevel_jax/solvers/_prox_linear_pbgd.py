"""Penalty-based bilevel descent by the norm of the slope, not its square."""

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

  The penalty is exact: from a finite :math:`\gamma` on, its minimisers have
  :math:`\nabla_y g = 0`, not nearly so. Nor does the step shrink as
  :math:`\gamma` grows, where the lower loss is quadratic: :math:`\alpha` below
  two over the curvature of f will do, in general about
  :math:`1 / (L_f + \gamma L_2)` with :math:`L_2` the change of the lower
  Hessian. It takes 2 `iterations` + 3 Hessian-vector products an update, and
  like `g_pbgd` it can stay at lower stationary points that are no minimisers.

  For one batch an update: the step is no mean over examples, so that it
  takes neither micro-batches nor mapped axes; sharded batches under `jax.jit`
  are as good as on one device.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule.
    step: :math:`\alpha_k > 0`, the step size of both variables.
    iterations: iterations of the subproblem's dual, see `prox_linear`.
    upper_set: projects the upper variable.
    lower_set: projects the lower variable; the penalty then asks for a slope of
      zero inside the set.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `upper`, `lower`, `penalty`
    and `multiplier`; a multiplier below :math:`\gamma` says that :math:`\gamma`
    is large enough.

  Raises:
    ValueError: if a number is negative, a set has no point in it or
      `iterations` is below 1.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2) + jnp.sum(x**2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> solver = bj.solvers.prox_linear_pbgd(problem, penalty=2.0, step=0.3)
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(100):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
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
  # Dividing by the step and multiplying again rounds: hence the sets once more.
  return descent.descend(
    oracle,
    upper=types.Sequence(optax.sgd(step), set=upper_set),
    lower=types.Sequence(optax.sgd(step), set=lower_set),
  )
