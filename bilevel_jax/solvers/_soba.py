"""One loop, three coupled sequences: SOBA, SABA, MA-SOBA."""

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
  """All three move at once, from one point."""
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
  r"""SOBA: the lower problem, its linear system and the upper problem at once.

  .. math::
    y_{k+1} &= y_k - \rho \nabla_y g(x_k, y_k) \\
    v_{k+1} &= v_k - \rho [ \nabla_{yy} g(x_k, y_k) v_k - \nabla_y f(x_k, y_k) ]
    \\
    x_{k+1} &= x_k - \gamma [ \nabla_x f(x_k, y_k)
      - \nabla_{xy} g(x_k, y_k) v_k ]

  Two gradients and one Hessian-vector product a step, no inner loop and no
  truncated series: its only bias is the lag of y and v, which smaller steps
  take away.

  Args:
    problem: the upper and the lower loss.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves; likewise.
    linear: how :math:`v` moves; by default by the optimiser of `lower`, as the
      same curvature bounds both steps. Some analyses ask for a `set`, a ball.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `upper` and `lower`,
    `bj.auxiliaries` the sequence `linear`.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> solver = bj.soba(problem, upper=optax.sgd(0.05), lower=optax.sgd(0.2))
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(200):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
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
  r"""SABA: SOBA whose noise vanishes, by a memory of fixed batches.

  Each of SOBA's directions is corrected by what the same part of the data gave
  the last time, see `saga`. On finite data it converges with constant steps,
  linearly where the problem allows, at the price of a table of :math:`n`
  directions of all three sequences.

  Args:
    problem: the upper and the lower loss.
    parts: number :math:`n` of fixed batches that come; or a pair, of the upper
      and of the lower loss, if they draw theirs apart.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves; likewise.
    linear: how the linear system moves; by default by the optimiser of `lower`.
    index: from the batch, which part it is; for a pair, the two numbers. By
      default parts come in turn.
    batches: the upper's and the lower's batch, from the batch; by default both
      get the whole.

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
    ...   params = optax.apply_updates(params, updates)
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

  The mean takes part of the noise off the upper direction, which lets the
  analysis do without smoothness beyond that of the gradients; on easy problems
  it changes little. The authors step along the mean of the iteration before,
  :math:`h_k`; here it already holds the new direction.

  Args:
    problem: the upper and the lower loss.
    averaging: :math:`\theta` in (0, 1]; 1 for SOBA.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves; likewise.
    linear: how the linear system moves; by default by the optimiser of `lower`.

  Returns:
    A solver, as in `soba`.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> solver = bj.solvers.ma_soba(
    ...   problem, averaging=0.5, upper=optax.sgd(0.05), lower=optax.sgd(0.2)
    ... )
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(200):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
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
