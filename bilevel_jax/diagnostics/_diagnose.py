"""Diagnosis of a run from its losses and from steps beyond its end."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bilevel_jax import _checks, _sequences, types
from bilevel_jax.diagnostics import _series, _verdicts, _walk
from bilevel_jax.diagnostics._verdicts import Diagnosis
from bilevel_jax.oracles import base

_DEFAULTS = _walk.WalkSettings(points=8, solve_steps=50)


def _finite_steps(losses: Mapping[str, np.ndarray]) -> int:
  """The number of steps before the first loss that is not finite."""
  finite = np.all([np.isfinite(steps) for steps in losses.values()], axis=0)
  return len(finite) if finite.all() else int(np.argmin(finite))


def _breaks(losses: Mapping[str, np.ndarray]) -> Diagnosis | None:
  """Whether losses become infinite or NaN, and whether they grow before."""
  count = _finite_steps(losses)
  if count == min(map(len, losses.values())):
    return None
  if count == 0:
    return Diagnosis(
      'diverged',
      'the losses are not finite from the first update on: look for NaN or '
      'infinity in the batch and the parameters, and for a logarithm or a '
      'division by zero in the losses.',
    )
  event = f'the losses are not finite from step {count} on'
  grown = count and any(
    abs(steps[count - 1]) > 10 * max(abs(steps[0]), 1e-30)
    for steps in losses.values()
  )
  if grown:
    words = f'{event}, and grow before: decrease the step sizes.'
  else:
    words = (
      f'{event}, and do not grow before: a derivative is not finite. Through '
      'an inner optimiser that divides by a root (rhg with optax.adam), it is '
      'not finite if an inner gradient is exactly zero: give the optimiser a '
      'constant under the root, optax.adam(rate, eps_root=1e-8). If that does '
      'not help, decrease the step sizes.'
    )
  return Diagnosis('diverged', words)


def _faults(
  losses: Mapping[str, np.ndarray],
  penalty: float | None,
  accuracy: float | None,
) -> tuple[Diagnosis | None, Diagnosis | None, dict[str, _series.Series]]:
  """Faults of the steps, a lag too small to be one, and all losses."""
  count, length = _finite_steps(losses), min(map(len, losses.values()))
  if count < 8:
    early = (
      f'the losses are not finite from step {count} on: decrease the step '
      'sizes much, see suggest.'
    )
    first = _breaks(losses) if count == 0 else None
    return first or Diagnosis('diverged', early), None, {}
  # Rounding of losses of this size in float32.
  sizes = [np.abs(losses[name][:count]).max() for name in ('upper', 'lower')]
  room = 1e-6 * max(1e-30, float(max(sizes)))
  largest_rounding = losses.get('gap_rounding', np.zeros(1))[:count].max()
  rooms = {'gap': max(room, float(largest_rounding))}
  series = {
    name: _series.make_series(steps[:count], rooms.get(name, room))
    for name, steps in losses.items()
  }
  upper, lower, between = (series[n] for n in ('upper', 'lower', 'gap'))
  # The decrease of the lower loss by the step of the value sequence.
  fall = np.zeros(1)
  if 'value' in series:
    fall = series['value'].late - (lower.late - between.late)
  rises = float(np.mean(fall < -room))
  grown = [
    n for n, s in series.items() if n != 'gap_rounding' and _series.explodes(s)
  ]
  diagnosis = None
  mean_gap = float(between.late.mean())
  rounding_error = _verdicts.rounding(series)
  if rounding_error is None:
    rounding_error = room
  often = float(np.mean(between.late < 0)) > 0.5
  behind = mean_gap < -rounding_error and often
  # What the lag adds to the penalised loss, compared with the upper loss.
  effect = (20 if penalty is None else penalty) * abs(mean_gap)
  dtype = _verdicts.gap_dtype(series) or np.float32
  accurate = effect > 4 * float(np.finfo(dtype).eps) * max(sizes)
  behind = behind and (penalty is None or accurate)
  size = max(upper.span, float(np.abs(upper.late).mean()))
  small = effect < (0.02 * size if accuracy is None else accuracy)
  lagging = _verdicts.lagging(mean_gap, penalty) if behind else None
  if rises > 0.3 and (behind or grown or count < length):
    diagnosis = Diagnosis(
      'overshooting',
      f'in {100 * rises:.0f} % of the later updates, the step of the value '
      'sequence increases its loss: decrease this step, below 2 over the '
      'curvature of the lower loss, or its momentum (see suggest).',
    )
  elif grown or count < length:
    event = (
      f'the {" and the ".join(grown)} loss grow without bound'
      if count == length
      else f'the losses are not finite from step {count} on'
    )
    diagnosis = Diagnosis(
      'diverged',
      f'{event}: decrease the step sizes (see suggest) or the penalty, or make '
      'its ramp longer.',
    )
  elif lagging and not small:
    diagnosis = lagging
  elif _series.oscillates(upper) or _series.oscillates(between):
    diagnosis = Diagnosis(
      'oscillating',
      'the losses oscillate: a step is too large, that of the lower variable '
      'for oscillations from step to step, that of the upper variable for long '
      'waves. Decrease it (see suggest), and keep rescale on.',
    )
  return diagnosis, lagging, series


def _at_rest(
  series: Mapping[str, _series.Series],
  gap: float | None,
  accuracy: float | None,
) -> Diagnosis | None:
  """Whether the losses have converged, by the history alone."""
  upper, lower = series['upper'], series['lower']
  mean_gap = float(series['gap'].late.mean())
  ahead = {
    name: _series.remaining_change(series[name]) for name in ('upper', 'lower')
  }
  # The lower loss need not fall: it changes with the upper variable.
  large = {'upper': 0.05 * upper.span, 'lower': 0.3 * lower.span}
  if accuracy is not None:
    large['upper'] = accuracy
  moving = [name for name in ahead if abs(ahead[name]) > large[name]]
  rounding = _verdicts.rounding(series) or 0
  if moving and gap is not None and -rounding <= mean_gap < 1e-2 * gap:
    return _verdicts.stiff(f'a gap of {mean_gap:.3g}, below {gap:.3g}')
  if moving:
    name = moving[0]
    return Diagnosis(
      'unconverged',
      f'not converged: the {name} loss is at {series[name].steps[-1]:.4g} and '
      f'would still change by about {ahead[name]:.2g}. Make more updates, '
      'increase the steps, or decrease the penalty (see suggest).',
    )
  return None


@functools.partial(jax.jit, static_argnames=('problem', 'settings'))
def _reach(params, batch, *, problem, settings):
  """The upper loss at these params, and at the points of a walk from them."""
  upper, _ = base.checked_losses(problem)
  walked = _walk.walk(problem, params, batch, settings=settings)
  return upper(*params, batch), walked.losses


def _compare_with_walk(
  here: float, losses: np.ndarray, span: float, accuracy: float | None
) -> Diagnosis | None:
  """Compares the upper loss of a run with the losses of a walk from its end."""
  solved, lowest = float(losses[0]), float(losses[-1])
  error, better = solved - here, solved - lowest
  if not np.isfinite([here, solved]).all():
    return Diagnosis(
      'diverged',
      f'the upper loss is {here:.4g}, and {solved:.4g} with the lower problem '
      'solved at this upper variable: check that the lower loss is bounded '
      'below.',
    )
  size = max(span, abs(solved))
  large = abs(error) > (0.1 * size if accuracy is None else 2 * accuracy)
  # The penalised minimiser is at most by the error worse than the best point.
  if large and better <= 2 * abs(error):
    return Diagnosis(
      'weak',
      f'the penalty is too weak: the upper loss is {here:.4g}, but '
      f'{solved:.4g} with the lower problem solved at this upper variable, and '
      f'{lowest:.4g} at the end of a walk from there. The difference falls '
      'with the inverse of the penalty once the lower variable has converged: '
      'increase the penalty.',
    )
  if better > (0.02 * size if accuracy is None else accuracy):
    evidence = (
      f'with the lower problem solved the upper loss is {solved:.4g}, and '
      f'steps along the hypergradient decrease it to {lowest:.4g}'
    )
    if abs(error) < 0.01 * better:
      return _verdicts.stiff(evidence)
    return Diagnosis(
      'unconverged',
      f'not converged: {evidence}. Make more updates or increase the upper '
      'step (see suggest).',
    )
  return None


@_checks.regrouped(
  'walk',
  _walk.WalkSettings,
  points='points',
  steps='solve_steps',
  upper_set='upper_set',
)
def diagnose(
  history: Mapping[str, Any] | Sequence[Mapping[str, Any]],
  problem: types.BilevelProblem | None = None,
  params: types.BilevelParams | None = None,
  batch: Any = None,
  *,
  gap: float | None = None,
  accuracy: float | None = None,
  penalty: float | None = None,
  walk: _walk.WalkSettings | None = None,
) -> Diagnosis:
  """Diagnoses a run with a value gap from its losses.

  The history alone shows whether a run has converged, not whether it has
  converged to a solution. With the problem and the last params, the lower
  problem is solved, and a line search takes steps along minus the
  hypergradient. If these decrease the upper loss, the run has not converged. If
  the upper loss of the run differs from that at the lower minimiser, the
  penalty is too weak. `print` shows the verdict, its explanation and a remedy.

  Solvers of hypergradients (`aid_bilevel`, `soba`, `rhg`) have no gap. For
  them, only losses that are not finite are diagnosed; check with
  `lower_minimiser` and `hypergradient` that the lower problem is solved and
  that the hypergradient there is small.

  Args:
    history: `bj.values(state)` of at least 8 steps: arrays (steps,) by name, or
      a list of dicts. It needs `upper`, `lower` and `gap`, and reads `value`
      and `gap_rounding`. Leave out a ramp of the penalty, which
      changes the losses. For minibatches, give running means over tens of
      steps; an error of the solution due to noise is not detected.
    problem: the upper and the lower loss.
    params: the last params of the run.
    batch: a batch of both losses, large enough to represent the data.
    gap: the target of the value gap, in units of the lower loss; without it,
      `loose` is never the verdict.
    accuracy: the accuracy of the upper loss, in its units. By default, a
      remaining change is large above a twentieth of the range of a loss. The
      larger of the upper loss and its range sets the scale of two other
      thresholds: a tenth for the penalty, a fiftieth for the hypergradient.
    penalty: the last weight of the penalty, by which a negative gap is
      multiplied: the product is no lag within the rounding of the losses, and
      it is reported after other verdicts below the accuracy or a fiftieth of
      the upper loss. By default, 20 for the second comparison.
    walk: settings of the walk along minus the hypergradient. By default 8
      points with 50 steps of each solver.

  Returns:
    A `Diagnosis`, the first of these that holds. `overshooting`: the steps of
    the value sequence increase its loss. `diverged`: a loss is not finite, or
    grows without bound. `lagging`: the gap is negative by more than its
    rounding error, because the value sequence lags; if that is small, the
    other verdicts come first. `oscillating`: the losses
    oscillate, from step to step or in long waves. `stiff`: not converged, with
    a penalty that is larger than necessary. `unconverged`: the losses still
    change, or steps along the hypergradient decrease the upper loss. `weak`:
    the penalty is too weak. `rounding`: the gap is within its rounding error
    (if the history has `gap_rounding`, which `value_gap` measures). `loose`:
    the gap has converged to more than the target. `settled`: none of these by
    the history alone, which does not show whether the run has found a solution.
    `fine`: none of these, with the problem.

  Raises:
    TypeError: if the history has no losses by name, or the params no sequences.
    ValueError: if a loss is missing, the history is too short, or only one of
      problem and params is given.

  Example:
    >>> import bilevel_jax as bj, numpy as np
    >>> k = np.arange(100)
    >>> upper, lower, gap = 1 / (1 + k), 1 + 0 * k, -0.1 + 0 * k
    >>> bj.diagnose({'upper': upper, 'lower': lower, 'gap': gap}).verdict
    'lagging'
  """
  if (problem is None) != (params is None):
    raise ValueError(
      'diagnose takes a problem and params together: give both, or neither.'
    )
  losses = _series.read_losses(history)
  if problem is not None:
    base.checked_losses(problem)
    _sequences.require_sequences(params, ('upper', 'lower'), 'diagnose')
  settings = _walk.checked_settings(walk, 'diagnose', _DEFAULTS, 2)
  if missing := {'upper', 'lower', 'gap'} - set(losses):
    if missing == {'gap'} and (diagnosis := _breaks(losses)) is not None:
      return diagnosis
    raise ValueError(
      f'diagnose reads upper, lower and gap; {sorted(missing)} are missing: '
      'use it for solvers with a value gap, for instance v_pbgd. For others '
      '(aid_bilevel, soba, rhg), it reports only losses that are not finite. '
      'Check that bj.hypergradient at the lower_minimiser is small, and '
      'compare the upper loss of the run with that at the lower_minimiser.'
    )
  diagnosis, lagging, series = _faults(losses, penalty, accuracy)
  if diagnosis is not None:
    return diagnosis
  if problem is None:
    diagnosis = _at_rest(series, gap, accuracy) or lagging
  else:
    here, reached = _reach(params, batch, problem=problem, settings=settings)
    span = series['upper'].span
    diagnosis = _compare_with_walk(
      float(here), np.asarray(reached), span, accuracy
    )
  loose = None if gap is None else _verdicts.loose(series, gap)
  no_fault = Diagnosis('fine', 'no fault found.')
  if problem is None:
    no_fault = Diagnosis(
      'settled',
      'no fault found in the losses. They do not show whether the run has '
      'found a solution: call diagnose(history, problem, params, batch) for '
      'that.',
    )
  return diagnosis or _verdicts.rounded(series) or loose or no_fault
