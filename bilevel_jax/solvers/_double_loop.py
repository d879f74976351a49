"""Stochastic implicit differentiation: BSA, TTSA, stocBiO, ALSET, AmIGO.

All are `aid_bilevel` with a linear solver and loops of their own.
"""

from collections.abc import Callable
from typing import Any

import optax

from bilevel_jax import linear_solvers, projections, types
from bilevel_jax.solvers import _aid, _pbgd

BatchAt = Callable[[Any, Any], Any]


def bsa(
  problem: types.BilevelProblem,
  *,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  terms: int,
  step_size: float,
  inner_steps: int = 10,
  inner_batch: BatchAt | None = None,
  linear_batch: BatchAt | None = None,
  upper_set: projections.Projection | None = None,
  key: Any = 0,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
  r"""BSA: an inner loop, then one random term of the Neumann series.

  .. math::
    y &\leftarrow y - \beta \nabla_y g(x_k, y) \quad \text{(T times)} \\
    x_{k+1} &= x_k - \alpha \left( \nabla_x f - \nabla_{xy} g \,
      \eta N \prod_{n=1}^{N'} (I - \eta \nabla_{yy} g) \nabla_y f \right),
    \qquad N' \sim \{0, \dots, N - 1\}

  On average it takes half the products of a truncated series with the same
  bias, at the price of noise.

  Args:
    problem: the upper and the lower loss, the lower one strongly convex.
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable.
    terms: :math:`N`; the bias falls geometrically with it.
    step_size: :math:`\eta`, at most 1 / (largest lower curvature).
    inner_steps: :math:`T`; let it grow along a run by several solvers, as the
      analysis does, or keep it.
    inner_batch: the batch of inner step t, from (batch, t).
    linear_batch: the batch of product t, from (batch, t).
    upper_set: projects the upper variable.
    key: PRNG key of the lengths, or a whole number.
    wrap: wraps each oracle.

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: if `terms` or `inner_steps` is below 1.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> square = lambda x, y, batch: (x - y) ** 2
    >>> solver = bj.bsa(
    ...   bj.BilevelProblem(square, square), terms=5, step_size=0.4,
    ...   upper=optax.sgd(0.1), lower=optax.sgd(0.1),
    ... )

  References:
    Ghadimi and Wang, `Approximation Methods for Bilevel Programming
    <https://arxiv.org/abs/1802.02246>`_, 2018.
  """
  return _aid.aid_bilevel(
    problem,
    upper=upper,
    lower=lower,
    solve=linear_solvers.random_neumann(terms, step_size),
    inner_steps=inner_steps,
    inner_batch=inner_batch,
    linear_batch=linear_batch,
    upper_set=upper_set,
    warm_start=False,
    key=key,
    wrap=wrap,
  )


def ttsa(
  problem: types.BilevelProblem,
  *,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  terms: int,
  step_size: float,
  linear_batch: BatchAt | None = None,
  upper_set: projections.Projection | None = None,
  key: Any = 0,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
  r"""TTSA: one lower step an update, on a faster timescale.

  The steps of `bsa` with one inner step; the lower variable keeps up because
  its steps fall more slowly: :math:`\alpha_k \sim k^{-3/5}` above and
  :math:`\beta_k \sim k^{-2/5}` below, by `power_schedule`.

  Args:
    problem: as in `bsa`.
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable.
    terms: as in `bsa`.
    step_size: as in `bsa`.
    linear_batch: as in `bsa`.
    upper_set: projects the upper variable.
    key: as in `bsa`.
    wrap: wraps each oracle.

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: if `terms` is below 1.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> square = lambda x, y, batch: (x - y) ** 2
    >>> solver = bj.ttsa(
    ...   bj.BilevelProblem(square, square), terms=5, step_size=0.4,
    ...   upper=optax.sgd(bj.power_schedule(0.1, 0.6)),
    ...   lower=optax.sgd(bj.power_schedule(0.3, 0.4)),
    ... )

  References:
    Hong, Wai, Wang and Yang, `A Two-Timescale Framework for Bilevel
    Optimization <https://arxiv.org/abs/2007.05170>`_, 2020.
  """
  return bsa(
    problem,
    upper=upper,
    lower=lower,
    terms=terms,
    step_size=step_size,
    inner_steps=1,
    linear_batch=linear_batch,
    upper_set=upper_set,
    key=key,
    wrap=wrap,
  )


def stocbio(
  problem: types.BilevelProblem,
  *,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  terms: int,
  step_size: float,
  inner_steps: int = 10,
  inner_batch: BatchAt | None = None,
  linear_batch: BatchAt | None = None,
  upper_set: projections.Projection | None = None,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
  r"""StocBiO: an inner loop from where the last ended, then a Neumann series.

  .. math::
    q = \eta \sum_{n=0}^{N} \prod_{m=1}^{n} (I - \eta \nabla_{yy} g_m)
      \nabla_y f

  with fresh samples in each product, if `linear_batch` gives them. Less noise
  than one random term, at twice the products.

  Args:
    problem: as in `bsa`.
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable.
    terms: :math:`N`, products of the series.
    step_size: :math:`\eta`.
    inner_steps: lower steps in one update.
    inner_batch: the batch of inner step t, from (batch, t).
    linear_batch: the batch of product t, from (batch, t).
    upper_set: projects the upper variable.
    wrap: wraps each oracle.

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: if `terms` is negative or `inner_steps` below 1.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> square = lambda x, y, batch: (x - y) ** 2
    >>> solver = bj.stocbio(
    ...   bj.BilevelProblem(square, square), terms=5, step_size=0.4,
    ...   upper=optax.sgd(0.1), lower=optax.sgd(0.1),
    ... )

  References:
    Ji, Yang and Liang, `Bilevel Optimization: Convergence Analysis and Enhanced
    Design <https://arxiv.org/abs/2010.07962>`_, 2021.
  """
  return _aid.aid_bilevel(
    problem,
    upper=upper,
    lower=lower,
    solve=linear_solvers.neumann(terms, step_size),
    inner_steps=inner_steps,
    inner_batch=inner_batch,
    linear_batch=linear_batch,
    upper_set=upper_set,
    warm_start=False,
    wrap=wrap,
  )


def alset(
  problem: types.BilevelProblem,
  *,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  terms: int,
  step_size: float,
  inner_steps: int = 1,
  inner_batch: BatchAt | None = None,
  linear_batch: BatchAt | None = None,
  upper_set: projections.Projection | None = None,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
  r"""ALSET: alternating steps of one order, a constant number of lower ones.

  `stocbio` with one lower step by default: the smoothness of the lower
  solution in x makes steps of one order enough, :math:`\alpha_k \sim \beta_k`.

  Args:
    problem: as in `bsa`.
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable; its steps of the order of the
      upper's.
    terms: products of the Neumann series.
    step_size: its step.
    inner_steps: lower steps in one update, a constant.
    inner_batch: the batch of inner step t, from (batch, t).
    linear_batch: the batch of product t, from (batch, t).
    upper_set: projects the upper variable.
    wrap: wraps each oracle.

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: if `terms` is negative or `inner_steps` below 1.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> square = lambda x, y, batch: (x - y) ** 2
    >>> solver = bj.alset(
    ...   bj.BilevelProblem(square, square), terms=5, step_size=0.4,
    ...   upper=optax.sgd(0.1), lower=optax.sgd(0.1),
    ... )

  References:
    Chen, Sun and Yin, `Closing the Gap: Tighter Analysis of Alternating
    Stochastic Gradient Methods for Bilevel Problems
    <https://arxiv.org/abs/2106.13781>`_, 2021.
  """
  return stocbio(
    problem,
    upper=upper,
    lower=lower,
    terms=terms,
    step_size=step_size,
    inner_steps=inner_steps,
    inner_batch=inner_batch,
    linear_batch=linear_batch,
    upper_set=upper_set,
    wrap=wrap,
  )


def amigo(
  problem: types.BilevelProblem,
  *,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  linear_steps: int,
  step_size: float,
  inner_steps: int = 10,
  inner_batch: BatchAt | None = None,
  linear_batch: BatchAt | None = None,
  upper_set: projections.Projection | None = None,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
  r"""AmIGO: inner loops for the lower problem and for its linear system.

  .. math::
    q \leftarrow q - \eta (\nabla_{yy} g \, q - \nabla_y f)
    \quad \text{(M times, from the last } q \text{)}

  Both start from where they ended, so that a few steps of each do, and no
  truncated series leaves a bias.

  Args:
    problem: as in `bsa`.
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable.
    linear_steps: :math:`M`.
    step_size: :math:`\eta`.
    inner_steps: lower steps in one update.
    inner_batch: the batch of inner step t, from (batch, t).
    linear_batch: the batch of linear step t, from (batch, t).
    upper_set: projects the upper variable.
    wrap: wraps each oracle.

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: if `linear_steps` is negative or `inner_steps` below 1.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> square = lambda x, y, batch: (x - y) ** 2
    >>> solver = bj.amigo(
    ...   bj.BilevelProblem(square, square), linear_steps=5, step_size=0.4,
    ...   upper=optax.sgd(0.1), lower=optax.sgd(0.1),
    ... )

  References:
    Arbel and Mairal, `Amortized Implicit Differentiation for Stochastic Bilevel
    Optimization <https://arxiv.org/abs/2111.14580>`_, 2021.
  """
  return _aid.aid_bilevel(
    problem,
    upper=upper,
    lower=lower,
    solve=linear_solvers.neumann(linear_steps, step_size),
    inner_steps=inner_steps,
    inner_batch=inner_batch,
    linear_batch=linear_batch,
    upper_set=upper_set,
    warm_start=True,
    wrap=wrap,
  )
