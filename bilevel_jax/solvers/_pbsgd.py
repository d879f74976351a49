"""V-PBSGD: the stochastic value-gap method, with restarts and a drawn point."""

from collections.abc import Callable
from typing import Any

import chex
import jax.numpy as jnp
import optax

from bilevel_jax import combinators, projections, types
from bilevel_jax.solvers import _pbgd


def v_pbsgd(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  upper: optax.GradientTransformation,
  lower: optax.GradientTransformation,
  value_rate: types.ScalarOrSchedule,
  inner_steps: int,
  key: chex.PRNGKey,
  inner_batch: Callable[[Any, Any], Any] | None = None,
  upper_set: projections.Projection | None = None,
  lower_set: projections.Projection | None = None,
  rescale: bool = True,
  fused: bool = True,
  wrap: _pbgd.Wrapper = _pbgd.same,
) -> optax.GradientTransformationExtraArgs:
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
  read `batch['outer']`. Where M samples do not fit, `wrap=lambda o:
  bj.accumulate(o, parts)` evaluates them in parts.

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule.
    upper: optimiser of the upper variable.
    lower: optimiser of the lower variable.
    value_rate: :math:`\beta`, the first inner step size; the inverse of the
      lower loss's curvature in y is the one of the analysis (see `suggest`). A
      constant, or a schedule from the number of updates so far.
    inner_steps: steps :math:`T`; their error falls as :math:`\ln T / \sqrt T`.
    key: of the draws; it is kept in state.
    inner_batch: the batch of inner step t, from (batch, t), t an int32 scalar
      from 0; by default the whole batch.
    upper_set: projects the upper variable.
    lower_set: projects the lower variable and, in each inner step, the value
      sequence.
    rescale: whether to multiply by :math:`c_k = \min(1 / \gamma_k, 1)`.
    fused: as in `v_pbgd`.
    wrap: wraps each oracle.

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
    >>> solver = bj.v_pbsgd(
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

  def rate(count):
    first: Any = value_rate
    if callable(value_rate):
      first = value_rate(count // inner_steps)
    return first / jnp.sqrt(1.0 + count % inner_steps)

  follow = combinators.repeat_drawn(
    _pbgd.follow_value(problem, optax.sgd(rate), lower_set, wrap),
    inner_steps,
    lambda t: 1 / jnp.sqrt(1.0 + t),
    key=key,
    batch_at=inner_batch,
  )
  descend = _pbgd.descend_gap(
    problem, penalty, upper, lower, upper_set, lower_set, rescale, fused, wrap
  )
  return combinators.auxiliary(
    combinators.alternate(follow, descend),
    restart=('value',),
    value=lambda params: params.lower,
  )
