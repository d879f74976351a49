"""SRBA: SOBA's directions by recursive differences, on finite data."""

from collections.abc import Callable
from typing import Any

from bilevel_jax import descent, evaluation, oracles, types


def srba(
  problem: types.BilevelProblem,
  *,
  period: int,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  linear: types.SequenceLike | None = None,
  small_batch: Callable[[Any], Any] = lambda batch: batch,
  large_batch: Callable[[Any], Any] = lambda batch: batch,
) -> descent.Solver:
  r"""SRBA: SOBA with variance reduction by recursive differences.

  With SOBA's directions :math:`D = (d^y, d^v, d^x)` at the point
  :math:`z = (y, v, x)`,

  .. math::
    \Delta_k = \begin{cases}
      D(z_k; \Xi_k) & \text{if the period divides } k \\
      \Delta_{k-1} + D(z_k; \xi_k) - D(z_{k-1}; \xi_k) & \text{otherwise}
    \end{cases}

  and all three sequences move along :math:`\Delta_k` at once, with constant
  steps. If the large batch :math:`\Xi` is all data, it converges to a point
  where the hypergradient vanishes. Unlike `saba` it needs no table, but a pass
  over all data in each period.

  Args:
    problem: the upper and the lower loss.
    period: updates from one fresh estimate to the next. The authors take half
      the samples of both losses over those of a small batch.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`.
    linear: how :math:`v` moves; by default with the optimiser of `lower`. The
      analysis needs a ball as its `set`.
    small_batch: :math:`\xi`, from the batch; by default the whole batch.
    large_batch: :math:`\Xi`, from the batch; by default the whole batch.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `upper` and `lower`,
    `bj.auxiliaries` the sequence `linear`.

  Raises:
    ValueError: if the period is below 1.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> solver = bj.solvers.srba(
    ...   toy.problem, period=4, upper=optax.sgd(0.05), lower=optax.sgd(0.2)
    ... )
    >>> params, _ = bj.testing.run(solver, toy.params, 200)
    >>> print(params.upper.round(2))
    [1. 1.]

  References:
    Dagreou, Moreau, Vaiter and Ablin, `A Lower Bound and a Near-Optimal
    Algorithm for Bilevel Empirical Risk Minimization
    <https://arxiv.org/abs/2302.08766>`_, 2024.
  """
  low = types.as_sequence(lower, 'lower')
  directions = evaluation.recursive(
    oracles.implicit_directions(problem),
    period,
    small_batch=small_batch,
    large_batch=large_batch,
  )
  return descent.descend(
    directions,
    upper=upper,
    lower=low,
    linear=types.linear_sequence(linear, low),
  )
