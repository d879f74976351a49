"""BOME and FORUM: upper losses behind a barrier on the value gap."""

from collections.abc import Sequence

from bilevel_jax import aggregators, descent, oracles, types


def _with_barrier(problem, rows, barrier, upper, lower, value):
  """The value sequence first, then the rows of the upper losses and the gap."""
  low = types.as_sequence(lower, 'lower')
  return descent.descend(
    oracles.lower_gradient(problem, of='value'),
    oracles.aggregated(rows, barrier),
    upper=upper,
    lower=low,
    value=types.value_sequence(value, low, restart=True),
  )


def bome(
  problem: types.BilevelProblem,
  *,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  value: types.SequenceLike,
  eta: types.ScalarOrSchedule = 0.5,
) -> descent.Solver:
  r"""BOME: descends the upper loss while the value gap falls at a given rate.

  With :math:`w` the lower variable after T steps of descent,

  .. math::
    q = g(x, y) - g(x, w), \qquad
    (x, y)_{k+1} = (x, y)_k - \alpha (\nabla f + \lambda_k \nabla q)

  and :math:`\lambda_k` from `dynamic_barrier`. It needs no penalty. The
  multiplier grows as the gap closes, so that there is no error of the order of
  one over a penalty. There are two other errors. The inner loop does not
  converge, which gives the slope of q in x a bias that falls geometrically with
  T. And with constant steps, the variables oscillate across the set where the
  gap vanishes, so that accurate solutions need decreasing steps.

  It is for problems without sets: where a projection undoes a part of the step,
  the gap does not fall at the rate of the barrier, and the method stops early.

  Args:
    problem: the upper and the lower loss.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`.
    value: how the value sequence moves, for instance
      `bj.Sequence(optax.sgd(0.1), steps=5)` for :math:`T = 5`. In each update
      it restarts at the lower variable without momentum, or with
      `restart=False` continues.
    eta: rate :math:`\eta \ge 0` at which the gap has to fall, a constant or a
      schedule.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `value`, `upper`, `lower`,
    `gap`.

  Raises:
    ValueError: if eta is negative.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> sgd = optax.sgd(0.1)
    >>> solver = bj.bome(
    ...   toy.problem, upper=sgd, lower=sgd, value=bj.Sequence(sgd, steps=5)
    ... )
    >>> params, _ = bj.testing.run(solver, toy.params, 200)
    >>> print(params.upper.round(2))
    [1. 1.]

  References:
    Liu, Ye, Wright, Stone and Liu, `BOME! Bilevel Optimization Made Easy: A
    Simple First-Order Approach <https://arxiv.org/abs/2209.08709>`_, 2022.
  """
  gap, barrier = oracles.value_gap(problem), aggregators.dynamic_barrier(eta)
  return _with_barrier(problem, gap, barrier, upper, lower, value)


def _published_averaging(count):
  """The share of new weights, one in the first update and then decreasing."""
  return (count + 1.0) ** -0.75


def forum(
  problem: types.BilevelProblem,
  objectives: int | Sequence[str],
  *,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  value: types.SequenceLike,
  rate: types.ScalarOrSchedule = 0.1,
  averaging: types.ScalarOrSchedule = _published_averaging,
) -> descent.Solver:
  r"""FORUM: descends several upper losses while the value gap falls at a rate.

  With :math:`w` the lower variable after T steps of descent,

  .. math::
    q = g(x, y) - g(x, w), \qquad
    (x, y)_{k+1} = (x, y)_k - \alpha \Big( \sum_m \bar\lambda_m \nabla f_m
      + s \nabla q \Big)

  with the weights of `constrained_mgda`. It is `bome` for several upper losses:
  first-order, without a penalty. Like `bome` it needs decreasing steps, and it
  is for problems without sets.

  Args:
    problem: the upper losses, one function to an array (objectives,) or to
      (array, auxiliary), and the lower loss.
    objectives: the number of upper losses, or their names.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`.
    value: how the value sequence moves, for instance
      `bj.Sequence(optax.sgd(0.1), steps=5)` for :math:`T = 5`. In each update
      it restarts at the lower variable, or with `restart=False` continues.
    rate: :math:`\rho \ge 0` at which the gap has to fall; a constant or a
      schedule.
    averaging: share of the new weights in the averaged weights, in (0, 1]; a
      constant or a schedule, by default the published schedule.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `value`, the upper losses,
    `lower` and `gap`.

  Raises:
    ValueError: if a number is out of range; if names are not distinct or among
      `lower`, `gap` and `value`.

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
  gap = oracles.multi_objective_gap(problem, objectives)
  count = len(objectives) if isinstance(objectives, Sequence) else objectives
  barrier = aggregators.constrained_mgda(count, rate=rate, averaging=averaging)
  return _with_barrier(problem, gap, barrier, upper, lower, value)
