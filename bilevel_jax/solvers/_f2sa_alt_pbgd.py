"""F2SA and ALT-PBGD: first-order methods with penalised inner loops."""

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import aggregators, descent, oracles, types
from bilevel_jax.oracles import base


def _all_slopes(problem):
  """Rows (f, g) of both variables at one point; the value's slope in `rest`."""
  above, below = base.checked_losses(problem)
  rows = lambda *trees: jax.tree.map(lambda *r: jnp.stack(r), *trees)

  def fn(params, batch, inner):
    x, y, w = params.upper, params.lower, params.value
    (f, one), (f_x, f_y) = above.with_slopes(0, 1)(x, y, batch)
    (g, two), (g_x, g_y) = below.with_slopes(0, 1)(x, y, batch)
    (floor, _), (w_x, w_y) = below.with_slopes(0, 1)(x, w, batch)
    pair = base.gradients(
      params, upper=rows(f_x, optax.tree.sub(g_x, w_x)), lower=rows(f_y, g_y)
    )
    jacobian = types.Jacobian(pair, {'value': w_y})
    more = base.requested_outputs(problem, upper=one, lower=two)
    return (f, g, g - floor, floor), jacobian, inner, *more

  return base.oracle(
    fn,
    ('upper', 'lower', 'gap', 'value'),
    counts={'gradients/upper': 1, 'gradients/lower': 2},
    moves=('upper', 'lower', 'value'),
    outputs=problem.outputs,
    linear=True,
  )


def _two_loops(problem, penalty, upper, low, value):
  """Moves both lower sequences to their solutions, then the upper variable."""
  follow = types.value_sequence(
    value, low, steps=low.steps, batch_at=low.batch_at
  )
  return descent.descend(
    oracles.lower_gradient(problem, of='value'),
    oracles.penalised_lower_gradient(problem, penalty=penalty),
    oracles.value_gap(problem, penalty=penalty, rescale=False, of='upper'),
    upper=upper,
    lower=low,
    value=follow,
  )


def f2sa(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  value: types.SequenceLike | None = None,
) -> descent.Solver:
  r"""F2SA: inner loops for the penalised and for the plain lower problem.

  .. math::
    z &\leftarrow z - \beta \nabla_y g(x_k, z), \qquad
    y \leftarrow y - \alpha c_k [ \nabla_y f(x_k, y)
      + \gamma_k \nabla_y g(x_k, y) ] \quad \text{(T times)} \\
    x_{k+1} &= \Pi \left[ x_k - \xi ( \nabla_x f(x_k, y)
      + \gamma_k (\nabla_x g(x_k, y) - \nabla_x g(x_k, z)) ) \right],
    \qquad c_k = \min(1 / \gamma_k, 1)

  It is first-order. In two loops, y is near the minimiser of the penalised loss
  when x moves. The curvature of the upper problem then does not grow with
  :math:`\gamma`, so that only the step of y is rescaled. Let the penalty grow,
  for instance as :math:`k^{1/3}` or linearly between two bounds; the bias in x
  is of the order :math:`1 / \gamma`. In one loop, all three sequences move at
  once, for three gradients at one point; then the step of x is rescaled too.

  Both lower slopes are evaluated on the same batch. Their difference is
  multiplied by :math:`\gamma`, and so would independent noise be.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule from the number of
      updates so far.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how :math:`y` moves; with :math:`T > 1` `steps` in two loops, with
      one step in one loop.
    value: how :math:`z` moves; by default with the optimiser of `lower`. Its
      default steps and batches are those of `lower`.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `upper`, `lower`, `gap` and
    `value`, the lower loss at z. An update costs T + 1 upper and twice as many
    lower gradients in two loops, 1 and 2 in one.

  Raises:
    ValueError: if the penalty is negative or a set is empty.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2) + jnp.sum(x**2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> solver = bj.f2sa(
    ...   problem, penalty=optax.linear_schedule(1.0, 1e3, 200),
    ...   upper=optax.sgd(0.1), lower=bj.Sequence(optax.sgd(0.2), steps=10),
    ... )
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> params, _ = bj.testing.run(solver, params, 400)
    >>> print(params.upper.round(2))
    [0.5 0.5]

  References:
    Kwon, Kwon, Wright and Nowak, `A Fully First-Order Method for Stochastic
    Bilevel Optimization <https://arxiv.org/abs/2301.10945>`_, 2023.

    Chen, Ma and Zhang, `Near-Optimal Nonconvex-Strongly-Convex Bilevel
    Optimization with Fully First-Order Oracles
    <https://arxiv.org/abs/2306.14853>`_, 2023.
  """
  low = types.as_sequence(lower, 'lower')
  if low.steps > 1:
    return _two_loops(problem, penalty, upper, low, value)
  weigh = aggregators.scale_by_penalty(penalty)
  return descent.descend(
    oracles.aggregated(_all_slopes(problem), weigh),
    upper=upper,
    lower=low,
    value=types.value_sequence(value, low, batch_at=low.batch_at),
  )


def alt_pbgd(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  value: types.SequenceLike | None = None,
) -> descent.Solver:
  r"""ALT-PBGD: both lower problems, then a step of x that is not rescaled.

  .. math::
    w_{k+1} &= \Pi [ w - \beta \nabla_y g(x_k, w) ], \qquad
    y_{k+1} = \Pi [ y - \beta' c_k ( \nabla_y f(x_k, y)
      + \gamma_k \nabla_y g(x_k, y) ) ] \quad \text{(K times each)} \\
    x_{k+1} &= \Pi [ x_k - \alpha ( \nabla_x f(x_k, y_{k+1})
      + \gamma_k ( \nabla_x g(x_k, y_{k+1}) - \nabla_x g(x_k, w_{k+1}) ) ) ]

  Near the solutions of y and w, the slope of the penalised problem in x does
  not grow with the penalty, so that x takes full steps. It is `f2sa` in two
  loops for any number of steps.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how y moves, with K `steps`.
    value: how w moves; by default like `lower`.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `upper`, `lower`, `gap` and
    `value`.

  Raises:
    ValueError: if the penalty is negative or a set is empty.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: x**2 + 10 * y,
    ...   lower=lambda x, y, batch: (y - x + 1) ** 2,
    ... )
    >>> solver = bj.solvers.alt_pbgd(
    ...   problem, penalty=15.0, upper=optax.sgd(0.05),
    ...   lower=bj.Sequence(optax.sgd(0.2), steps=20),
    ... )
    >>> params = bj.BilevelParams(jnp.zeros([]), jnp.zeros([]))
    >>> params, _ = bj.testing.run(solver, params, 200)
    >>> print(params.upper.round(2))
    -5.0

  References:
    Jiang, Xiao, Chen and Chen, `Beyond Value Functions
    <https://arxiv.org/abs/2507.20400>`_, 2025.
  """
  low = types.as_sequence(lower, 'lower')
  return _two_loops(problem, penalty, upper, low, value)
