"""A penalty, step sizes and a number of updates, measured along the way."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import (
  _checks,
  _keys,
  _trees,
  linear_solvers,
  projections,
  types,
)
from bilevel_jax.diagnostics import _spectrum, _walk
from bilevel_jax.oracles import base


@dataclasses.dataclass(frozen=True, repr=False)
class Suggestion:
  """What `suggest` suggests for `v_pbgd`, and what it is from.

  A pytree; `upper_set` is no leaf of it.

  Attributes:
    params: where to begin: the upper variable as given, the lower problem
      solved.
    penalty: the last weight of the penalty, dimensionless.
    first_penalty: the weight until `ramp_begin`.
    ramp_begin: the update from which the weight grows linearly.
    ramp: in how many updates it grows.
    updates: how many updates to make.
    upper: step size of the upper variable, with `rescale` on.
    lower: step size of the lower variable, with `rescale` on.
    value: step size of the value sequence.
    momentum: of the lower variable and of the value sequence.
    gap: the value gap to expect at the end, in units of the lower loss.
    loss: the upper loss at a lower minimiser to expect at the end.
    hypergradient_curvature: largest of the upper loss as a function of the
      upper variable alone, along the way.
    upper_curvature: largest of the upper loss in the lower variable.
    lower_curvature: largest of the lower loss in the lower variable.
    lag: by how many updates the lower variable follows its minimiser.
    arrived: whether the walk had come to rest, bool. If not, all numbers are
      for as far as it came, and lower losses may lie ahead: take more `points`.
    upper_set: of the upper variable, as `suggest` was given it.
  """

  params: types.BilevelParams
  penalty: chex.Array
  first_penalty: chex.Array
  ramp_begin: chex.Array
  ramp: chex.Array
  updates: chex.Array
  upper: chex.Array
  lower: chex.Array
  value: chex.Array
  momentum: chex.Array
  gap: chex.Array
  loss: chex.Array
  hypergradient_curvature: chex.Array
  upper_curvature: chex.Array
  lower_curvature: chex.Array
  lag: chex.Array
  arrived: chex.Array
  upper_set: projections.Projection | None = None

  def __repr__(self) -> str:
    """All but the parameters, which are as many as a model has."""
    names = [field.name for field in dataclasses.fields(self)]
    said = [f'{n}={getattr(self, n)}' for n in names if n != 'params']
    return f'Suggestion({", ".join(said)})'

  def schedule(self, count: chex.Numeric) -> chex.Array:
    """The weight of the penalty after so many updates."""
    grown = (count - self.ramp_begin) / jnp.maximum(self.ramp, 1)
    grown = jnp.clip(grown, 0, 1)
    return self.first_penalty + grown * (self.penalty - self.first_penalty)

  def settings(self) -> dict[str, Any]:
    """The keywords of `bj.v_pbgd`: `bj.v_pbgd(problem, **s.settings())`."""
    followed = lambda step: optax.sgd(step, momentum=self.momentum)
    # One inner step, the default, and equal steps: see `suggest`.
    return {
      'penalty': self.schedule,
      'upper': types.Sequence(optax.sgd(self.upper), set=self.upper_set),
      'lower': followed(self.lower),
      'value': followed(self.value),
    }


jax.tree_util.register_dataclass(
  Suggestion,
  data_fields=[
    field.name
    for field in dataclasses.fields(Suggestion)
    if field.name != 'upper_set'
  ],
  meta_fields=['upper_set'],
)


class _Facts(NamedTuple):
  """What is measured at one point.

  Attributes:
    upper_curvature: as in `Suggestion`, here.
    lower_curvature: likewise.
    highest: the largest eigenvalue of the lower Hessian, with its sign.
    pull: q.
    lag: in units of one over the curvature of the lower loss.
    grip: how hard the penalty holds the upper variable, for a penalty of one.
  """

  upper_curvature: chex.Array
  lower_curvature: chex.Array
  highest: chex.Array
  pull: chex.Array
  lag: chex.Array
  grip: chex.Array


def _largest(loss, at, key, steps):
  """The largest curvature of a loss."""
  _, product = jax.linearize(jax.grad(loss), at)
  noise = optax.tree.random_like(key, at, jax.random.normal)
  return jnp.max(jnp.abs(_spectrum.spectrum(product, noise, steps).values))


def _measure(problem, batch, key, steps):
  """What to look at in each point of the walk."""
  above = base.Loss(problem.upper, 'upper')
  below = base.Loss(problem.lower, 'lower')
  solve = linear_solvers.conjugate_gradient(steps, tolerance=1e-3)

  def look(params, slope):
    x, y = params
    pull = jax.grad(above, 1)(x, y, batch)
    _, both = jax.linearize(lambda y: jax.grad(below, (0, 1))(x, y, batch), y)
    product = lambda v: both(v)[1]
    across = lambda v: jax.jvp(
      lambda x: jax.grad(below, 1)(x, y, batch), (x,), (v,)
    )[1]
    way = _spectrum.normalised(slope)[0]
    noise = optax.tree.random_like(key, y, jax.random.normal)
    rows = jax.tree.map(lambda *z: jnp.stack(z), noise, pull, across(way))
    seen = jax.vmap(lambda v: _spectrum.spectrum(product, v, steps))(rows)
    largest = jnp.max(jnp.abs(seen.values))
    _, pulled, moved = (_spectrum.Spectrum(*row) for row in zip(*seen))

    # The minimiser moves with x by - H^-1 grad_yx g, its lag by H^-1 of that.
    far, near = (moved.inverse_power(n, largest) for n in (4, 2))

    def hold(_, carry):
      back = both(solve(product, across(carry[0])))[0]
      return _spectrum.normalised(back)

    grip = jax.lax.fori_loop(0, 4, hold, (way, jnp.zeros_like(largest)))[1]
    return _Facts(
      upper_curvature=_largest(lambda y: above(x, y, batch), y, key, steps),
      lower_curvature=largest,
      highest=jnp.max(seen.values),
      pull=pulled.inverse_power(1, largest),
      lag=jnp.sqrt(_trees.ratio(far, near)),
      grip=grip,
    )

  return look


def _unsolvable(problem, params, batch, key, steps, walked):
  """Whether the lower loss has no minimiser within reach.

  It still falls as fast as on the way to where its solve ended, or it has
  become flat there, as a loss does whose infimum is at infinity.
  """
  below = base.Loss(problem.lower, 'lower')
  loss = lambda y: below(params.upper, y, batch)
  end, slope = jax.value_and_grad(loss)(walked.origin)
  far = _spectrum.norm(optax.tree.sub(walked.origin, params.lower))
  fall = loss(params.lower) - end
  rounding = 100 * jnp.finfo(fall.dtype).eps * jnp.abs(end)
  falling = _spectrum.norm(slope) * far > 0.9 * fall + rounding
  flat = ~(
    walked.facts.highest[0] > 1e-3 * _largest(loss, params.lower, key, steps)
  )
  return falling | flat | ~jnp.isfinite(end) | ~jnp.isfinite(walked.losses[0])


def _joint_step(problem, params, batch, key, steps, weight):
  """One over the curvature of the penalised loss in both variables at once."""
  at = lambda loss: lambda z: base.Loss(loss, 'any')(*z, batch)
  above, below = (
    _largest(at(loss), tuple(params), key, steps)
    for loss in (problem.upper, problem.lower)
  )
  bound = above / jnp.maximum(weight, 1) + jnp.minimum(weight, 1) * below
  return _trees.ratio(1, bound)


def _flow_times(walked, room):
  """How long gradient flow takes for each step of the walk, to the last loss.

  Flow slows down with its slope. Where that falls linearly in the upper
  variable, what is left of the loss falls as its square.

  Args:
    walked: the walk.
    room: how near to the last loss is near enough.
  """
  before = lambda series: jnp.roll(series, 1).at[0].set(series[0])
  left = before(walked.losses - walked.losses[-1])
  enough = jnp.sqrt(jnp.clip(_trees.ratio(room, left), 1e-6, 1))
  ratio = _trees.ratio(walked.slopes, before(walked.slopes))
  ratio = jnp.clip(ratio, enough, 1e3)
  even = jnp.abs(ratio - 1) < 1e-3
  slower = jnp.where(even, 1, jnp.log(ratio) / jnp.where(even, 1, ratio - 1))
  return jnp.where(left > room, walked.steps * slower, 0)


_STATIC = (
  'problem',
  'kind',
  'points',
  'solve_steps',
  'steps',
  'upper_set',
)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _suggest(
  params,
  batch,
  key,
  goal,
  safety,
  momentum,
  *,
  problem,
  kind,
  points,
  solve_steps,
  steps,
  upper_set,
):
  """The numbers of `suggest`, and whether they are none."""
  walked = _walk.walk(
    problem,
    params,
    batch,
    points=points,
    solve_steps=solve_steps,
    linear_steps=steps,
    upper_set=upper_set,
    look=_measure(problem, batch, key, steps),
  )
  facts, losses = walked.facts, walked.losses
  # Where the walk has arrived. The pull at its start says little.
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
  # As much momentum as damps the slowest motion that matters, and its lag:
  # behind a steady motion, and until the swings of the momentum have died out.
  slow = _trees.ratio(value, facts.lag[-1])
  followed = jnp.minimum(momentum, jnp.square(jnp.maximum(1 - slow**0.5, 0)))
  lag = _trees.ratio(1 - followed, slow) + 2 * followed / (1 - followed)

  bend = walked.curvatures.max() * (1 + 4 * lag)
  grip = facts.grip.max() / 2
  first = jnp.where(grip > 0, _trees.ratio(bend, grip), full)
  first = jnp.clip(first, 1, full)
  # No step was longer in the walk; where none was taken, all is arrived.
  rate = jnp.minimum(
    walked.steps.max(), safety / jnp.maximum(bend + first * grip, 1e-30)
  )
  upper = jnp.where(rate > 0, rate * first, lower)

  # Updates for each step: the value sequence's head start slows them down.
  taken = _flow_times(walked, room)
  done = jnp.sum(taken * (_trees.ratio(1, rate) + first * facts.grip))
  whole = lambda n: jnp.ceil(jnp.clip(n, 0, 1e9)).astype(jnp.int32)
  settled, first = whole(1.25 * done + 10 * lag), jnp.minimum(first, weight)
  if points == 1:
    upper = lower = (
      _joint_step(problem, params, batch, key, steps, weight) * safety
    )
    value, first = lower * part, weight
  ramp = jnp.where(first < weight, settled // 2, 0)

  bad = _unsolvable(problem, params, batch, key, steps, walked)
  found = Suggestion(
    params=types.BilevelParams(params.upper, walked.origin),
    penalty=weight,
    first_penalty=first,
    ramp_begin=settled,
    ramp=ramp,
    updates=settled + 2 * ramp,
    upper=upper,
    lower=lower,
    value=value,
    momentum=followed.astype(dtype),
    gap=q / (2 * weight**2),
    loss=losses[-1],
    hypergradient_curvature=walked.curvatures.max(),
    upper_curvature=upper_curvature,
    lower_curvature=lower_curvature,
    lag=lag,
    # In the last quarter of its points it found next to nothing.
    arrived=losses[max(-points, -1 - max(1, points // 4))] - losses[-1]
    <= jnp.where(points > 1, room, -1),
    upper_set=upper_set,
  )
  # A whole number has no NaN.
  nothing = lambda x: jnp.where(
    bad, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0, x
  ).astype(x.dtype)
  return jax.tree.map(nothing, found), bad


def suggest(
  problem: types.BilevelProblem,
  params: types.BilevelParams,
  batch: Any = None,
  *,
  key: Any,
  gap: chex.Numeric | None = None,
  accuracy: chex.Numeric | None = None,
  penalty: chex.Numeric | None = None,
  safety: float = 0.5,
  momentum: float = 0.9,
  points: int = 12,
  solve_steps: int = 50,
  steps: int = 30,
  upper_set: projections.Projection | None = None,
) -> Suggestion:
  r"""Suggests all settings of `v_pbgd` by a short walk to where a run will go.

  The walk solves the lower problem, takes the hypergradient by conjugate
  gradients and goes down it with a line search. In each of its points, with the
  upper loss :math:`F(x) = f(x, y(x))` at the lower minimiser, the lower Hessian
  :math:`H = \nabla_{yy} g` and the cross derivative
  :math:`C = \nabla_{yx} g`, it measures

  .. math::
    q = \nabla_y f^\top H^{-1} \nabla_y f, \quad
    L_f = \| \nabla_{yy} f \|, \quad L_g = \| H \|, \quad
    L_F = \| \nabla^2 F \|, \quad
    G = \| C^\top H^{-1} C \|

  **The penalty.** The penalised minimiser is off the lower one by
  :math:`[\gamma H]^{-1} \nabla_y f`, hence

  .. math::
    \gamma = \sqrt{q / (2 \, gap)} \quad \text{or} \quad
    \gamma = q / accuracy, \quad \text{but at least } 1

  **The steps below** are the safety s over the curvature of what is descended,
  alike for the lower variable and the value sequence, with one inner step:

  .. math::
    \beta = s / (L_f / \gamma + L_g)

  Then the two lag alike behind a moving minimiser, and their difference, which
  is what the upper variable sees, does not lag. With unequal steps, or more
  inner steps, the penalty holds the upper variable at the slower of the two.

  **The step above** leaves the lower variable time to follow its minimiser,
  which takes it :math:`\tau` updates, and is not held back by the value
  sequence, which moves first:

  .. math::
    \alpha = \gamma \eta, \quad
    \frac{s}{\eta} = L_F (1 + 4 \tau) + \gamma G / 2

  with the penalty at which the run begins. It is far larger than the one below
  where the upper loss is flat in the upper variable, as it is in the logarithm
  of a weight.

  **The ramp.** The penalty begins at the weight from which the last term would
  be the largest, and grows to its last value when the way is done.

  **The updates** are those that gradient flow along the walk takes at these
  steps, a quarter more, and ten times :math:`\tau`.

  A cost of about `points` times (2 `solve_steps` gradients and 10 `steps`
  Hessian-vector products). It holds for the batch and the way that were looked
  at: check the run with `diagnose`.

  Args:
    problem: the upper and the lower loss.
    params: the start of a run. Begin at the `params` of the result, in which
      the lower problem is solved: the steps are for the curvatures from there.
    batch: the batch of both losses, large enough to stand for the data.
    key: of the random starts of the curvatures: a key or a whole number.
    gap: the value gap wanted, in units of the lower loss.
    accuracy: or the difference wanted between the upper loss of a run and the
      one at the lower minimiser, in its units. The upper variable itself is
      off by the square of that only.
    penalty: or the penalty itself. One of the three has to be given.
    safety: s, above 0 and below 2.
    momentum: of the two lower sequences, at most so much, in [0, 1). As much is
      taken as the slowest motion of the lower minimiser can use.
    points: of the walk. A walk that has not `arrived` suggests for as far as it
      came; on a long or winding way, take 40. 1 measures at the start
      as it is and solves nothing, for a run that ends long before its lower
      problem is solved: one step for both variables,
      from the curvature in both at once, no ramp, and `updates` that only let
      the lower variable settle.
    solve_steps: L-BFGS steps in each lower solve.
    steps: Lanczos and conjugate-gradient steps at most in each point. What of
      the lower Hessian is zero up to rounding counts as flat: along it the
      upper loss pulls freely, and no penalty is needed.
    upper_set: projects the upper variable; `settings()` passes it on.

  Returns:
    A `Suggestion` of scalars, with `settings()` for `v_pbgd`. Compilable; where
    a ValueError about the lower loss cannot be raised, in a compiled function,
    all numbers are NaN and `updates` is 0.

  Raises:
    ValueError: unless one of `gap`, `accuracy`, `penalty` is given; if a number
      is out of its range; if the lower loss is linear or unbounded in the lower
      variable, so that nothing can be measured at its minimiser.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2) + jnp.sum(x**2),
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> start = bj.BilevelParams(jnp.zeros(2), jnp.ones(2))
    >>> found = bj.diagnostics.suggest(problem, start, accuracy=0.02, key=0)
    >>> print(f'{found.penalty:.1f} {found.lower_curvature:.1f}')
    50.0 2.0
    >>> solver = bj.v_pbgd(problem, **found.settings())
    >>> params, state = found.params, solver.init(found.params)
    >>> step = jax.jit(solver.update)
    >>> for _ in range(int(found.updates)):
    ...   updates, state = step(None, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(abs(params.upper - 0.5).max() < 0.02)
    True

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
  for name, wanted in (('gap', gap), ('accuracy', accuracy)):
    if wanted is not None:
      _checks.within('suggest', name, wanted, 0, open_low=True)
  if penalty is not None:
    _checks.within('suggest', 'penalty', penalty, 0, open_low=True)
  if not 0 < safety < 2:
    raise ValueError(f'safety is between 0 and 2, got {safety}.')
  if not 0 <= momentum < 1:
    raise ValueError(f'momentum is at least 0 and below 1, got {momentum}.')
  _checks.whole('suggest', 'points', points)
  _checks.whole('suggest', 'solve_steps', solve_steps)
  _checks.whole('suggest', 'steps', steps)
  kind, goal = next(
    (name, wanted)
    for name, wanted in (
      ('gap', gap),
      ('accuracy', accuracy),
      ('penalty', penalty),
    )
    if wanted is not None
  )
  found, bad = _suggest(
    types.BilevelParams(*jax.tree.map(jnp.asarray, tuple(params))),
    batch,
    _keys.as_key(key, 'suggest'),
    goal,
    safety,
    momentum,
    problem=problem,
    kind=kind,
    points=points,
    solve_steps=solve_steps if points > 1 else 0,
    steps=steps,
    upper_set=upper_set,
  )
  if not isinstance(bad, jax.core.Tracer) and np.any(bad):
    raise ValueError(
      'suggest found no minimiser of the lower loss in the lower variable: it '
      'falls without end, as a linear loss or the one of a classifier that '
      'fits every label, or is not finite. Add to it what bounds it, weight '
      'decay for instance; or take points=1, which measures at the start as it '
      'is.'
    )
  return found
