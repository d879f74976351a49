"""SUSTAIN and MRBO: recursive momentum on both levels."""

from collections.abc import Callable
from typing import Any

from bilevel_jax import descent, evaluation, linear_solvers, oracles, types


def _corrected(problem, system, decay, **records):
  """Corrects the directions of both levels at one point."""
  both = evaluation.together(
    oracles.lower_gradient(problem), oracles.implicit(problem, solve=system)
  )
  return descent.descend(evaluation.storm(both, decay), **records)


def sustain(
  problem: types.BilevelProblem,
  *,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  decay: types.ScalarOrSchedule,
  terms: int,
  step_size: float,
  linear_batch: Callable[[Any, Any], Any] | None = None,
  key: Any,
) -> descent.Solver:
  r"""SUSTAIN: one loop, `storm` on the lower gradient and the hypergradient.

  .. math::
    d_k = G(z_k; \xi_k) + (1 - a_k) [d_{k-1} - G(z_{k-1}; \xi_k)], \qquad
    G = \left( \nabla_x f - \nabla_{xy} g \, q, \; \nabla_y g \right)

  with :math:`q` from a Neumann series of random length, as in `bsa`. Both
  directions are evaluated twice on the same batch. The correction removes
  noise, but not the bias of the series, which is the final error. Both levels
  share one decay; the authors have one for each.

  Args:
    problem: the upper and the lower loss; the lower loss is strongly convex.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`.
    decay: :math:`a_k` in [0, 1]; 1 for no correction.
    terms: bound of the random length.
    step_size: step size of the series, at most 1 / (largest lower curvature).
    linear_batch: the batch of product t, from (batch, t).
    key: PRNG key of the lengths, or a whole number.

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: if `terms` is too small or a constant decay not in [0, 1].

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> solver = bj.solvers.sustain(
    ...   toy.problem, terms=5, step_size=0.4, decay=0.1,
    ...   key=0,
    ...   upper=optax.sgd(0.1), lower=optax.sgd(0.1),
    ... )

  References:
    Khanduri, Zeng, Hong, Wai, Wang and Yang, `A Near-Optimal Algorithm for
    Stochastic Bilevel Optimization via Double-Momentum
    <https://arxiv.org/abs/2102.07367>`_, 2021.
  """
  series = linear_solvers.random_neumann(terms, step_size)
  system = linear_solvers.LinearSystem(series, linear_batch, False, key)
  return _corrected(problem, system, decay, upper=upper, lower=lower)


def mrbo(
  problem: types.BilevelProblem,
  *,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  decay: types.ScalarOrSchedule,
  terms: int,
  step_size: float,
  linear_batch: Callable[[Any, Any], Any] | None = None,
) -> descent.Solver:
  r"""MRBO: recursive momentum with a Neumann series of fixed length.

  It is `sustain` with a truncated series instead of one random term: twice the
  products, but less noise. Both levels share one decay; the authors have one
  for each.

  Args:
    problem: as in `sustain`.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`.
    decay: as in `sustain`.
    terms: products of the series.
    step_size: step size of the series.
    linear_batch: the batch of product t, from (batch, t).

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: as in `sustain`.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> solver = bj.solvers.mrbo(
    ...   toy.problem, terms=5, step_size=0.4, decay=0.1,
    ...   upper=optax.sgd(0.1), lower=optax.sgd(0.1),
    ... )

  References:
    Yang, Ji and Liang, `Provably Faster Algorithms for Bilevel Optimization
    <https://arxiv.org/abs/2106.04692>`_, 2021.
  """
  series = linear_solvers.neumann(terms, step_size)
  system = linear_solvers.LinearSystem(series, linear_batch, False)
  return _corrected(problem, system, decay, upper=upper, lower=lower)
