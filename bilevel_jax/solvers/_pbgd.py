"""Penalty-based bilevel gradient descent: value gap and gradient norm."""

from collections.abc import Callable
from typing import Any

import optax

from bilevel_jax import aggregators, combinators, oracles, projections, types
from bilevel_jax.oracles import _oracle

Wrapper = Callable[
  [optax.GradientTransformationExtraArgs],
  optax.GradientTransformationExtraArgs,
]


def same(oracle: optax.GradientTransformationExtraArgs):
  """Wraps an oracle in nothing."""
  return oracle


def _penalised_descent(oracle, wrap, penalty, rescale, fused, *links):
  """Chains an oracle of two rows, or its fused form, with what comes after."""
  if fused:
    return optax.chain(wrap(oracle(penalty=penalty, rescale=rescale)), *links)
  weigh = aggregators.scale_by_penalty(penalty, rescale=rescale)
  return optax.chain(wrap(oracle()), weigh, *links)


def follow_value(
  problem: types.BilevelProblem,
  value: optax.GradientTransformation,
  lower_set: projections.Projection | None = None,
  wrap: Wrapper = same,
  proximity: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  """One step of the value sequence towards the lower loss's minimiser."""
  below = _oracle.scalar_loss(problem.lower, 'lower')

  def loss(params, batch):
    here = below(params.upper, params.value, batch)
    if proximity is None:
      return here
    away = optax.tree.sub(params.value, params.lower)
    return here + optax.tree.norm(away, squared=True) / (2 * proximity)

  return optax.chain(
    wrap(
      oracles.gradient(
        loss,
        name='value',
        of='value',
        counts_as='lower',
      )
    ),
    combinators.per_sequence(value=value),
    projections.project(value=lower_set),
  )


def descend_gap(
  problem: types.BilevelProblem,
  penalty: types.ScalarOrSchedule,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  upper_set: projections.Projection | None,
  lower_set: projections.Projection | None,
  rescale: bool,
  fused: bool,
  wrap: Wrapper,
  proximity: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  """One step of both variables on the upper loss plus the value gap."""
  return _penalised_descent(
    lambda **kwargs: oracles.value_gap(problem, proximity=proximity, **kwargs),
    wrap,
    penalty,
    rescale,
    fused,
    combinators.per_sequence(upper=upper, lower=lower),
    projections.project(upper=upper_set, lower=lower_set),
  )


def v_pbgd(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  value: optax.GradientTransformation | None = None,
  inner_steps: int = 1,
  inner_batch: Callable[[Any, Any], Any] | None = None,
  upper_set: projections.Projection | None = None,
  lower_set: projections.Projection | None = None,
  start: str = 'persistent',
  rescale: bool = True,
  fused: bool = True,
  wrap: Wrapper = same,
) -> optax.GradientTransformationExtraArgs:
  r"""V-PBGD: descends the upper loss plus a multiple of the lower value gap.

  With a third sequence :math:`w` that follows the lower loss's minimiser,

  .. math::
    w_{k+1} &= w_k - \beta \nabla_y g(x_k, w_k) \quad \text{(T times)} \\
    d_k &= c_k \, [ \nabla f(x_k, y_k)
      + \gamma_k (\nabla g(x_k, y_k) - (\nabla_x g(x_k, w_{k+1}), 0)) ] \\
    (x, y)_{k+1} &= \Pi [ (x, y)_k - \alpha d_k ], \qquad
    c_k = \min(1 / \gamma_k, 1)

  First-order only. It asks of the lower loss that its gradient vanishes only at
  minimisers (the Polyak-Lojasiewicz inequality), not that it is convex. The
  result has a gap of the order :math:`1 / \gamma^2`, in a number of steps that
  grows with :math:`\gamma`.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`; a constant, or a schedule from the number
      of updates so far. A linear ramp from 0 helps where the lower start is
      poor.
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable.
    value: optimiser of the value sequence; by default the one of `lower`.
    inner_steps: steps :math:`T` of the value sequence in one update.
    inner_batch: the batch of inner step t, from (batch, t); by default the
      whole batch.
    upper_set: projects the upper variable, for instance a
      `functools.partial` of a function in `optax.projections`.
    lower_set: projects the lower variable and, in each inner step, the value
      sequence.
    start: `persistent` keeps the value sequence from update to update, as
      the authors' experiments do; `lower` starts it from the lower variable
      in each, as their analysis does.
    rescale: whether to multiply by :math:`c_k`.
    fused: one scalar loss and one backward pass; False for the same updates by
      two rows and `scale_by_penalty`, which shows how to put another aggregator
      in.
    wrap: wraps each oracle, for instance `lambda o: bj.accumulate(o, 4)`.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `value`, `upper`, `lower`,
    `gap`, and `bj.auxiliaries` the value sequence.

  Raises:
    ValueError: if the penalty is negative, a set has no point in it, `start`
      is unknown or `inner_steps` is below 1.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> sgd = optax.sgd(0.1)
    >>> solver = bj.v_pbgd(problem, penalty=10.0, upper=sgd, lower=sgd)
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(1000):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.upper.round(2))
    [1. 1.]

  References:
    Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method
    <https://arxiv.org/abs/2302.05185>`_, 2023.
  """
  if start not in ('persistent', 'lower'):
    raise ValueError(f"start is 'persistent' or 'lower', got {start!r}.")
  follow = follow_value(
    problem, lower if value is None else value, lower_set, wrap
  )
  descend = descend_gap(
    problem, penalty, upper, lower, upper_set, lower_set, rescale, fused, wrap
  )
  # The value sequence moves first: the gap is taken at its new value.
  return combinators.auxiliary(
    combinators.alternate(
      combinators.repeat(follow, inner_steps, inner_batch), descend
    ),
    restart=('value',) if start == 'lower' else (),
    value=lambda params: params.lower,
  )


def g_pbgd(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  upper_set: projections.Projection | None = None,
  lower_set: projections.Projection | None = None,
  rescale: bool = True,
  fused: bool = True,
  wrap: Wrapper = same,
) -> optax.GradientTransformationExtraArgs:
  r"""G-PBGD: descends the upper loss plus a multiple of the lower slope.

  .. math::
    (x, y)_{k+1} = \Pi \left[ (x, y)_k - \alpha c_k \nabla \left(
      f + \tfrac{\gamma_k}{2} \| \nabla_y g \|^2 \right)(x_k, y_k) \right],
      \qquad c_k = \min(1 / \gamma_k, 1)

  One loop and no added sequence, one Hessian-vector product a step. It can stay
  at points that solve nothing, where the lower loss is not convex: see
  `gradient_norm`. A lower set changes where the lower loss is stationary, which
  the penalty does not know: with `lower_set`, it is right only for minimisers
  inside the set.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule.
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable.
    upper_set: projects the upper variable.
    lower_set: projects the lower variable.
    rescale: whether to multiply by :math:`c_k`.
    fused: as in `v_pbgd`.
    wrap: as in `v_pbgd`.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `upper`, `lower`,
    `penalty`, the half squared norm of the slope.

  Raises:
    ValueError: if the penalty is negative or a set has no point in it.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> sgd = optax.sgd(0.1)
    >>> solver = bj.g_pbgd(problem, penalty=10.0, upper=sgd, lower=sgd)
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(1000):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.upper.round(2))
    [1. 1.]

  References:
    Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method
    <https://arxiv.org/abs/2302.05185>`_, 2023.
  """
  return _penalised_descent(
    lambda **kwargs: oracles.gradient_norm(problem, **kwargs),
    wrap,
    penalty,
    rescale,
    fused,
    combinators.per_sequence(upper=upper, lower=lower),
    projections.project(upper=upper_set, lower=lower_set),
  )
