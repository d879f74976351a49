"""Verdicts about the value gap, with remedies that the run has not taken."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from bilevel_jax.diagnostics import _series


class Diagnosis(NamedTuple):
  """The result of `diagnose`.

  Attributes:
    verdict: one of `diverged`, `overshooting`, `lagging`, `oscillating`,
      `unconverged`, `weak`, `stiff`, `rounding`, `loose`, `settled`, `fine`.
    words: an explanation and a remedy.
  """

  verdict: str
  words: str

  def __str__(self) -> str:
    """The verdict, its explanation and a remedy."""
    return f'{self.verdict}: {self.words}'


def lagging(mean_gap: float, penalty: float | None) -> Diagnosis:
  """A value sequence behind the lower variable."""
  times = (
    '' if penalty is None else f', {penalty * mean_gap:.3g} by the penalty'
  )
  return Diagnosis(
    'lagging',
    f'the value sequence lags: the mean gap is {mean_gap:.3g}{times}, but the '
    'gap to a minimum cannot be negative. Decrease the step of the upper '
    'variable; if the solver has its own value=, give it the optimiser of '
    'lower (the default); if that is SGD without momentum, add momentum.',
  )


def rounding(series: Mapping[str, _series.Series]) -> float | None:
  """The mean rounding error of the later gaps; None if not measured."""
  known = series.get('gap_rounding')
  return None if known is None else float(known.late.mean())


def gap_dtype(series: Mapping[str, _series.Series]) -> Any:
  """The dtype of a gap that is a difference of losses; None if unknown.

  Its rounding error is then four spacings at the larger loss.
  """
  error, lower = rounding(series), series['lower'].late
  losses = np.maximum(np.abs(lower), np.abs(lower - series['gap'].late))
  for dtype in (np.float32, np.float64):
    expected = 4 * float(np.finfo(dtype).eps) * float(losses.mean())
    if error is not None and abs(error - expected) < 0.2 * expected:
      return dtype
  return None


def rounded(
  series: Mapping[str, _series.Series],
) -> Diagnosis | None:
  """Whether the gap is smaller than its rounding error."""
  mean_gap, error = float(series['gap'].late.mean()), rounding(series)
  if error is None or abs(mean_gap) >= error:
    return None
  # A run with quadrature has no error of the losses' spacings.
  remedies = {
    None: 'in float64 if the run is in float32',
    np.float32: 'with quadrature=2 (value_gap, v_pbgd) or in float64',
    np.float64: 'with quadrature=2 (value_gap, v_pbgd)',
  }
  return Diagnosis(
    'rounding',
    f'the gap is rounding: its mean is {mean_gap:.3g}, with a rounding error '
    f'of about {error:.3g}. Its sign and size are meaningless, and its '
    f'slope is inaccurate. Evaluate it {remedies[gap_dtype(series)]}, or '
    'decrease the penalty.',
  )


def loose(series: Mapping[str, _series.Series], gap: float) -> Diagnosis | None:
  """Whether the gap is larger than the target."""
  mean_gap = float(series['gap'].late.mean())
  if mean_gap > 2 * gap:
    return Diagnosis(
      'loose',
      f'the gap has converged to {mean_gap:.3g}, above {gap:.3g}: it falls '
      'with the inverse square of the penalty, so multiply the penalty by '
      f'{np.sqrt(mean_gap / gap):.2g}.',
    )
  return None


def stiff(evidence: str) -> Diagnosis:
  """A penalty that slows down the upper variable."""
  return Diagnosis(
    'stiff',
    'not converged, and the penalty is larger than necessary at this stage: '
    f'{evidence}. It slows down the upper variable in proportion: decrease it, '
    'start with a smaller one and increase it late, or take a larger upper '
    'step (see suggest).',
  )
