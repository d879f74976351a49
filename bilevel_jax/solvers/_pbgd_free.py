"""PBGD-Free and ALT-PBGD: the penalised lower problem solved before x moves."""

from bilevel_jax import descent, oracles, types


def pbgd_free(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
) -> descent.Solver:
  r"""PBGD-Free: no value sequence; x follows its own slope at a penalised y.

  .. math::
    y_{k+1} &= \Pi [ y - \beta c_k ( \nabla_y f(x_k, y)
      + \gamma_k \nabla_y g(x_k, y) ) ] \quad \text{(K times)} \\
    x_{k+1} &= \Pi [ x_k - \alpha \nabla_x f(x_k, y_{k+1}) ], \qquad
    c_k = \min(1 / \gamma_k, 1)

  The cheapest of the penalty methods: one copy of the lower variable and one
  gradient of each loss a step. It leaves out how the lower solution moves with
  x, so it is right only where the upper loss is flat around the lower solutions
  in the sense of its authors, as in fine-tuning a shared model. Elsewhere it
  ends at a point that solves nothing: on f = x^2 + 10 y, g = (y - x + 1)^2 over
  [-8, 1.5] at x = 0, where the answer is x = -5, which `alt_pbgd` finds.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, with K `steps`.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `lower` and `upper`.

  Raises:
    ValueError: if the penalty is negative or a set has no point in it.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> square = lambda x, y, batch: (x - y) ** 2
    >>> solver = bj.solvers.pbgd_free(
    ...   bj.BilevelProblem(square, square), penalty=10.0,
    ...   upper=optax.sgd(0.1), lower=bj.Sequence(optax.sgd(0.1), steps=3),
    ... )

  References:
    Jiang, Xiao, Chen and Chen, `Beyond Value Functions
    <https://arxiv.org/abs/2507.20400>`_, 2025.
  """
  wanted = problem.outputs
  direct = oracles.gradient(
    lambda params, batch: problem.upper(params.upper, params.lower, batch),
    name='upper',
    of='upper',
    outputs=(lambda p: wanted(p).get('upper')) if wanted else None,
  )
  return descent.descend(
    oracles.penalised_lower_gradient(problem, penalty=penalty),
    direct,
    upper=upper,
    lower=lower,
  )


def alt_pbgd(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  value: types.SequenceLike | None = None,
) -> descent.Solver:
  r"""ALT-PBGD: both lower problems first, then x, with steps not rescaled.

  .. math::
    w_{k+1} &= \Pi [ w - \beta \nabla_y g(x_k, w) ], \qquad
    y_{k+1} = \Pi [ y - \beta' c_k ( \nabla_y f(x_k, y)
      + \gamma_k \nabla_y g(x_k, y) ) ] \quad \text{(K times each)} \\
    x_{k+1} &= \Pi [ x_k - \alpha ( \nabla_x f(x_k, y_{k+1})
      + \gamma_k ( \nabla_x g(x_k, y_{k+1}) - \nabla_x g(x_k, w_{k+1}) ) ) ]

  The slope of the penalised problem in x does not grow with the penalty once y
  and w are near their solutions, so x takes full steps. The composition is that
  of `f2sa` in two loops; there both lower sequences share one loop.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how y moves, with K `steps`.
    value: how w moves; by default as `lower` does.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `upper`, `lower`, `gap` and
    `value`.

  Raises:
    ValueError: if the penalty is negative or a set has no point in it.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: x**2 + 10 * y,
    ...   lower=lambda x, y, batch: (y - x + 1) ** 2,
    ... )
    >>> solver = bj.solvers.alt_pbgd(
    ...   problem, penalty=15.0, upper=optax.sgd(0.05),
    ...   lower=bj.Sequence(optax.sgd(0.2), steps=20),
    ... )
    >>> params = bj.BilevelParams(jnp.zeros([]), jnp.zeros([]))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(200):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.upper.round(2))
    -5.0

  References:
    Jiang, Xiao, Chen and Chen, `Beyond Value Functions
    <https://arxiv.org/abs/2507.20400>`_, 2025.
  """
  low = types.as_sequence(lower, 'lower')
  return descent.descend(
    oracles.lower_gradient(problem, of='value'),
    oracles.penalised_lower_gradient(problem, penalty=penalty),
    oracles.value_gap(problem, penalty=penalty, rescale=False, of='upper'),
    upper=upper,
    lower=low,
    value=types.value_sequence(
      value, low, steps=low.steps, batch_at=low.batch_at
    ),
  )
