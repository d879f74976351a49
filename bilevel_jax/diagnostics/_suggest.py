"""Step sizes and a penalty from curvatures; what the losses of a run say."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import types
from bilevel_jax.oracles import base


class Suggestion(NamedTuple):
  """What `suggest` suggests, and the curvatures that it is from.

  Attributes:
    penalty: weight of the penalty, dimensionless.
    upper: step size of the upper variable, with `rescale` on.
    lower: step size of the lower variable, with `rescale` on.
    value: step size of the value sequence.
    gap: the value gap to expect at the end, in units of the lower loss.
    upper_curvature: largest of the upper loss, in both variables.
    lower_curvature: largest of the lower loss, in both variables.
    value_curvature: largest of the lower loss, in the lower variable.
  """

  penalty: chex.Array
  upper: chex.Array
  lower: chex.Array
  value: chex.Array
  gap: chex.Array
  upper_curvature: chex.Array
  lower_curvature: chex.Array
  value_curvature: chex.Array


def _random_like(key, tree):
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(
    structure,
    [
      jax.random.normal(k, jnp.shape(leaf), jnp.asarray(leaf).dtype)
      for k, leaf in zip(keys, leaves, strict=True)
    ],
  )


def _largest_curvature(loss, point, key, steps):
  """The largest absolute eigenvalue of the Hessian, by power iteration."""
  _, product = jax.linearize(jax.grad(loss), point)

  def scaled(v, size):
    safe = jnp.where(size > 0, size, 1)
    return jax.tree.map(lambda x: (x / safe).astype(x.dtype), v)

  def body(_, carry):
    v, _ = carry
    w = product(v)
    size = optax.tree.norm(w)
    return scaled(w, size), size

  v = _random_like(key, point)
  start = scaled(v, optax.tree.norm(v))
  size = jnp.zeros_like(optax.tree.norm(start))
  return jax.lax.fori_loop(0, steps, body, (start, size))[1]


def _pull_in_metric(x, y, batch, above, below, curvature, steps):
  r"""The product :math:`\nabla_y f^\top H^{-1} \nabla_y f`, never negative."""
  pull = jax.grad(above, 1)(x, y, batch)
  slope = lambda y: jax.grad(below, 1)(x, y, batch)
  _, product = jax.linearize(slope, y)
  damped = lambda v: jax.tree.map(
    lambda a, b: a + (1e-6 * curvature).astype(b.dtype) * b, product(v), v
  )
  moved, _ = jax.scipy.sparse.linalg.cg(damped, pull, maxiter=steps, tol=1e-5)
  found = optax.tree.vdot(pull, moved)
  # Where the lower loss is not convex, the curvature stands for the Hessian.
  plain = optax.tree.norm(pull, squared=True) / curvature
  usable = jnp.isfinite(found) & (found > 0)
  return jnp.where(usable, found, plain)


def suggest(
  problem: types.BilevelProblem,
  params: types.BilevelParams,
  batch: Any = None,
  *,
  key: chex.PRNGKey,
  gap: chex.Numeric | None = None,
  accuracy: chex.Numeric | None = None,
  penalty: chex.Numeric | None = None,
  safety: float = 0.5,
  steps: int = 30,
  spread: float = 0.0,
  points: int = 1,
) -> Suggestion:
  r"""Suggests a penalty and step sizes for `v_pbgd`, from curvatures.

  With the largest curvatures :math:`L_f` and :math:`L_g` of the losses in both
  variables, :math:`L_y` of the lower loss in the lower variable, and
  :math:`q = \nabla_y f^\top [\nabla_{yy} g]^{-1} \nabla_y f`,

  .. math::
    \alpha &= \frac{s}{L_f / \max(\gamma, 1) + \min(\gamma, 1) L_g}, \qquad
    \beta = \frac{s}{L_y} \\
    \gamma &= \sqrt{q / (2 \, gap)} \quad \text{or} \quad
    \gamma = q / accuracy

  :math:`\alpha` is the step of both variables under the rescaling by
  :math:`\min(1 / \gamma, 1)`: the safety s over a bound on the curvature of
  what is descended. The penalised minimiser is off the lower one by
  :math:`[\gamma \nabla_{yy} g]^{-1} \nabla_y f`, hence the two rules for
  :math:`\gamma`: a gap of :math:`q / (2 \gamma^2)`, an error of the upper loss
  of :math:`q / \gamma`. All of it is by Hessian-vector products and exact for
  quadratics in the limit of many steps; elsewhere it holds near the points that
  were looked at, and is a start to be checked with `diagnose`.

  Args:
    problem: the upper and the lower loss.
    params: where to measure, the start of a run. The pull on y is measured at
      the lower variable given, so one near its minimum tells most.
    batch: the batch of both losses.
    key: of the random start of the power iterations.
    gap: the value gap wanted, in units of the lower loss.
    accuracy: or the error wanted of the upper loss, in its units.
    penalty: or the penalty itself. One of the three has to be given.
    safety: s, above 0 and below 2; steps beyond 2 over the curvature diverge.
    steps: power iterations for each of the three curvatures, and steps at most
      of the linear solve.
    spread: standard deviation, in units of the variables, of further points
      around `params` at which the curvatures are measured; the largest counts.
    points: how many points, with the start.

  Returns:
    A `Suggestion` of scalars. Compilable.

  Raises:
    ValueError: unless one of `gap`, `accuracy`, `penalty` is given, and if a
      number is out of its range.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
    >>> found = bj.suggest(problem, params, gap=0.02, key=jax.random.key(0))
    >>> print(f'{found.penalty:.2f} {found.lower_curvature:.2f}')
    10.00 4.00
    >>> solver = bj.v_pbgd(
    ...   problem, penalty=found.penalty, upper=optax.sgd(found.upper),
    ...   lower=optax.sgd(found.lower), value=optax.sgd(found.value),
    ... )

  References:
    Shen and Chen, `On Penalty-based Bilevel Gradient Descent Method
    <https://arxiv.org/abs/2302.05185>`_, 2023.
  """
  given = [n is not None for n in (gap, accuracy, penalty)]
  if sum(given) != 1:
    raise ValueError(
      'suggest takes one of gap, accuracy and penalty, got '
      f'{sum(given)} of them.'
    )
  if not 0 < safety < 2:
    raise ValueError(f'safety is between 0 and 2, got {safety}.')
  if steps < 1 or points < 1:
    raise ValueError(
      f'suggest takes steps and points >= 1, got {steps} and {points}.'
    )
  above = base.Loss(problem.upper, 'upper')
  below = base.Loss(problem.lower, 'lower')

  def curvatures(at):
    key, scale = at
    near, one, two, three = jax.random.split(key, 4)
    noise = _random_like(near, tuple(params))
    x, y = jax.tree.map(
      lambda p, n: p + scale.astype(n.dtype) * n, tuple(params), noise
    )
    return jnp.stack(
      [
        _largest_curvature(lambda z: above(*z, batch), (x, y), one, steps),
        _largest_curvature(lambda z: below(*z, batch), (x, y), two, steps),
        _largest_curvature(lambda y: below(x, y, batch), y, three, steps),
      ]
    )

  # The start itself, then points around it.
  scales = jnp.full(points, spread).at[0].set(0)
  found = jax.lax.map(curvatures, (jax.random.split(key, points), scales)).max(
    axis=0
  )
  tiny = jnp.finfo(found.dtype).tiny
  upper_curvature, lower_curvature, value_curvature = found
  q = _pull_in_metric(
    *params, batch, above, below, jnp.maximum(value_curvature, tiny), steps
  )
  if penalty is not None:
    weight = jnp.asarray(penalty, found.dtype)
  elif gap is not None:
    weight = jnp.sqrt(q / (2 * gap))
  else:
    weight = q / accuracy
  bound = upper_curvature / jnp.maximum(weight, 1)
  bound = bound + jnp.minimum(weight, 1) * lower_curvature
  step = safety / jnp.maximum(bound, tiny)
  return Suggestion(
    penalty=weight,
    upper=step,
    lower=step,
    value=safety / jnp.maximum(value_curvature, tiny),
    gap=q / (2 * jnp.maximum(weight, tiny) ** 2),
    upper_curvature=upper_curvature,
    lower_curvature=lower_curvature,
    value_curvature=value_curvature,
  )


class Diagnosis(NamedTuple):
  """What `diagnose` finds.

  Attributes:
    verdict: one of `diverged`, `lagging`, `oscillating`, `stiff`, `loose`,
      `fine`.
    words: what was seen, and what to try.
  """

  verdict: str
  words: str


def _swings(series: np.ndarray, room: float) -> float:
  """The share of steps at which a series turns, 0 if it hardly moves."""
  change = np.diff(series)
  change = change[np.abs(change) > room]
  if len(change) < 4:
    return 0.0
  return float(np.mean(change[1:] * change[:-1] < 0))


def diagnose(
  history: Mapping[str, Any], *, gap: float | None = None
) -> Diagnosis:
  """Reads the losses of a run with a value gap: what is wrong, if anything.

  It looks at the second half of the history. Its thresholds are for losses on
  one batch, or on batches large enough that noise does not decide the sign of
  the mean gap; from one minibatch a step, give it running means.

  Args:
    history: `bj.values(state)` of many steps, by name: arrays of one axis, of
      at least 8 steps. It needs `upper`, `lower` and `gap`.
    gap: the value gap wanted, in units of the lower loss; without it, no gap is
      found too large.

  Returns:
    A `Diagnosis`. `diverged`: a loss is not finite. `lagging`: the gap is
    negative, the value sequence is behind. `oscillating`: the losses go up and
    down from step to step. `stiff`: the gap is far below what is wanted, or
    below a thousandth of what it was at most, and the upper loss still creeps.
    `loose`: the gap has come to rest above what is wanted.

  Raises:
    ValueError: if a loss is missing or the history is too short.

  Example:
    >>> import bilevel_jax as bj, numpy as np
    >>> k = np.arange(100)
    >>> behind = {'upper': 1 / (1 + k), 'lower': 1 + 0 * k, 'gap': -0.1 + 0 * k}
    >>> bj.diagnose(behind).verdict
    'lagging'
  """
  missing = {'upper', 'lower', 'gap'} - set(history)
  if missing:
    raise ValueError(
      f'diagnose reads upper, lower and gap; {sorted(missing)} are missing: it '
      'is for solvers with a value gap, v_pbgd for instance.'
    )
  losses = {
    name: np.asarray(history[name], np.float64)
    for name in ('upper', 'lower', 'gap')
  }
  if any(s.ndim != 1 or len(s) < 8 for s in losses.values()):
    raise ValueError('diagnose reads arrays of one axis, of at least 8 steps.')
  for name, series in losses.items():
    if not np.all(np.isfinite(series)):
      first = int(np.argmin(np.isfinite(series)))
      return Diagnosis(
        'diverged',
        f'the {name} loss is not finite from step {first} on: make the step '
        'sizes smaller, or the penalty smaller or its ramp longer.',
      )
  late = {name: series[len(series) // 2 :] for name, series in losses.items()}
  upper, between = late['upper'], late['gap']
  # What rounding in float32 can do to losses of this size.
  sizes = [np.abs(losses[name]).max() for name in ('upper', 'lower')]
  room = 1e-6 * max(1e-30, float(max(sizes)))
  middle = float(between.mean())
  if middle < -room and np.mean(between < 0) > 0.5:
    return Diagnosis(
      'lagging',
      f'the value sequence lags: the gap is {middle:.3g} in the mean, and a '
      'gap to a minimum cannot be negative. Give the value sequence more inner '
      'steps or a larger step, or start it from the lower variable.',
    )
  if max(_swings(upper, room), _swings(between, room)) > 0.6:
    return Diagnosis(
      'oscillating',
      'the losses go up and down from step to step: the penalty is too stiff '
      'for the step sizes. Make the steps smaller (see suggest), keep rescale '
      'on, or make the penalty smaller.',
    )
  # How much of the upper loss's way was gone in the last quarter.
  quarter = max(2, len(upper) // 2)
  creep = abs(float(upper[-1] - upper[-quarter]))
  way = float(np.ptp(losses['upper']))
  creeps = creep > 1e-3 * max(way, 1e-30)
  most = gap if gap is not None else 0.1 * float(np.abs(losses['gap']).max())
  if creeps and 0 <= middle < 1e-2 * most:
    return Diagnosis(
      'stiff',
      f'the penalty is too stiff: the gap is {middle:.3g}, far below '
      f'{most:.3g}, while the upper loss still creeps. The number of steps '
      'grows with the penalty: make it smaller, or raise it over more steps.',
    )
  if gap is not None and middle > 2 * gap and not creeps:
    return Diagnosis(
      'loose',
      f'the gap has come to rest at {middle:.3g}, above {gap:.3g}: it falls as '
      'the inverse square of the penalty, so multiply the penalty by '
      f'{np.sqrt(middle / gap):.2g}.',
    )
  return Diagnosis('fine', 'nothing stands out.')
