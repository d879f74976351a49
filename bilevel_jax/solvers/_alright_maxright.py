"""ALRIGHT and MAXRIGHT: several losses, a step on one of them at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import chex

from bilevel_jax import evaluation, oracles, types
from bilevel_jax.oracles import base


def _selected(method, losses, objectives, rule, batch_at, refresh_at=None):
  """An oracle that takes one of the losses, by a rule."""
  if callable(losses):
    raise TypeError(
      f'{method} takes a sequence of losses, one function for each objective: '
      'a function to all of them evaluates all of them.'
    )
  losses = tuple(losses)
  names = tuple(objectives or (f'objective_{i}' for i in range(len(losses))))
  if len(set(names)) != len(losses) or len(names) != len(losses):
    raise ValueError(
      f'{method}: {len(losses)} losses take as many distinct names, got '
      f'{names}.'
    )
  parts = {n: oracles.gradient(f, name=n) for n, f in zip(names, losses)}
  return evaluation.select(
    parts, rule, batch_at=batch_at, refresh_at=refresh_at
  )


def alright(
  losses: Sequence[Callable[[Any, Any], Any]],
  objectives: Sequence[str] | None = None,
  *,
  weights: Sequence[float] | chex.Array | Callable[[Any], Any],
  key: Any,
  even: bool = False,
  batch_at: Any = None,
) -> base.Oracle:
  r"""ALRIGHT: a step on one loss, drawn by the weights; the price of one.

  .. math::
    d_k = \nabla f_m(x_k; \xi^m) \quad \text{with probability } w_m

  In expectation the step on the weighted sum, without the other losses'
  gradients or memory. It is `select` with the rule `at_random`.

  Args:
    losses: functions of (parameters, own batch) to a scalar, or to
      (scalar, auxiliary).
    objectives: their names, distinct.
    weights: as in `bj.evaluation.at_random`; `[1 - share, share]` for two.
    key: likewise.
    even: likewise.
    batch_at: as in `bj.evaluation.select`; by default the batch is a tuple of
      one batch for each loss, or a dict by name.

  Returns:
    A transformation from a batch to one gradient; chain an optimiser to it.

  Raises:
    TypeError: if the losses are one function.
    ValueError: if names or weights are not what they should be.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> fit = lambda x, rows: jnp.mean((x - rows) ** 2)
    >>> solver = optax.chain(
    ...   bj.solvers.alright([fit, fit], weights=[0.75, 0.25], key=0),
    ...   optax.sgd(optax.linear_schedule(0.1, 0.0, 2000)),
    ... )
    >>> params, batch = jnp.float32(3.0), (jnp.zeros(2), jnp.ones(5))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(2000):
    ...   updates, state = step(batch, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.round(1))  # 1/4, the minimiser of the weighted sum.
    0.2

  References:
    Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, `Understanding
    Forgetting in LLM Supervised Fine-Tuning and Preference Learning - A Convex
    Optimization Perspective <https://arxiv.org/abs/2410.15483>`_, 2024.
  """
  rule = evaluation.at_random(weights, key=key, even=even)
  return _selected('alright', losses, objectives, rule, batch_at)


def maxright(
  losses: Sequence[Callable[[Any, Any], Any]],
  objectives: Sequence[str] | None = None,
  *,
  weights: Sequence[float] | chex.Array | Callable[[Any], Any],
  optima: Sequence[float] | chex.Array | str,
  refresh_every: int | None = 10,
  share: types.ScalarOrSchedule = 1.0,
  batch_at: Any = None,
  refresh_at: Any = None,
) -> base.Oracle:
  r"""MAXRIGHT: a step on the loss with the largest weighted gap.

  .. math::
    d_k = \nabla f_{m_k}(x_k; \xi^{m_k}), \qquad
    m_k = \arg\max_m w_m (\hat f_m - f_m^*)

  where :math:`\hat f_m` is what was last seen of a loss. It goes for the least
  largest gap, at the price of one loss an update and of all of them, without
  gradients, every so often. It is `select` with the rule `largest_gap`.

  Args:
    losses: functions of (parameters, own batch) to a scalar, or to
      (scalar, auxiliary).
    objectives: their names, distinct.
    weights: as in `bj.evaluation.largest_gap`; `[1 - share, share]` for two.
    optima: likewise.
    refresh_every: likewise.
    share: likewise.
    batch_at: as in `bj.evaluation.select`; by default the batch is a tuple of
      one batch for each loss, or a dict by name.
    refresh_at: likewise, what all losses are evaluated on.

  Returns:
    A transformation from a batch to one gradient; chain an optimiser to it.

  Raises:
    TypeError: if the losses are one function.
    ValueError: if names, weights or optima are not what they should be.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> near, far = lambda x, b: (x - 1) ** 2, lambda x, b: 4 * (x + 2) ** 2
    >>> solver = optax.chain(
    ...   bj.solvers.maxright([near, far], weights=[0.5, 0.5], optima=[0, 0]),
    ...   optax.sgd(optax.linear_schedule(0.05, 0.0, 1000)),
    ... )
    >>> params = jnp.float32(3.0)
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(1000):
    ...   updates, state = step((None, None), state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.round(1))  # Where both gaps are 4.
    -1.0

  References:
    Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, `Understanding
    Forgetting in LLM Supervised Fine-Tuning and Preference Learning - A Convex
    Optimization Perspective <https://arxiv.org/abs/2410.15483>`_, 2024.
  """
  rule = evaluation.largest_gap(
    weights, optima=optima, refresh_every=refresh_every, share=share
  )
  return _selected('maxright', losses, objectives, rule, batch_at, refresh_at)
