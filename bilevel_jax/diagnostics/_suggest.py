"""A penalty, step sizes and a number of updates, from measurements."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import _checks, _keys, _trees, types
from bilevel_jax.diagnostics import _curvatures, _spectrum, _walk
from bilevel_jax.diagnostics._suggestion import Suggestion
from bilevel_jax.oracles import base

_DEFAULTS = _walk.WalkSettings(
  points=12, solve_steps=50, linear_steps=30, safety=0.5, momentum=0.9
)


def _unsolvable(problem, params, batch, key, steps, walked):
  """Whether the lower problem has no solution.

  Either the lower loss falls as fast at the end of its solve as before, or it
  is flat there, like a loss whose infimum is at infinity.
  """
  _, below = base.checked_losses(problem)
  loss = lambda y: below(params.upper, y, batch)
  end, slope = jax.value_and_grad(loss)(walked.origin)
  far = _spectrum.norm(optax.tree.sub(walked.origin, params.lower))
  fall = loss(params.lower) - end
  rounding = 100 * jnp.finfo(fall.dtype).eps * jnp.abs(end)
  falling = _spectrum.norm(slope) * far > 0.9 * fall + rounding
  flat = ~(
    walked.facts.highest[0]
    > 1e-3 * _curvatures.largest(loss, params.lower, key, steps)
  )
  return falling | flat | ~jnp.isfinite(end) | ~jnp.isfinite(walked.losses[0])


def _joint_step(problem, params, batch, key, steps, weight):
  """One over the curvature of the penalised loss in both variables at once."""
  at = lambda loss: lambda z: loss(*z, batch)
  above, below = (
    _curvatures.largest(at(loss), tuple(params), key, steps)
    for loss in base.checked_losses(problem)
  )
  bound = above / jnp.maximum(weight, 1) + jnp.minimum(weight, 1) * below
  return _trees.ratio(1, bound)


def _flow_times(walked, room):
  """The time that gradient flow takes for each step of the walk.

  Flow slows down with its slope. If the slope falls linearly in the upper
  variable, the remaining loss falls with its square.

  Args:
    walked: the walk.
    room: the tolerance of the last loss.
  """
  before = lambda series: jnp.roll(series, 1).at[0].set(series[0])
  remaining = before(walked.losses - walked.losses[-1])
  enough = jnp.sqrt(jnp.clip(_trees.ratio(room, remaining), 1e-6, 1))
  ratio = _trees.ratio(walked.slopes, before(walked.slopes))
  ratio = jnp.clip(ratio, enough, 1e3)
  even = jnp.abs(ratio - 1) < 1e-3
  slower = jnp.where(even, 1, jnp.log(ratio) / jnp.where(even, 1, ratio - 1))
  return jnp.where(remaining > room, walked.steps * slower, 0)


class _Numbers(NamedTuple):
  """The numerical arguments of `suggest`; `goal` is the value of its kind."""

  goal: chex.Numeric
  safety: chex.Numeric
  momentum: chex.Numeric


@functools.partial(jax.jit, static_argnames=('problem', 'kind', 'settings'))
def _suggest(params, batch, key, numbers, *, problem, kind, settings):
  """The suggestion, and whether it is invalid."""
  goal, safety, momentum = numbers
  points, _, steps, upper_set = settings[:4]
  walked = _walk.walk(
    problem,
    params,
    batch,
    settings=settings,
    look=_curvatures.measure(problem, batch, key, steps),
  )
  facts, losses = walked.facts, walked.losses
  # The pull q is measured where the walk has converged.
  room = 0.01 * (losses[0] - losses[-1])
  if kind == 'accuracy':
    room = jnp.minimum(room, goal)
  arrived = losses <= losses[-1] + room
  q = jnp.max(jnp.where(arrived, facts.pull, 0))
  dtype = q.dtype
  if kind == 'penalty':
    weight = jnp.asarray(goal, dtype)
  elif kind == 'accuracy':
    weight = jnp.maximum(q / goal, 1)
  else:
    weight = jnp.maximum(jnp.sqrt(q / (2 * goal)), 1)

  upper_curvature = facts.upper_curvature.max()
  lower_curvature = facts.lower_curvature.max()
  full, part = jnp.maximum(weight, 1), jnp.minimum(weight, 1)
  lower = _trees.ratio(safety, upper_curvature / full + part * lower_curvature)
  value = lower * part
  # The momentum damps the slowest relevant motion. The lag is that behind a
  # steady motion plus the time in which oscillations of the momentum decay.
  slow = _trees.ratio(value, facts.lag)
  damping = jnp.square(jnp.maximum(1 - slow[-1] ** 0.5, 0))
  damping = jnp.minimum(momentum, damping)
  lags = _trees.ratio(1 - damping, slow) + 2 * damping / (1 - damping)
  lag = lags[-1]

  # Each point needs the step of its own curvature and lag: often, the
  # curvature is large at the start and the lag at the end.
  bend = jnp.max(_walk.known_curvatures(walked) * (1 + 4 * lags))
  grip = facts.grip.max() / 2
  first = jnp.where(grip > 0, _trees.ratio(bend, grip), full)
  first = jnp.clip(first, 1, full)
  # At most the longest step of the walk, which is 0 if it has converged.
  rate = jnp.minimum(
    walked.steps.max(), safety / jnp.maximum(bend + first * grip, 1e-30)
  )
  upper = jnp.where(rate > 0, rate * first, lower)

  # Updates for each step; the value sequence moves first and slows them down.
  taken = _flow_times(walked, room)
  done = jnp.sum(taken * (_trees.ratio(1, rate) + first * facts.grip))
  count = jnp.ceil(jnp.clip(1.25 * done + 10 * lag, 0, 1e9))
  settled, first = count.astype(jnp.int32), jnp.minimum(first, weight)
  if points == 1:
    upper = lower = (
      _joint_step(problem, params, batch, key, steps, weight) * safety
    )
    value, first = lower * part, weight
  ramp = jnp.where(first < weight, settled // 2, 0)

  invalid = _unsolvable(problem, params, batch, key, steps, walked)
  suggestion = Suggestion(
    params=types.BilevelParams(params.upper, walked.origin),
    penalty=weight,
    first_penalty=first,
    ramp_begin=settled,
    ramp=ramp,
    updates=settled + 2 * ramp,
    upper=upper,
    lower=lower,
    value=value,
    momentum=damping.astype(dtype),
    gap=q / (2 * weight**2),
    loss=losses[-1],
    hypergradient_curvature=walked.curvatures.max(),
    upper_curvature=upper_curvature,
    lower_curvature=lower_curvature,
    lag=lag,
    # The loss hardly falls in the last quarter of the points.
    arrived=losses[max(-points, -1 - max(1, points // 4))] - losses[-1]
    <= jnp.where(points > 1, room, -1),
    upper_set=upper_set,
  )
  # Whole numbers have no NaN.
  masked = lambda x: jnp.where(
    invalid, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0, x
  ).astype(x.dtype)
  return jax.tree.map(masked, suggestion), invalid


@_checks.regrouped(
  'walk',
  _walk.WalkSettings,
  points='points',
  solve_steps='solve_steps',
  steps='linear_steps',
  upper_set='upper_set',
  safety='safety',
  momentum='momentum',
)
def suggest(
  problem: types.BilevelProblem,
  params: types.BilevelParams,
  batch: Any = None,
  *,
  key: Any,
  gap: chex.Numeric | None = None,
  accuracy: chex.Numeric | None = None,
  penalty: chex.Numeric | None = None,
  walk: _walk.WalkSettings | None = None,
) -> Suggestion:
  r"""Suggests all settings of `v_pbgd`, measured along a short walk.

  The walk solves the lower problem and takes steps along minus the
  hypergradient with a line search. At each point, with the upper loss
  :math:`F(x) = f(x, y(x))` at the lower minimiser, the lower Hessian
  :math:`H = \nabla_{yy} g` and the cross derivative
  :math:`C = \nabla_{yx} g`, it measures

  .. math::
    q = \nabla_y f^\top H^{-1} \nabla_y f, \quad
    L_f = \| \nabla_{yy} f \|, \quad L_g = \| H \|, \quad
    L_F = \| \nabla^2 F \|, \quad
    G = \| C^\top H^{-1} C \|

  The first step moves the upper variable by a tenth of its norm. Each later one
  is four times as long as the last, but at most :math:`1 / L_F`; the walk takes
  :math:`L_F` as the change of the hypergradient in a step over the length of
  the step. If F falls by less than a quarter of its linear prediction, the step
  is taken back and a quarter of it is tried. G comes from four power iterations
  that start at the hypergradient; q, from points where F has converged.

  **The penalty.** The penalised minimiser differs from the lower minimiser by
  :math:`[\gamma H]^{-1} \nabla_y f`, hence

  .. math::
    \gamma = \sqrt{q / (2 \, gap)} \quad \text{or} \quad
    \gamma = q / accuracy, \quad \text{but at least } 1

  **The lower steps** are the safety s over the curvature of the descended loss,
  equal for the lower variable and the value sequence, with one inner step:

  .. math::
    \beta = s / (L_f / \gamma + L_g)

  Then both lag equally behind a moving minimiser, and their difference, which
  determines the upper step, does not lag. With unequal steps, or more inner
  steps, the penalty slows down the upper variable to the slower of the two.

  **The lag** is the number of updates by which the lower variable is behind its
  minimiser while the upper variable moves along the hypergradient d. With the
  momentum m, which is critical damping at the last point, but at most the
  `momentum` of the settings,

  .. math::
    \ell = \frac{\| H^{-2} C d \|}{\beta \| H^{-1} C d \|}, \quad
    \sqrt{m} = 1 - 1 / \sqrt{\ell}, \quad
    \tau = (1 - m) \ell + \frac{2 m}{1 - m}

  **The upper step** leaves the lower variable time to follow its minimiser, and
  takes into account that the value sequence moves first:

  .. math::
    \alpha = \gamma_0 \eta, \quad
    \frac{s}{\eta} = L_F (1 + 4 \tau) + \gamma_0 G / 2

  with the first penalty :math:`\gamma_0` of the run, and with the largest of
  each term at the points. :math:`\eta` is at most the longest step of the walk.
  The upper step is far larger than the lower step if the upper loss is flat in
  the upper variable, for instance in the logarithm of a weight.

  **The ramp.** The penalty starts at the weight from which the last term would
  be the largest, :math:`\gamma_0 = 2 L_F (1 + 4 \tau) / G`, within 1 and
  :math:`\gamma`. It grows to its last value after the upper variable has
  converged.

  **The updates** are those of gradient flow along the walk at these steps, plus
  a quarter, plus ten times :math:`\tau` at the last point. For a step of length
  a in which the slope falls to the share r, flow takes the time
  :math:`a \log r / (r - 1)`, in updates times
  :math:`1 / \eta + \gamma_0 G`. Steps from points where F is within 1 % of its
  decrease, or within the accuracy, of its end do not count.

  The cost is about `points` times (2 `solve_steps` gradients and 10
  `linear_steps` Hessian-vector products). The settings hold for the batch and
  the path of the walk: check the run with `diagnose`. `print(suggestion.words)`
  says whether the walk has reached the end of the path.

  **A cheaper run.** The steps are those of gradient descent that is stable on
  the whole path, so that `updates` grows with the condition numbers of both
  problems. Adam needs no such steps: keep the suggested `penalty` and `params`,
  and write `bj.v_pbgd(problem, penalty=suggestion.penalty, upper=adam,
  lower=adam)` with for instance `adam = optax.adam(0.03)`.

  Args:
    problem: the upper and the lower loss.
    params: the start of the walk. Start a run at the `params` of the result,
      where the lower problem is solved: the steps suit the curvatures from
      there on.
    batch: a batch of both losses, large enough to represent the data.
    key: PRNG key of the random vectors for curvatures, or a whole number.
    gap: the target of the value gap, in units of the lower loss. Give one of
      `gap`, `accuracy` and `penalty`.
    accuracy: the target of the difference between the upper loss of a run and
      that at the lower minimiser, in its units; the error of the upper variable
      is of the order of its square.
    penalty: the penalty.
    walk: settings of the walk and of the steps; by default 12 points with 50
      L-BFGS and 30 linear steps, a safety s of 0.5 and a momentum of at most
      0.9. With one point, it measures at the start without solving the lower
      problem, for a run that ends long before its lower problem is solved: one
      step size for both variables, from the curvature in both, no ramp, and
      `updates` in which the lower variable settles. Directions in which the
      lower Hessian is zero up to rounding need no penalty. `settings()` has the
      `upper_set`.

  Returns:
    A `Suggestion` of scalars, with `settings()` for `v_pbgd`. It can be
    compiled; compiled functions cannot raise, so that for an invalid lower loss
    all numbers are NaN and `updates` is 0.

  Raises:
    ValueError: without exactly one goal; if a number is out of range; if the
      lower loss is linear or unbounded below in the lower variable.
    TypeError: if the problem is not a `BilevelProblem`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2) + jnp.sum(x**2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> start = bj.BilevelParams(jnp.zeros(2), jnp.ones(2))
    >>> found = bj.diagnostics.suggest(problem, start, accuracy=0.02, key=0)
    >>> print(f'{found.penalty:.1f} {found.lower_curvature:.1f}')
    50.0 2.0
    >>> solver = bj.v_pbgd(problem, **found.settings())
    >>> params, _ = bj.testing.run(solver, found.params, int(found.updates))
    >>> print(abs(params.upper - 0.5).max() < 0.02)
    True

  References:
    Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method
    <https://arxiv.org/abs/2302.05185>`_, 2023.
  """
  base.checked_losses(problem)
  goals = {'gap': gap, 'accuracy': accuracy, 'penalty': penalty}
  goals = {name: number for name, number in goals.items() if number is not None}
  if len(goals) != 1:
    raise ValueError(
      f'suggest takes one of gap, accuracy and penalty, got {len(goals)} of '
      'them.'
    )
  ((kind, number),) = goals.items()
  _checks.within('suggest', kind, number, 0, open_low=True)
  settings = _walk.checked_settings(walk, 'suggest', _DEFAULTS)
  safety, momentum = settings.safety, settings.momentum
  assert safety is not None and momentum is not None  # They have defaults.
  if not 0 < safety < 2:
    raise ValueError(
      f'safety is between 0 and 2, got {safety}: give WalkSettings(safety=0.5).'
    )
  if not 0 <= momentum < 1:
    raise ValueError(
      f'momentum is at least 0 and below 1, got {momentum}: give '
      'WalkSettings(momentum=0.9).'
    )
  if settings.points == 1:
    settings = settings._replace(solve_steps=0)
  suggestion, invalid = _suggest(
    types.BilevelParams(*jax.tree.map(jnp.asarray, tuple(params))),
    batch,
    _keys.as_key(key, 'suggest'),
    _Numbers(number, safety, momentum),
    problem=problem,
    kind=kind,
    settings=settings._replace(safety=None, momentum=None),
  )
  if not isinstance(invalid, jax.core.Tracer) and np.any(invalid):
    raise ValueError(
      'suggest found no minimiser of the lower loss in the lower variable: the '
      'loss is not finite, or falls without bound, like a linear loss or that '
      'of a classifier that fits every label. Add a term that bounds it, for '
      'instance weight decay; or measure at the start, by '
      'walk=bj.diagnostics.WalkSettings(points=1).'
    )
  return suggestion
