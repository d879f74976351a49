"""FORUM: several upper losses, behind a barrier on the value gap."""

from collections.abc import Sequence

from bilevel_jax import aggregators, descent, oracles, types


def _authors_average(count):
  """The share of new weights: one, and then falling."""
  return (count + 1.0) ** -0.75


def forum(
  problem: types.BilevelProblem,
  objectives: int | Sequence[str],
  *,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  value: types.SequenceLike,
  rate: types.ScalarOrSchedule = 0.1,
  averaging: types.ScalarOrSchedule = _authors_average,
) -> descent.Solver:
  r"""FORUM: several upper losses, while the value gap falls at a given rate.

  With :math:`w` the lower variable after T steps of descent,

  .. math::
    q = g(x, y) - g(x, w), \qquad
    (x, y)_{k+1} = (x, y)_k - \alpha \Big( \sum_m \bar\lambda_m \nabla f_m
      + s \nabla q \Big)

  with the weights of `constrained_mgda`. It is to `mgda` what `bome` is to
  descent: first-order, with no penalty to choose, and like `bome` it asks for
  steps that decay, and for no sets.

  Args:
    problem: the upper losses, one function to an array (objectives,), or to
      (this, auxiliary), and the lower loss.
    objectives: the number of upper losses, or their names.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, in the same way.
    value: how the value sequence moves, for instance
      `bj.Sequence(optax.sgd(0.1), steps=5)` for :math:`T = 5`; it starts at the
      lower variable in each update, or with `restart=False` goes on.
    rate: :math:`\rho \ge 0` at which the gap has to fall; a constant or a
      schedule.
    averaging: share of the new weights in the averaged ones, in (0, 1]; a
      constant or a schedule, by default that of the authors.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `value`, the upper losses,
    `lower` and `gap`.

  Raises:
    ValueError: if a number is out of range, or names are no distinct ones.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.stack(
    ...     [jnp.sum((y - 1) ** 2), jnp.sum((y - 3) ** 2)]
    ...   ),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> sgd = optax.sgd(0.1)
    >>> solver = bj.solvers.forum(
    ...   problem, 2, upper=sgd, lower=sgd, value=bj.Sequence(sgd, steps=5)
    ... )
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> params, _ = bj.testing.run(solver, params, 200)
    >>> print((params.upper > 0.9) & (params.upper < 3.1))  # Pareto-optimal.
    [ True  True]

  References:
    Ye, Lin, Cao, Zhang and Tsang, `A First-Order Multi-Gradient Algorithm for
    Multi-Objective Bi-Level Optimization <https://arxiv.org/abs/2401.09257>`_,
    2024.
  """
  low = types.as_sequence(lower, 'lower')
  gap = oracles.multi_objective_gap(problem, objectives)
  count = len(objectives) if isinstance(objectives, Sequence) else objectives
  barrier = oracles.aggregated(
    gap,
    aggregators.constrained_mgda(count, rate=rate, averaging=averaging),
  )
  return descent.descend(
    oracles.lower_gradient(problem, of='value'),
    barrier,
    upper=upper,
    lower=low,
    value=types.value_sequence(value, low, restart=True),
  )
