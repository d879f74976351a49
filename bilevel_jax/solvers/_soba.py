"""One loop, three coupled sequences: SOBA, SABA, MA-SOBA."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import (
  aggregators,
  combinators,
  evaluation,
  oracles,
  projections,
  types,
)
from bilevel_jax.solvers import _pbgd


def _three_sequences(directions, upper, lower, linear, upper_set, linear_set):
  """Steps along directions; the linear system's solution is kept in state."""
  moved = optax.chain(
    directions,
    combinators.per_sequence(
      upper=upper, lower=lower, linear=lower if linear is None else linear
    ),
    projections.project(upper=upper_set, linear=linear_set),
  )
  return combinators.auxiliary(
    moved, linear=lambda params: optax.tree.zeros_like(params.lower)
  )


def soba(
  problem: types.BilevelProblem,
  *,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  linear: optax.GradientTransformation | None = None,
  upper_set: projections.Projection | None = None,
  linear_set: projections.Projection | None = None,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
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
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable.
    linear: optimiser of :math:`v`; by default that of `lower`, as the same
      curvature bounds both steps.
    upper_set: projects the upper variable.
    linear_set: projects :math:`v`, onto a ball for instance, which some
      analyses ask for.
    wrap: wraps the oracle.

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
  directions = wrap(oracles.implicit_directions(problem))
  return _three_sequences(
    directions, upper, lower, linear, upper_set, linear_set
  )


def saba(
  problem: types.BilevelProblem,
  *,
  parts: int | tuple[int, int],
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  linear: optax.GradientTransformation | None = None,
  index: Callable[[Any], Any] | None = None,
  batches: Callable[[Any], tuple[Any, Any]] = lambda batch: (batch, batch),
  upper_set: projections.Projection | None = None,
  linear_set: projections.Projection | None = None,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
  r"""SABA: SOBA whose noise vanishes, by a memory of fixed batches.

  Each of SOBA's directions is corrected by what the same part of the data gave
  the last time, see `saga`. On finite data it converges with constant steps,
  linearly where the problem allows, at the price of a table of :math:`n`
  directions of all three sequences.

  Args:
    problem: the upper and the lower loss.
    parts: number :math:`n` of fixed batches that come; or a pair, of the upper
      and of the lower loss, if they draw theirs apart.
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable.
    linear: optimiser of the linear system, by default that of `lower`.
    index: from the batch, which part it is; for a pair, the two numbers. By
      default parts come in turn.
    batches: the upper's and the lower's batch, from the batch; by default both
      get the whole.
    upper_set: projects the upper variable.
    linear_set: projects the linear system's solution.
    wrap: wraps the oracle, inside the table.

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
  oracle = wrap(
    oracles.implicit_directions(problem, rows=rows, batches=batches)
  )
  if not rows:
    directions = evaluation.saga(oracle, parts, index=index)
  else:
    twice = lambda params: types.Jacobian(
      jax.tree.map(lambda z: jnp.stack([z, z]), params)
    )
    directions = optax.chain(
      evaluation.saga(oracle, parts, index=index, like=twice),
      aggregators.scale_by_penalty(1.0, rescale=False),
    )
  return _three_sequences(
    directions, upper, lower, linear, upper_set, linear_set
  )


def ma_soba(
  problem: types.BilevelProblem,
  *,
  averaging: float,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  linear: optax.GradientTransformation | None = None,
  upper_set: projections.Projection | None = None,
  linear_set: projections.Projection | None = None,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
  r"""MA-SOBA: SOBA with a running mean of the upper direction.

  .. math::
    h_{k+1} = (1 - \theta) h_k + \theta d^x_k, \qquad
    x_{k+1} = x_k - \gamma h_{k+1}

  The mean takes part of the noise off the upper direction, which lets the
  analysis do without smoothness beyond that of the gradients; on easy problems
  it changes little.

  Args:
    problem: the upper and the lower loss.
    averaging: :math:`\theta` in (0, 1]; 1 for SOBA.
    upper: optimiser of the upper variable; it gets the mean.
    lower: optimiser of the lower variable.
    linear: optimiser of the linear system, by default that of `lower`.
    upper_set: projects the upper variable.
    linear_set: projects the linear system's solution.
    wrap: wraps the oracle.

  Returns:
    A solver, as in `soba`.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> solver = bj.ma_soba(
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
  return soba(
    problem,
    upper=optax.chain(optax.ema(1 - averaging, debias=False), upper),
    lower=lower,
    linear=linear,
    upper_set=upper_set,
    linear_set=linear_set,
    wrap=wrap,
  )
