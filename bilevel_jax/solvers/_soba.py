"""SOBA, SABA and MA-SOBA: one loop of three coupled sequences."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import (
  _checks,
  aggregators,
  descent,
  evaluation,
  oracles,
  types,
)


def _three_sequences(directions, upper, lower, linear):
  """Moves all three sequences at once."""
  low = types.as_sequence(lower, 'lower')
  return descent.descend(
    directions,
    upper=upper,
    lower=low,
    linear=types.linear_sequence(linear, low),
  )


def soba(
  problem: types.BilevelProblem,
  *,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  linear: types.SequenceLike | None = None,
) -> descent.Solver:
  r"""SOBA: steps of the lower variable, the linear system and x at once.

  .. math::
    y_{k+1} &= y_k - \rho \nabla_y g(x_k, y_k) \\
    v_{k+1} &= v_k - \rho [ \nabla_{yy} g(x_k, y_k) v_k - \nabla_y f(x_k, y_k) ]
    \\
    x_{k+1} &= x_k - \gamma [ \nabla_x f(x_k, y_k)
      - \nabla_{xy} g(x_k, y_k) v_k ]

  A step takes two gradients and one Hessian-vector product, without an inner
  loop and without a truncated series. The only bias is the lag of y and v,
  which vanishes with the step size.

  Args:
    problem: the upper and the lower loss.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`.
    linear: how :math:`v` moves; by default with the optimiser of `lower`, as
      the same curvature bounds both steps. Some analyses need a ball as its
      `set`.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `upper` and `lower`,
    `bj.auxiliaries` the sequence `linear`.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> solver = bj.soba(
    ...   toy.problem, upper=optax.sgd(0.05), lower=optax.sgd(0.2)
    ... )
    >>> params, _ = bj.testing.run(solver, toy.params, 200)
    >>> print(params.upper.round(2))
    [1. 1.]

  References:
    Dagreou, Ablin, Vaiter and Moreau, `A framework for bilevel optimization
    that enables stochastic and global variance reduction algorithms
    <https://arxiv.org/abs/2201.13409>`_, 2022.
  """
  directions = oracles.implicit_directions(problem)
  return _three_sequences(directions, upper, lower, linear)


def saba(
  problem: types.BilevelProblem,
  *,
  parts: int | tuple[int, int],
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  linear: types.SequenceLike | None = None,
  index: Callable[[Any], Any] | None = None,
  batches: Callable[[Any], tuple[Any, Any]] = lambda batch: (batch, batch),
) -> descent.Solver:
  r"""SABA: SOBA with variance reduction by a table, for finite data.

  Each direction of SOBA is corrected by the last direction of the same part of
  the data, see `saga`. On finite data it converges with constant steps, and
  linearly if the problem allows. It needs a table of :math:`n` directions of
  all three sequences.

  Args:
    problem: the upper and the lower loss.
    parts: the number :math:`n` of fixed batches; or a pair, if the upper and
      the lower loss draw their batches independently.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`.
    linear: how the linear system moves; by default with the optimiser of
      `lower`.
    index: from the batch to the number of its part, or to a pair of numbers. By
      default the parts come in turn.
    batches: from the batch to the batches of the upper and of the lower loss;
      by default both get the whole batch.

  Returns:
    A solver, as in `soba`.

  Raises:
    ValueError: if `parts` is below 1.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - batch) ** 2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x + batch) ** 2),
    ... )
    >>> sgd = optax.sgd(0.05)
    >>> solver = bj.saba(problem, parts=2, upper=sgd, lower=sgd)
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for k in range(800):
    ...   batch = jnp.float32(2 * (k % 2))  # 0, 2, 0, ...: the mean is 1
    ...   updates, state = step(batch, state, params)
    ...   params = bj.apply_updates(params, updates)
    >>> print(params.upper.round(3), params.lower.round(3))
    [2. 2.] [1. 1.]

  References:
    Dagreou, Ablin, Vaiter and Moreau, `A framework for bilevel optimization
    that enables stochastic and global variance reduction algorithms
    <https://arxiv.org/abs/2201.13409>`_, 2022.
  """
  rows = isinstance(parts, tuple)
  oracle = oracles.implicit_directions(problem, rows=rows, batches=batches)
  if not rows:
    directions = evaluation.saga(oracle, parts, index=index)
  else:
    twice = lambda params: types.Jacobian(
      jax.tree.map(lambda z: jnp.stack([z, z]), params)
    )
    directions = oracles.aggregated(
      evaluation.saga(oracle, parts, index=index, like=twice),
      aggregators.scale_by_penalty(1.0, rescale=False),
    )
  return _three_sequences(directions, upper, lower, linear)


def ma_soba(
  problem: types.BilevelProblem,
  *,
  averaging: float,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  linear: types.SequenceLike | None = None,
) -> descent.Solver:
  r"""MA-SOBA: SOBA with a running mean of the upper direction.

  .. math::
    h_{k+1} = (1 - \theta) h_k + \theta d^x_k, \qquad
    x_{k+1} = x_k - \gamma h_{k+1}

  The mean reduces the noise of the upper direction, so that the analysis needs
  no smoothness beyond that of the gradients; on easy problems it changes
  little. The authors step along the previous mean :math:`h_k`; here the mean
  includes the new direction.

  Args:
    problem: the upper and the lower loss.
    averaging: :math:`\theta` in (0, 1]; 1 for SOBA.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`.
    linear: how the linear system moves; by default with the optimiser of
      `lower`.

  Returns:
    A solver, as in `soba`.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy, sgd = bj.testing.toy_problem(), optax.sgd
    >>> solver = bj.solvers.ma_soba(
    ...   toy.problem, averaging=0.5, upper=sgd(0.05), lower=sgd(0.2)
    ... )
    >>> params, _ = bj.testing.run(solver, toy.params, 200)
    >>> print(params.upper.round(2))
    [1. 1.]

  References:
    Chen, Xiao and Balasubramanian, `Optimal Algorithms for Stochastic Bilevel
    Optimization under Relaxed Smoothness Conditions
    <https://arxiv.org/abs/2306.12067>`_, 2023.
  """
  _checks.within('ma_soba', 'the averaging', averaging, 0, 1, open_low=True)
  above = types.as_sequence(upper, 'upper')
  mean = optax.ema(1 - averaging, debias=False)
  return soba(
    problem,
    upper=above._replace(optimiser=optax.chain(mean, above.optimiser)),
    lower=lower,
    linear=linear,
  )
