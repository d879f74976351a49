"""Recursive momentum on both levels: SUSTAIN, MRBO, VRBO."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from bilevel_jax import (
  _sequences,
  combinators,
  evaluation,
  linear_solvers,
  oracles,
  projections,
  types,
)
from bilevel_jax.solvers import _pbgd

BatchAt = Callable[[Any, Any], Any]


def _lower_and_hypergradient(problem, solve, linear_batch, key, wrap):
  """Both directions at one point: the first sees nothing of the second."""
  parts = [
    wrap(
      oracles.gradient(
        lambda params, batch: problem.lower(params.upper, params.lower, batch),
        name='lower',
        of='lower',
      )
    ),
    wrap(
      oracles.implicit(
        problem,
        solve=solve,
        warm_start=False,
        linear_batch=linear_batch,
        key=key,
      )
    ),
  ]

  def init_fn(params):
    return tuple(part.init(params) for part in parts)

  def update_fn(batch, state, params=None, **extra_args):
    (below, one), (above, two) = (
      part.update(batch, part_state, params, **extra_args)
      for part, part_state in zip(parts, state, strict=True)
    )
    both = _sequences.only(params, upper=above.upper, lower=below.lower)
    return both, (one, two)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sustain(
  problem: types.BilevelProblem,
  *,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  decay: types.ScalarOrSchedule,
  terms: int,
  step_size: float,
  randomly: bool = True,
  linear_batch: BatchAt | None = None,
  upper_set: projections.Projection | None = None,
  key: Any = 0,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
  r"""SUSTAIN: one loop, `storm` on the lower gradient and the hypergradient.

  .. math::
    d_k = G(z_k; \xi_k) + (1 - a_k) [d_{k-1} - G(z_{k-1}; \xi_k)], \qquad
    G = \left( \nabla_x f - \nabla_{xy} g \, q, \; \nabla_y g \right)

  with :math:`q` by a Neumann series of fixed or random length. Everything is
  evaluated twice, on one batch. The correction removes noise, not the bias of
  the series, which is then what the run ends at.

  Args:
    problem: the upper and the lower loss, the lower one strongly convex.
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable.
    decay: :math:`a_k` in [0, 1]; 1 for no correction.
    terms: bound of the random length, or products of the series.
    step_size: of the series, at most 1 / (largest lower curvature).
    randomly: whether the length is random, as in `bsa`.
    linear_batch: the batch of product t, from (batch, t).
    upper_set: projects the upper variable.
    key: PRNG key of the lengths, or a whole number.
    wrap: wraps each oracle, inside the correction.

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: if `terms` is too small or a constant decay not in [0, 1].

  Example:
    >>> import bilevel_jax as bj, optax
    >>> square = lambda x, y, batch: (x - y) ** 2
    >>> solver = bj.sustain(
    ...   bj.BilevelProblem(square, square), terms=5, step_size=0.4, decay=0.1,
    ...   upper=optax.sgd(0.1), lower=optax.sgd(0.1),
    ... )

  References:
    Khanduri, Zeng, Hong, Wai, Wang and Yang, `A Near-Optimal Algorithm for
    Stochastic Bilevel Optimization via Double-Momentum
    <https://arxiv.org/abs/2102.07367>`_, 2021.
  """
  make = linear_solvers.random_neumann if randomly else linear_solvers.neumann
  both = _lower_and_hypergradient(
    problem, make(terms, step_size), linear_batch, key, wrap
  )
  return optax.chain(
    evaluation.storm(both, decay),
    combinators.per_sequence(upper=upper, lower=lower),
    projections.project(upper=upper_set),
  )


def mrbo(
  problem: types.BilevelProblem,
  *,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  decay: types.ScalarOrSchedule,
  terms: int,
  step_size: float,
  linear_batch: BatchAt | None = None,
  upper_set: projections.Projection | None = None,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
  r"""MRBO: recursive momentum with a Neumann series of fixed length.

  `sustain` with a truncated series in place of one random term of it: twice the
  products, less noise for the correction to take out.

  Args:
    problem: as in `sustain`.
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable.
    decay: as in `sustain`.
    terms: products of the series.
    step_size: of the series.
    linear_batch: the batch of product t, from (batch, t).
    upper_set: projects the upper variable.
    wrap: wraps each oracle.

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: as in `sustain`.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> square = lambda x, y, batch: (x - y) ** 2
    >>> solver = bj.mrbo(
    ...   bj.BilevelProblem(square, square), terms=5, step_size=0.4, decay=0.1,
    ...   upper=optax.sgd(0.1), lower=optax.sgd(0.1),
    ... )

  References:
    Yang, Ji and Liang, `Provably Faster Algorithms for Bilevel Optimization
    <https://arxiv.org/abs/2106.04692>`_, 2021.
  """
  return sustain(
    problem,
    upper=upper,
    lower=lower,
    decay=decay,
    terms=terms,
    step_size=step_size,
    randomly=False,
    linear_batch=linear_batch,
    upper_set=upper_set,
    wrap=wrap,
  )


def vrbo(
  problem: types.BilevelProblem,
  *,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  terms: int,
  step_size: float,
  period: int,
  inner_steps: int,
  inner_batch: BatchAt | None = None,
  linear_batch: BatchAt | None = None,
  upper_set: projections.Projection | None = None,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
  r"""VRBO: recursive differences between fresh estimates, and an inner loop.

  In one update x moves once and y `inner_steps` times; both estimates follow
  each move by differences on one batch, and start anew every `period` moves,
  on the batch of that move: give it the size that its estimate needs.

  Args:
    problem: as in `sustain`.
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable.
    terms: products of the Neumann series.
    step_size: of the series.
    period: moves between two fresh estimates.
    inner_steps: moves of y in one update.
    inner_batch: the batch of move t, from (batch, t).
    linear_batch: the batch of product t, from (batch, t).
    upper_set: projects the upper variable.
    wrap: wraps each oracle.

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: if a whole number is too small.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> square = lambda x, y, batch: (x - y) ** 2
    >>> solver = bj.vrbo(
    ...   bj.BilevelProblem(square, square), terms=5, step_size=0.4,
    ...   period=6, inner_steps=3, upper=optax.sgd(0.1), lower=optax.sgd(0.1),
    ... )

  References:
    Yang, Ji and Liang, `Provably Faster Algorithms for Bilevel Optimization
    <https://arxiv.org/abs/2106.04692>`_, 2021.
  """
  if period < 1:
    raise ValueError(f'period is at least 1, got {period}.')
  both = _lower_and_hypergradient(
    problem, linear_solvers.neumann(terms, step_size), linear_batch, 0, wrap
  )
  fresh = lambda count: jnp.where(count % period == 0, 1.0, 0.0)
  # The last move of an update is x's: y's loop came before it.
  turn = lambda count: jnp.where((count + 1) % inner_steps == 0, 1.0, 0.0)
  above = optax.chain(upper, optax.scale_by_schedule(turn))
  move = optax.chain(
    evaluation.storm(both, fresh),
    combinators.per_sequence(upper=above, lower=lower),
    projections.project(upper=upper_set),
  )
  return combinators.repeat(move, inner_steps, inner_batch)
