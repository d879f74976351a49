"""VRBO: recursive variance reduction with an inner loop."""

from collections.abc import Callable
from typing import Any

from bilevel_jax import (
  _checks,
  _sequences,
  descent,
  evaluation,
  linear_solvers,
  oracles,
  types,
)


def vrbo(
  problem: types.BilevelProblem,
  *,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  terms: int,
  step_size: float,
  period: int,
  large_batch: Callable[[Any], Any] | None = None,
  linear_batch: Callable[[Any, Any], Any] | None = None,
) -> descent.Solver:
  r"""VRBO: recursive differences on both levels, with an inner loop.

  .. math::
    d_t = d_{t-1} + G(z_t; \xi_t) - G(z_{t-1}; \xi_t), \qquad
    G = \left( \nabla_x f - \nabla_{xy} g \, q, \; \nabla_y g \right), \quad
    z = (x, y)

  with :math:`q` from a Neumann series. In one update y takes the steps of its
  record, and x takes one step together with the last of them. After each step
  both estimates are updated by differences on one batch. At the first step of
  every `period` updates they are evaluated on the large batch. The authors move
  x before y, with the last estimates or fresh ones, which takes one evaluation
  more.

  Args:
    problem: as in `sustain`.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`.
    terms: products of the Neumann series.
    step_size: step size of the series.
    period: updates between two fresh estimates.
    large_batch: the batch of a fresh estimate, from the batch; by default the
      whole batch. The other steps use the lower record's `batch_at`.
    linear_batch: the batch of product t, from (batch, t).

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: if a whole number is too small, or `upper` has a `batch_at`.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> solver = bj.solvers.vrbo(
    ...   toy.problem, terms=5, step_size=0.4,
    ...   period=6,
    ...   upper=optax.sgd(0.1), lower=bj.Sequence(optax.sgd(0.1), steps=3),
    ... )

  References:
    Yang, Ji and Liang, `Provably Faster Algorithms for Bilevel Optimization
    <https://arxiv.org/abs/2106.04692>`_, 2021.
  """
  _checks.whole_number('vrbo', 'updates in a period', period)
  both = evaluation.together(
    oracles.lower_gradient(problem),
    oracles.implicit(
      problem,
      solve=linear_solvers.LinearSystem(
        linear_solvers.neumann(terms, step_size), linear_batch, False
      ),
    ),
  )
  low = types.as_sequence(lower, 'lower')
  small = low.batch_at or (lambda batch, t: batch)
  large = large_batch or (lambda batch: batch)
  moves = lambda batch, t: (small(batch, t), large(batch))
  # With one step of y, both variables move in it and see the same batch.
  above = types.as_sequence(upper, 'upper')
  _sequences.refuse_batches('vrbo', 'it uses the batches of lower', upper=above)
  # Evaluations in one update.
  steps = max(low.steps, above.steps)
  return descent.descend(
    evaluation.recursive(
      both,
      period * steps,
      small_batch=lambda pair: pair[0],
      large_batch=lambda pair: pair[1],
    ),
    upper=above._replace(batch_at=moves),
    lower=low._replace(batch_at=moves),
  )
