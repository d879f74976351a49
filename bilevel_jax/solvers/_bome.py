"""BOME: descends the upper loss behind a barrier on the value gap."""

from bilevel_jax import aggregators, descent, oracles, types


def bome(
  problem: types.BilevelProblem,
  *,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  value: types.SequenceLike,
  eta: types.ScalarOrSchedule = 0.5,
) -> descent.Solver:
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
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves; likewise.
    value: how the value sequence moves, for instance
      `bj.Sequence(optax.sgd(0.1), steps=5)` for :math:`T = 5`; it starts at the
      lower variable in each update, with no momentum from the one before, or
      with `restart=False` goes on.
    eta: rate :math:`\eta \ge 0` at which the gap has to fall, a constant or a
      schedule.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `value`, `upper`, `lower`,
    `gap`.

  Raises:
    ValueError: if eta is negative.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> sgd = optax.sgd(0.1)
    >>> solver = bj.bome(problem, upper=sgd, lower=sgd,
    ...   value=bj.Sequence(sgd, steps=5))
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
  low = types.as_sequence(lower, 'lower')
  barrier = oracles.aggregated(
    oracles.value_gap(problem), aggregators.dynamic_barrier(eta)
  )
  return descent.descend(
    oracles.lower_gradient(problem, of='value'),
    barrier,
    upper=upper,
    lower=low,
    value=types.value_sequence(value, low, restart=True),
  )
