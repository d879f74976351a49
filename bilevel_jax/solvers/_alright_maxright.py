"""ALRIGHT and MAXRIGHT: several losses, one of them in each update."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex

from bilevel_jax import evaluation, oracles, types
from bilevel_jax.oracles import base

# By objective, from the parameters to the structure of an auxiliary output.
Outputs = Mapping[str, Callable[[Any], Any]]


def _selected(method, losses, objectives, rule, outputs, batch_at, refresh_at):
  """An oracle that evaluates one of the losses, selected by a rule."""
  if callable(losses):
    raise TypeError(
      f'{method} takes a sequence of losses, one function for each objective: '
      'one function for all losses would evaluate all of them.'
    )
  losses = tuple(losses)
  names = tuple(objectives or (f'objective_{i}' for i in range(len(losses))))
  if len(set(names)) != len(losses) or len(names) != len(losses):
    raise ValueError(
      f'{method}: {len(losses)} losses take as many distinct names, got '
      f'{names}.'
    )
  if unknown := set(outputs or ()) - set(names):
    raise ValueError(
      f'{method}: outputs has the names {sorted(unknown)}, but the objectives '
      f'are {names}.'
    )
  requested = outputs or {}
  parts = {
    name: oracles.gradient(loss, name=name, outputs=requested.get(name))
    for name, loss in zip(names, losses)
  }
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
  outputs: Outputs | None = None,
) -> base.Oracle:
  r"""ALRIGHT: a step on one loss, drawn with the weights as probabilities.

  .. math::
    d_k = \nabla f_m(x_k; \xi^m) \quad \text{with probability } w_m

  In expectation it is the step on the weighted sum, at the time and memory of
  one loss. It is `select` with the rule `at_random`.

  Args:
    losses: functions of (parameters, own batch) to a scalar or to
      (scalar, auxiliary).
    objectives: their distinct names.
    weights: as in `bj.evaluation.at_random`; `[1 - share, share]` for two.
    key: as in `bj.evaluation.at_random`.
    even: as in `bj.evaluation.at_random`.
    batch_at: as in `bj.evaluation.select`; by default the batch is a tuple of
      one batch for each loss, or a dict by name.
    outputs: by the name of an objective, `outputs` of `bj.gradient` for the
      auxiliary output of its loss; by default these outputs are dropped.

  Returns:
    A transformation from a batch to one gradient; chain an optimiser to it.

  Raises:
    TypeError: if the losses are one function.
    ValueError: if names or weights are invalid, or `outputs` has other names.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> fit = lambda x, rows: jnp.mean((x - rows) ** 2)
    >>> solver = optax.chain(
    ...   bj.solvers.alright([fit, fit], weights=[0.75, 0.25], key=0),
    ...   optax.sgd(optax.linear_schedule(0.1, 0.0, 2000)),
    ... )
    >>> params, batch = jnp.float32(3.0), (jnp.zeros(2), jnp.ones(5))
    >>> params, _ = bj.testing.run(solver, params, 2000, batch)
    >>> print(params.round(1))  # 1/4, the minimiser of the weighted sum.
    0.2

  References:
    Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, `Understanding
    Forgetting in LLM Supervised Fine-Tuning and Preference Learning - A Convex
    Optimization Perspective <https://arxiv.org/abs/2410.15483>`_, 2024.
  """
  rule = evaluation.at_random(weights, key=key, even=even)
  return _selected('alright', losses, objectives, rule, outputs, batch_at, None)


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
  outputs: Outputs | None = None,
) -> base.Oracle:
  r"""MAXRIGHT: a step on the loss with the largest weighted gap.

  .. math::
    d_k = \nabla f_{m_k}(x_k; \xi^{m_k}), \qquad
    m_k = \arg\max_m w_m (\hat f_m - f_m^*)

  where :math:`\hat f_m` is the last evaluation of a loss. It minimises the
  largest gap, at the cost of one loss per update, and of all losses without
  gradients every `refresh_every` updates. It is `select` with the rule
  `largest_gap`.

  Args:
    losses: functions of (parameters, own batch) to a scalar or to
      (scalar, auxiliary).
    objectives: their distinct names.
    weights: as in `bj.evaluation.largest_gap`; `[1 - share, share]` for two.
    optima: as in `bj.evaluation.largest_gap`.
    refresh_every: as in `bj.evaluation.largest_gap`.
    share: as in `bj.evaluation.largest_gap`.
    batch_at: as in `bj.evaluation.select`; by default the batch is a tuple of
      one batch for each loss, or a dict by name.
    refresh_at: the batch for the evaluation of all losses, as in
      `bj.evaluation.select`.
    outputs: by the name of an objective, `outputs` of `bj.gradient` for the
      auxiliary output of its loss; by default these outputs are dropped.

  Returns:
    A transformation from a batch to one gradient; chain an optimiser to it.

  Raises:
    TypeError: if the losses are one function.
    ValueError: if names, weights or optima are invalid, or `outputs` has other
      names.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> near, far = lambda x, b: (x - 1) ** 2, lambda x, b: 4 * (x + 2) ** 2
    >>> solver = optax.chain(
    ...   bj.solvers.maxright([near, far], weights=[0.5, 0.5], optima=[0, 0]),
    ...   optax.sgd(optax.linear_schedule(0.05, 0.0, 1000)),
    ... )
    >>> start, batch = jnp.float32(3.0), (None, None)
    >>> params, _ = bj.testing.run(solver, start, 1000, batch)
    >>> print(params.round(1))  # Here both gaps are 4.
    -1.0

  References:
    Fernando, Shen, Ram, Zhou, Samulowitz, Baracaldo and Chen, `Understanding
    Forgetting in LLM Supervised Fine-Tuning and Preference Learning - A Convex
    Optimization Perspective <https://arxiv.org/abs/2410.15483>`_, 2024.
  """
  rule = evaluation.largest_gap(
    weights, optima=optima, refresh_every=refresh_every, share=share
  )
  return _selected(
    'maxright', losses, objectives, rule, outputs, batch_at, refresh_at
  )
