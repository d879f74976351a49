"""What the losses of a run show, and how low they could have been."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel_jax import _checks, projections, types
from bilevel_jax.diagnostics import _walk
from bilevel_jax.oracles import base

_BLOCKS = 16


class Diagnosis(NamedTuple):
  """What `diagnose` finds.

  Attributes:
    verdict: one of `diverged`, `overshooting`, `lagging`, `oscillating`,
      `unconverged`, `weak`, `stiff`, `rounding`, `loose`, `fine`.
    words: what was seen, and what to try.
  """

  verdict: str
  words: str


class _Series(NamedTuple):
  """One loss, step by step and by the means of blocks of steps.

  Attributes:
    steps: the loss in each step.
    means: the means of equal blocks of steps.
    room: changes below this are rounding.
  """

  steps: np.ndarray
  means: np.ndarray
  room: float

  @property
  def late(self) -> np.ndarray:
    """The second half of the steps."""
    return self.steps[len(self.steps) // 2 :]

  @property
  def late_means(self) -> np.ndarray:
    """The second half of the blocks."""
    return self.means[len(self.means) // 2 :]

  @property
  def way(self) -> float:
    """How far the means have gone, or a thousandth of the size if that is more.

    A loss that ends where it began has no way of its own to compare with.
    """
    size = float(np.abs(self.means).max())
    return max(float(np.ptp(self.means)), 1e-3 * size)


def _series(steps: np.ndarray, room: float) -> _Series:
  blocks = np.array_split(steps, min(16, len(steps)))
  return _Series(steps, np.array([block.mean() for block in blocks]), room)


def _turns(steps: np.ndarray, room: float) -> float:
  """The share of steps at which a series turns, 0 if it hardly moves."""
  change = np.diff(steps)
  change = change[np.abs(change) > room]
  if len(change) < 4:
    return 0.0
  return float(np.mean(change[1:] * change[:-1] < 0))


def _waves(series: _Series) -> bool:
  """Whether a loss goes up and down, from step to step or in long waves."""
  if _turns(series.late, series.room) > 0.8:
    return True
  means = series.late_means
  # Noise has far more ups and downs between steps than between blocks.
  smooth = (
    np.abs(np.diff(means)).sum() > 0.3 * np.abs(np.diff(series.late)).sum()
  )
  large = np.ptp(means) > max(0.2 * series.way, series.room)
  return bool(smooth and large and _turns(means, series.room) > 0)


def _explodes(series: _Series) -> bool:
  """Whether a loss grew tenfold in each of the last two quarters."""
  _, before, then, now = (
    float(np.abs(part).max()) for part in np.array_split(series.steps, 4)
  )
  return now > 10 * then > 100 * before and now > 1e3 * series.room


def _ahead(series: _Series) -> float:
  """How far a loss seems to have to go yet, 0 where it is at rest or noisy.

  From the means of the last three quarters, as if what is left fell by one
  factor from quarter to quarter; three times the last change at most.
  """
  if len(series.means) < 16:
    return 0.0
  before, now = np.diff(series.means.reshape(4, 4).mean(axis=1))[1:]
  at = np.arange(8)
  line = np.polyval(np.polyfit(at, series.late_means, 1), at)
  noise = float(np.std(series.late_means - line))
  if abs(now) <= max(3 * noise, series.room):
    return 0.0
  factor = now / before if abs(before) > abs(now) else 1.0
  factor = min(max(factor, 0.0), 0.75)
  return float(now * factor / (1 - factor))


def _finite_steps(losses: Mapping[str, np.ndarray]) -> int:
  """The number of steps before a loss is not finite for the first time."""
  finite = np.all([np.isfinite(steps) for steps in losses.values()], axis=0)
  return len(finite) if finite.all() else int(np.argmin(finite))


def _breaks(losses: Mapping[str, np.ndarray]) -> Diagnosis | None:
  """Whether losses stop being finite, and whether they grew before."""
  count = _finite_steps(losses)
  if count == min(map(len, losses.values())):
    return None
  event = f'the losses are not finite from step {count} on'
  grown = count and any(
    abs(steps[count - 1]) > 10 * max(abs(steps[0]), 1e-30)
    for steps in losses.values()
  )
  if grown:
    words = f'{event}, and grow before: make the step sizes smaller.'
  else:
    words = (
      f'{event}, and do not grow before: a derivative is not finite. Where it '
      'is taken through an inner optimiser that divides by a root (rhg with '
      'optax.adam), it is not finite where an inner gradient is exactly zero: '
      'give the optimiser a constant under the root, optax.adam(rate, '
      'eps_root=1e-8). If that changes nothing, make the step sizes smaller.'
    )
  return Diagnosis('diverged', words)


def _faults(
  losses: Mapping[str, np.ndarray],
) -> tuple[Diagnosis | None, dict[str, _Series]]:
  """What is wrong with the steps wherever they lead, and the losses."""
  count, length = _finite_steps(losses), min(map(len, losses.values()))
  if count < 8:
    return Diagnosis(
      'diverged',
      f'the losses are not finite from step {count} on: make the step sizes '
      'much smaller, see suggest.',
    ), {}
  # What rounding in float32 can do to losses of this size.
  sizes = [np.abs(losses[name][:count]).max() for name in ('upper', 'lower')]
  room = 1e-6 * max(1e-30, float(max(sizes)))
  largest_rounding = losses.get('gap_rounding', np.zeros(1))[:count].max()
  rooms = {'gap': max(room, float(largest_rounding))}
  series = {
    name: _series(steps[:count], rooms.get(name, room))
    for name, steps in losses.items()
  }
  upper, lower, between = (series[n] for n in ('upper', 'lower', 'gap'))
  # The value sequence's loss before and after its step, all else equal.
  fall = np.zeros(1)
  if 'value' in series:
    fall = series['value'].late - (lower.late - between.late)
  rises = float(np.mean(fall < -room))
  grown = [n for n, s in series.items() if n != 'gap_rounding' and _explodes(s)]
  found = None
  middle = float(between.late.mean())
  rounding_error = _rounding(series)
  if rounding_error is None:
    rounding_error = room
  behind = middle < -rounding_error and np.mean(between.late < 0) > 0.5
  if rises > 0.3 and (behind or grown or count < length):
    found = Diagnosis(
      'overshooting',
      f'in {100 * rises:.0f} % of the later updates, the step of the value '
      'sequence raises the loss that it is to lower: make that step smaller, '
      'below 2 over the curvature of the lower loss, or its momentum (see '
      'suggest).',
    )
  elif grown or count < length:
    what = (
      f'the {" and the ".join(grown)} loss grow without end'
      if count == length
      else f'the losses are not finite from step {count} on'
    )
    found = Diagnosis(
      'diverged',
      f'{what}: make the step sizes smaller (see suggest), or the penalty '
      'smaller or its ramp longer.',
    )
  elif behind:
    found = Diagnosis(
      'lagging',
      f'the value sequence lags: the gap is {middle:.3g} in the mean, and a '
      'gap to a minimum cannot be negative. Give the upper variable a smaller '
      'step or the value sequence a larger one, the same as that of the lower '
      'variable, or momentum to both.',
    )
  elif _waves(upper) or _waves(between):
    found = Diagnosis(
      'oscillating',
      'the losses go up and down: the steps are too large, of the lower '
      'variable if it is from step to step, of the upper one if it is in long '
      'waves. Make them smaller (see suggest), and keep rescale on.',
    )
  return found, series


def _at_rest(
  series: Mapping[str, _Series], gap: float | None, accuracy: float | None
) -> Diagnosis | None:
  """Whether the losses have come to rest, by themselves."""
  upper, lower = series['upper'], series['lower']
  middle = float(series['gap'].late.mean())
  ahead = {name: _ahead(series[name]) for name in ('upper', 'lower')}
  # The lower loss is no aim: it moves as long as the upper variable does.
  large = {'upper': 0.05 * upper.way, 'lower': 0.3 * lower.way}
  if accuracy is not None:
    large['upper'] = accuracy
  moving = [name for name in ahead if abs(ahead[name]) > large[name]]
  rounding = _rounding(series) or 0
  if moving and gap is not None and -rounding <= middle < 1e-2 * gap:
    return Diagnosis('stiff', _stiff(f'a gap of {middle:.3g}, below {gap:.3g}'))
  if moving:
    name = moving[0]
    return Diagnosis(
      'unconverged',
      f'not converged: the {name} loss is at {series[name].steps[-1]:.4g} and '
      f'still moves, by about {ahead[name]:.2g} if it goes on so. Make more '
      'updates, larger steps, or the penalty smaller (see suggest).',
    )
  return None


def _rounding(series: Mapping[str, _Series]) -> float | None:
  """The mean rounding error of the later gaps; None if it was not measured."""
  known = series.get('gap_rounding')
  return None if known is None else float(known.late.mean())


def _rounded(series: Mapping[str, _Series]) -> Diagnosis | None:
  """Whether the gap cannot be told from zero."""
  middle, rounding = float(series['gap'].late.mean()), _rounding(series)
  if rounding is None or abs(middle) >= rounding:
    return None
  return Diagnosis(
    'rounding',
    f'the gap is rounding: {middle:.3g} in the mean, with a rounding error of '
    f'about {rounding:.3g}. Neither its sign nor its size means anything, and '
    'the slope that comes with it is inaccurate. Evaluate it with quadrature=2 '
    '(value_gap, v_pbgd) or in float64, or make the penalty smaller.',
  )


def _loose(series: Mapping[str, _Series], gap: float) -> Diagnosis | None:
  """Whether the gap is above what is wanted."""
  middle = float(series['gap'].late.mean())
  if middle > 2 * gap:
    return Diagnosis(
      'loose',
      f'the gap has come to rest at {middle:.3g}, above {gap:.3g}: it falls as '
      'the inverse square of the penalty, so multiply the penalty by '
      f'{np.sqrt(middle / gap):.2g}.',
    )
  return None


def _stiff(seen: str) -> str:
  return (
    'not converged, and the penalty is stiffer than it need be by now: '
    f'{seen}. It slows the upper variable down in proportion: make it '
    'smaller, begin with a smaller one and raise it late, or take a larger '
    'upper step (see suggest).'
  )


@functools.partial(
  jax.jit, static_argnames=('problem', 'points', 'steps', 'upper_set')
)
def _reach(params, batch, *, problem, points, steps, upper_set):
  """The upper loss at these params, then at solved points from them on."""
  upper = base.Loss(problem.upper, 'upper')
  walked = _walk.walk(
    problem,
    params,
    batch,
    points=points,
    solve_steps=steps,
    linear_steps=steps,
    upper_set=upper_set,
  )
  return upper(*params, batch), walked.losses


def _of_the_end(
  here: float, losses: np.ndarray, way: float, accuracy: float | None
) -> Diagnosis | None:
  """What the upper loss says that the hypergradient leads to."""
  solved, least = float(losses[0]), float(losses[-1])
  error, better = solved - here, solved - least
  if not np.isfinite([here, solved]).all():
    return Diagnosis(
      'diverged',
      f'the upper loss is {here:.4g}, and {solved:.4g} with the lower problem '
      'solved at this upper variable: is the lower loss bounded there?',
    )
  size = max(way, abs(solved))
  large = abs(error) > (0.1 * size if accuracy is None else 2 * accuracy)
  # The penalised minimiser is worse than the best by no more than the error.
  if large and better <= 2 * abs(error):
    return Diagnosis(
      'weak',
      f'the penalty is too weak to trust: the upper loss is {here:.4g}, but '
      f'{solved:.4g} with the lower problem solved at this upper variable, and '
      f'{least:.4g} can be reached from there. The difference falls as the '
      'inverse of the penalty, if the lower variable is at rest: make it '
      'larger.',
    )
  if better > (0.02 * size if accuracy is None else accuracy):
    seen = (
      f'with the lower problem solved the upper loss is {solved:.4g}, and '
      f'{least:.4g} can be reached along the hypergradient'
    )
    if abs(error) < 0.01 * better:
      return Diagnosis('stiff', _stiff(seen))
    return Diagnosis(
      'unconverged',
      f'not converged: {seen}. Make more updates or a larger upper step '
      '(see suggest).',
    )
  return None


def diagnose(
  history: Mapping[str, Any] | Sequence[Mapping[str, Any]],
  problem: types.BilevelProblem | None = None,
  params: types.BilevelParams | None = None,
  batch: Any = None,
  *,
  gap: float | None = None,
  accuracy: float | None = None,
  points: int = 8,
  steps: int = 50,
  upper_set: projections.Projection | None = None,
) -> Diagnosis:
  """Reads the losses of a run with a value gap: what is wrong, if anything.

  The history alone shows whether a run is at rest, not where. With the problem
  and the last params, the lower problem is solved there and a few steps are
  made down the hypergradient with a line search: where that lowers the upper
  loss, the run has not arrived; where the upper loss of the run is not the one
  at the lower minimiser, its penalty was too weak.

  Args:
    history: `bj.values(state)` of many steps, by name: arrays of one axis, of
      at least 8 steps, or a list of what `bj.values` gave. It needs `upper`,
      `lower` and `gap`, and reads `value` and `gap_rounding`; without `gap`, as
      of `rhg`, it says why losses stop being finite, and no more. A ramp of the
      penalty moves the losses: leave it out, and give what came after it. From
      minibatches, give running means over tens of steps; what noise does to
      where a run comes to rest is not seen.
    problem: the upper and the lower loss.
    params: the last params of the run.
    batch: the batch of both losses, large enough to stand for the data.
    gap: the value gap wanted, in units of the lower loss; without it, no gap is
      found too large.
    accuracy: of the upper loss, in its units; without it, a twentieth of the
      way that a loss has come is a way to go, and so are a tenth (the penalty)
      and a fiftieth (the hypergradient) of the upper loss or of its way, the
      larger of the two.
    points: how many points of the way down the hypergradient to look at.
    steps: L-BFGS steps, and conjugate gradients at most, at each of them.
    upper_set: projects the upper variable, as in the run.

  Returns:
    A `Diagnosis`, the first of these that holds. `overshooting`: the value
    sequence's own steps raise its loss. `diverged`: a loss is not finite, or
    grows without end. `lagging`: the gap is negative by more than its rounding
    error, the value sequence is behind. `oscillating`: the losses go up and
    down, from step to step or in long waves. `stiff`: not converged, with a
    penalty that is stiffer than need be. `unconverged`: the losses still move,
    or the hypergradient still leads to a lower one. `weak`: the penalty is too
    weak to trust. `rounding`: the gap is within its rounding error (if the
    history has `gap_rounding`, as `value_gap` measures it). `loose`: the gap
    has come to rest above what is wanted. `fine`: none of them; with the
    history alone, a run that rests at a wrong point reads so too.

  Raises:
    ValueError: if a loss is missing, if the history is too short, or if one of
      problem and params is given without the other.

  Example:
    >>> import bilevel_jax as bj, numpy as np
    >>> k = np.arange(100)
    >>> behind = {'upper': 1 / (1 + k), 'lower': 1 + 0 * k, 'gap': -0.1 + 0 * k}
    >>> bj.diagnostics.diagnose(behind).verdict
    'lagging'
  """
  if not isinstance(history, Mapping):
    names = set.intersection(*(set(one) for one in history)) if history else ()
    history = {name: [one[name] for one in history] for name in names}
  if (problem is None) != (params is None):
    raise ValueError('diagnose takes a problem and params together, or none.')
  losses = {
    name: np.asarray(history[name], np.float64)
    for name in ('upper', 'lower', 'gap', 'value', 'gap_rounding')
    if name in history
  }
  _checks.whole('diagnose', 'points', points, 2)
  _checks.whole('diagnose', 'steps', steps)
  if any(s.ndim != 1 or len(s) < 8 for s in losses.values()):
    raise ValueError('diagnose reads arrays of one axis, of at least 8 steps.')
  if missing := {'upper', 'lower', 'gap'} - set(losses):
    if missing == {'gap'} and (diagnosis := _breaks(losses)) is not None:
      return diagnosis
    raise ValueError(
      f'diagnose reads upper, lower and gap; {sorted(missing)} are missing: it '
      'is for solvers with a value gap, v_pbgd for instance; without a gap, it '
      'reads only where losses stop being finite.'
    )
  found, series = _faults(losses)
  if found is not None:
    return found
  if problem is None:
    found = _at_rest(series, gap, accuracy)
  else:
    here, reached = _reach(
      params,
      batch,
      problem=problem,
      points=points,
      steps=steps,
      upper_set=upper_set,
    )
    way = series['upper'].way
    found = _of_the_end(float(here), np.asarray(reached), way, accuracy)
  loose = None if gap is None else _loose(series, gap)
  words = 'nothing stands out.'
  if problem is None:
    words = (
      'nothing stands out in the losses. They do not show whether the run has '
      'arrived: call diagnose(history, problem, params, batch) for that.'
    )
  fine = Diagnosis('fine', words)
  return found or _rounded(series) or loose or fine
