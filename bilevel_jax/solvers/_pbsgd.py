"""V-PBSGD: value-gap descent with a randomly stopped inner loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import (
  _checks,
  _keys,
  _sequences,
  _trees,
  descent,
  oracles,
  states,
  types,
)
from bilevel_jax.oracles import base
from bilevel_jax.projections import _set


class RandomStop(NamedTuple):
  r"""The inner loop of `v_pbsgd`: decreasing steps, stopped at random.

  Attributes:
    rate: :math:`\beta`, the first step size. The analysis takes the inverse of
      the lower loss's curvature in y (see `suggest`). A constant, or a schedule
      from the number of updates so far.
    steps: the number of steps :math:`T`; their error falls as
      :math:`\ln T / \sqrt T`.
    key: PRNG key of the random stops, or a whole number.
    batch_at: the batch of step t, from (batch, t), t an int32 scalar from 0; by
      default the whole batch.
  """

  rate: types.ScalarOrSchedule
  steps: int
  key: Any
  batch_at: Callable[[Any, Any], Any] | None = None


def _displacement(problem, loop, lower_set):
  """The displacement to the random stop of a loop of decreasing steps.

  All steps are taken, so that time and counts do not depend on the random stop.
  """
  rate, steps, key, batch_at = loop
  _set.require_projection(lower_set, 'v_pbsgd')
  _, below = base.checked_losses(problem)
  pick = batch_at or (lambda batch, t: batch)
  shares = jnp.log(1 / jnp.sqrt(1.0 + jnp.arange(steps)))

  def init(params):
    del params
    return states.no_updates(), _keys.as_key(key, 'v_pbsgd')

  def displacement(mean, params, batch, inner):
    updates, key = inner
    following, now = jax.random.split(key)
    stop = jax.random.categorical(now, shares)
    first = rate(updates.count) if callable(rate) else rate
    start = params.value
    zero = jnp.zeros([], _trees.widest_dtype(start))

    def step(carry, t):
      here, chosen, _ = carry
      value, slope = mean.of(
        lambda part, *at: jax.value_and_grad(below, 1)(*at, part),
        pick(batch, t),
        params.upper,
        here,
      )
      here = _trees.add_scaled(here, -first / jnp.sqrt(1.0 + t), slope)
      if lower_set is not None:
        here = _set.nearest(lower_set, here, params)
      keep = lambda new, old: jnp.where(t == stop, new, old)
      value = value.astype(zero.dtype)
      return (here, jax.tree.map(keep, here, chosen), value), None

    (_, chosen, last), _ = jax.lax.scan(
      step, (start, start, zero), jnp.arange(steps, dtype=jnp.int32)
    )
    moved = optax.tree.sub(start, chosen)
    gradients = _sequences.only(params, value=moved)
    return (last,), gradients, (updates.next(), following)

  return base.oracle(
    base.ByMean(displacement),
    ('value',),
    init,
    counts={'gradients/lower': steps},
    moves=('value',),
    needs=('upper', 'value'),
  )


@_checks.regrouped(
  'value',
  RandomStop,
  value_rate='rate',
  inner_steps='steps',
  key='key',
  inner_batch='batch_at',
)
def v_pbsgd(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  value: RandomStop,
  rescale: bool = True,
) -> descent.Solver:
  r"""V-PBSGD: V-PBGD for samples, as in its analysis.

  In each update, :math:`w_1 = y_k` and, with samples :math:`\xi_t`,

  .. math::
    w_{t+1} &= \Pi_U [ w_t - \beta_t \nabla_y g(x_k, w_t; \xi_t) ], \qquad
    \beta_t = \frac{\beta}{\sqrt t}, \quad t = 1, \dots, T \\
    \hat y &= w_{\tau + 1}, \qquad P(\tau = t) \propto \beta_t \\
    d_k &= \frac{c_k}{M} \sum_{i=1}^{M} \left[ \nabla f(z_k; \xi^i)
      + \gamma_k ( \nabla g(z_k; \xi^i)
      - (\nabla_x g(x_k, \hat y; \xi^i), 0) ) \right], \quad z = (x, y) \\
    z_{k+1} &= \Pi_{C \times U} [ z_k - \alpha d_k ]

  Decreasing inner steps average the noise of the inner samples. In expectation,
  the random stop is as good as the weighted average of all points, but it does
  not need convexity. The noise of the outer samples is multiplied by
  :math:`\gamma`; its variance falls as 1 / M.

  Batches: the losses are means over the samples of their batch. The inner step
  t gets the batch of `value.batch_at`; the outer step gets the whole batch for
  both losses. So put the M outer and the T inner samples into one batch, for
  instance `{'outer': (M, ...), 'inner': (T, m, ...)}` with
  `batch_at=lambda batch, t: {'outer': batch['inner'][t]}` and losses that read
  `batch['outer']`. If M samples do not fit in memory, `bj.evaluation.wrapped`
  with `lambda o: bj.evaluation.accumulate(o, parts)` evaluates them in parts.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves, an optax optimiser or a `Sequence`.
    value: the inner loop of the value sequence :math:`w`.
    rescale: whether to multiply by :math:`c_k = \min(1 / \gamma_k, 1)`.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `value`, `upper`, `lower`,
    `gap`. The loop stops after a step; in the analysis it stops before one,
    where a single step would give the lower variable itself.

  Raises:
    ValueError: if the penalty is negative, a set is empty or the number of
      steps is below 1.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.mean((y - batch) ** 2),
    ...   lower=lambda x, y, batch: jnp.mean((y - x + batch - 1) ** 2),
    ... )
    >>> solver = bj.solvers.v_pbsgd(
    ...   problem, penalty=10.0, upper=optax.sgd(0.05), lower=optax.sgd(0.05),
    ...   value=bj.solvers.RandomStop(
    ...     rate=0.5, steps=10, key=0, batch_at=lambda batch, t: batch[t]
    ...   ),
    ... )
    >>> params = bj.BilevelParams(jnp.float32(0.0), jnp.float32(0.0))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for key in jax.random.split(jax.random.key(1), 1000):
    ...   batch = 1 + 0.1 * jax.random.normal(key, (10, 8))
    ...   updates, state = step(batch, state, params)
    ...   params = bj.apply_updates(params, updates)
    >>> print(params.lower.round(1))
    1.0

  References:
    Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method
    <https://arxiv.org/abs/2302.05185>`_, 2023.
  """
  _checks.whole_number('v_pbsgd', 'inner steps', value.steps)
  low = types.as_sequence(lower, 'lower')
  gap = oracles.value_gap(problem, penalty=penalty, rescale=rescale)
  return descent.descend(
    _displacement(problem, value, low.set),
    gap,
    upper=upper,
    lower=low,
    # The gradient of the value sequence is its displacement.
    value=types.Sequence(
      optax.sgd(1.0), start=lambda params: params.lower, restart=True
    ),
  )
