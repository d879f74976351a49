"""Descent of the upper loss through the steps of an inner optimiser."""

from typing import Any

import jax.numpy as jnp
import optax

from bilevel_jax import descent, oracles, types


def rhg(
  problem: types.BilevelProblem,
  *,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  truncate: int | None = None,
  mode: str = 'reverse',
  checkpoint: int | None = None,
  accumulator_dtype: Any = jnp.float32,
) -> descent.Solver:
  r"""RHG: descends the upper loss after T steps of the inner optimiser.

  .. math::
    y_{k+1} &= y_T(x_k) \quad \text{(T steps on } g(x_k, \cdot) \text{)} \\
    x_{k+1} &= \Pi_C [ x_k - \alpha \nabla_x f(x_k, y_T(x_k)) ]

  with the derivative through the steps. An update takes T gradients, T
  Hessian-vector products and the memory of T steps; `truncate`, `mode` and
  `checkpoint` reduce them, see `unrolled`.

  Args:
    problem: the upper and the lower loss.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: the inner optimiser, in a record with :math:`T` `steps`, for instance
      `bj.Sequence(optax.sgd(0.1), steps=10)`. Its moments restart in each
      update. By default the loop starts at the current lower variable (a warm
      start); the classical method starts at a fixed point, by the record's
      `start` and `restart=True`. Adam and other optimisers that divide by a
      root have no derivative at a gradient of exactly zero, for instance of a
      weight that no example uses: the upper variable is then NaN. Give them a
      constant under the root, `optax.adam(rate, eps_root=1e-8)`.
    truncate: the number :math:`K` of last steps that are differentiated, for
      T-RHG.
    mode: `reverse`; `mixed` for the same with less memory and time; `forward`
      for an upper variable of few coordinates. See `unrolled`.
    checkpoint: for `reverse` and `mixed`, the number of steps between saved
      inner states.
    accumulator_dtype: as in `unrolled`.

  Returns:
    A solver for `BilevelParams` that moves the lower variable to the end of
    the inner loop; `bj.values` gives `upper` and `lower`.

  Raises:
    ValueError: as `unrolled`; if `lower` has a start without a restart.
    TypeError: if the optimiser of `lower` needs more than gradients, for
      instance for a line search.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> sgd = optax.sgd(0.1)
    >>> solver = bj.rhg(
    ...   toy.problem, upper=sgd, lower=bj.Sequence(sgd, steps=10)
    ... )
    >>> params, _ = bj.testing.run(solver, toy.params, 100)
    >>> print(params.upper.round(2))
    [1. 1.]

  References:
    Maclaurin, Duvenaud and Adams, `Gradient-based Hyperparameter Optimization
    through Reversible Learning <https://arxiv.org/abs/1502.03492>`_, 2015.

    Franceschi, Donini, Frasconi and Pontil, `Forward and Reverse
    Gradient-Based Hyperparameter Optimization
    <https://arxiv.org/abs/1703.01785>`_, 2017.
  """
  oracle = oracles.unrolled(
    problem,
    lower=lower,
    mode=mode,
    truncate=truncate,
    checkpoint=checkpoint,
    accumulator_dtype=accumulator_dtype,
  )
  # The gradient of the lower variable is its displacement.
  return descent.descend(oracle, upper=upper, lower=optax.sgd(1.0))


def t_rhg(
  problem: types.BilevelProblem, *, truncate: int, **kwargs: Any
) -> descent.Solver:
  r"""T-RHG: `rhg` with a derivative through the last K inner steps only.

  .. math::
    \nabla_x f + \sum_{t = T - K}^{T - 1} \left[ \frac{\partial y_T}
      {\partial y_{t+1}} \frac{\partial y_{t+1}}{\partial x} \right]^\top
      \nabla_y f

  Args:
    problem: the upper and the lower loss.
    truncate: the number of steps :math:`K`; the error falls geometrically with
      K if the lower loss is strongly convex.
    **kwargs: further arguments of `rhg`.

  Returns:
    A solver for `BilevelParams`.

  Raises:
    ValueError: if a number of steps is below 1.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> solver = bj.t_rhg(
    ...   toy.problem, truncate=2, upper=optax.sgd(0.1),
    ...   lower=bj.Sequence(optax.sgd(0.1), steps=8),
    ... )
    >>> _, state = bj.testing.run(solver, toy.params, 1)
    >>> counts = bj.counts(state)
    >>> print(counts['gradients/lower'])
    8
    >>> print(counts['hessian_vector_products/lower'])
    2

  References:
    Shaban, Cheng, Hatch and Boots, `Truncated Back-propagation for Bilevel
    Optimization <https://arxiv.org/abs/1810.10667>`_, 2019.
  """
  return rhg(problem, truncate=truncate, **kwargs)
