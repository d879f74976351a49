"""V-PBSGD: value-gap descent whose inner loop ends at a point drawn from it."""

from collections.abc import Callable
from typing import Any

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


def _drawn(problem, rate, steps, batch_at, lower_set, key):
  """The displacement to a point drawn from a loop of falling steps.

  All steps are taken, whatever is drawn, so that time and counts do not depend
  on chance.
  """
  _set.require_projection(lower_set, 'v_pbsgd')
  below = base.Loss(problem.lower, 'lower')
  pick = batch_at or (lambda batch, t: batch)
  shares = jnp.log(1 / jnp.sqrt(1.0 + jnp.arange(steps)))

  def init(params):
    del params
    return states.UpdateCount(jnp.zeros([], jnp.int32)), _keys.as_key(key)

  def averaged(mean):
    return lambda *given: displacement(mean, *given)

  def displacement(mean, params, batch, inner):
    updates, held = inner
    following, now = jax.random.split(held)
    drawn = jax.random.categorical(now, shares)
    first = rate(updates.count) if callable(rate) else rate
    start = params.value
    zero = jnp.zeros([], _trees.dtype_of(start))

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
      keep = lambda new, old: jnp.where(t == drawn, new, old)
      value = value.astype(zero.dtype)
      return (here, jax.tree.map(keep, here, chosen), value), None

    (_, chosen, last), _ = jax.lax.scan(
      step, (start, start, zero), jnp.arange(steps, dtype=jnp.int32)
    )
    moved = optax.tree.sub(start, chosen)
    count = states.UpdateCount(optax.safe_increment(updates.count))
    return (last,), _sequences.only(params, value=moved), (count, following)

  return base.oracle(
    base.ByMean(averaged(base.WHOLE), averaged),
    ('value',),
    init,
    counts={'gradients/lower': steps},
    moves=('value',),
    needs=('upper', 'value'),
  )


def v_pbsgd(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
  value_rate: types.ScalarOrSchedule,
  inner_steps: int,
  inner_batch: Callable[[Any, Any], Any] | None = None,
  key: Any,
  rescale: bool = True,
) -> descent.Solver:
  r"""V-PBSGD: V-PBGD for samples, as its analysis has it.

  In each update, :math:`w_1 = y_k` and, with samples :math:`\xi_t`,

  .. math::
    w_{t+1} &= \Pi_U [ w_t - \beta_t \nabla_y g(x_k, w_t; \xi_t) ], \qquad
    \beta_t = \frac{\beta}{\sqrt t}, \quad t = 1, \dots, T \\
    \hat y &= w_{\tau + 1}, \qquad P(\tau = t) \propto \beta_t \\
    d_k &= \frac{c_k}{M} \sum_{i=1}^{M} \left[ \nabla f(z_k; \xi^i)
      + \gamma_k ( \nabla g(z_k; \xi^i)
      - (\nabla_x g(x_k, \hat y; \xi^i), 0) ) \right], \quad z = (x, y) \\
    z_{k+1} &= \Pi_{C \times U} [ z_k - \alpha d_k ]

  The decreasing inner steps average the noise of the inner samples away, and a
  drawn point is, in the mean, as good as the weighted average of all, without
  the convexity that an average needs. The noise of the outer samples enters
  multiplied by :math:`\gamma`: its variance falls as 1 / M.

  Batches: the losses are means over the samples that they are given. What
  `inner_batch` picks is given to the inner step t; the whole batch is given to
  both losses in the outer step. So hold the M samples and the T inner ones in
  one batch, for instance `{'outer': (M, ...), 'inner': (T, m, ...)}` with
  `inner_batch=lambda batch, t: {'outer': batch['inner'][t]}` and losses that
  read `batch['outer']`. Where M samples do not fit, `bj.evaluation.wrapped`
  with `lambda o: bj.evaluation.accumulate(o, parts)` evaluates them in parts.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
    lower: how the lower variable moves; likewise.
    value_rate: :math:`\beta`, the first inner step size; the inverse of the
      lower loss's curvature in y is the one of the analysis (see `suggest`). A
      constant, or a schedule from the number of updates so far.
    inner_steps: steps :math:`T`; their error falls as :math:`\ln T / \sqrt T`.
    key: PRNG key of the draws, or a whole number.
    inner_batch: the batch of inner step t, from (batch, t), t an int32 scalar
      from 0; by default the whole batch.
    rescale: whether to multiply by :math:`c_k = \min(1 / \gamma_k, 1)`.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `value`, `upper`, `lower`,
    `gap`. The point is drawn among those after a step: where the analysis draws
    before it, one step would leave the lower variable itself.

  Raises:
    ValueError: if the penalty is negative, a set has no point in it or
      `inner_steps` is below 1.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.mean((y - batch) ** 2),
    ...   lower=lambda x, y, batch: jnp.mean((y - x + batch - 1) ** 2),
    ... )
    >>> solver = bj.solvers.v_pbsgd(
    ...   problem, penalty=10.0, upper=optax.sgd(0.05), lower=optax.sgd(0.05),
    ...   value_rate=0.5, inner_steps=10, key=jax.random.key(0),
    ...   inner_batch=lambda batch, t: batch[t],
    ... )
    >>> params = bj.BilevelParams(jnp.float32(0.0), jnp.float32(0.0))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for key in jax.random.split(jax.random.key(1), 1000):
    ...   batch = 1 + 0.1 * jax.random.normal(key, (10, 8))
    ...   updates, state = step(batch, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params.lower.round(1))
    1.0

  References:
    Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method
    <https://arxiv.org/abs/2302.05185>`_, 2023.
  """
  _checks.whole('v_pbsgd', 'inner_steps', inner_steps)
  low = types.as_sequence(lower, 'lower')
  gap = oracles.value_gap(problem, penalty=penalty, rescale=rescale)
  # The gradient of the value sequence is its displacement.
  value = types.Sequence(
    optax.sgd(1.0), start=lambda params: params.lower, restart=True
  )
  return descent.descend(
    _drawn(problem, value_rate, inner_steps, inner_batch, low.set, key),
    gap,
    upper=upper,
    lower=low,
    value=value,
  )
