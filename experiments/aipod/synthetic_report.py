"""Metrics and plots of the synthetic runs: projections to a target."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np

from experiments import harness

COLUMNS = (
  harness.Column('projections_ratio', 'projections'),
  harness.Column('upper_steps_ratio', 'upper steps'),
  harness.Column('projections_ratio_equal_step', 'projections, equal step'),
  *('seeds reaching', 'seeds_stopped', 'iterations'),
)
# Variants in the plots.
_TITLES = {
  'aipod': 'AiPOD',
  'e_aipod/p0.3/t1': 'E-AiPOD, p = 0.3, T = 1',
  'e_aipod/p0.3/t2': 'E-AiPOD, p = 0.3, T = 2',
  'e_aipod/p0.1/t2': 'E-AiPOD, p = 0.1, T = 2',
  'no_control_variate': 'p = 0.3, T = 1, no control variate',
}


class Reached(NamedTuple):
  """Cost per seed to reach the target; infinity if it was not reached.

  Attributes:
    projections: lower plus upper projections.
    upper_steps: upper steps.
  """

  projections: np.ndarray
  upper_steps: np.ndarray


def count_projections(trained: harness.Trained) -> np.ndarray:
  """Lower plus upper projections so far, (records, seeds)."""
  levels = ('lower', 'upper')
  return sum(trained.history[f'count/projections/{n}'] for n in levels)


def reach(
  trained: harness.Trained, target: np.ndarray, upper_steps: int
) -> Reached:
  """Cost until the running average first reaches the target of its seed."""
  below = trained.history['average'] <= target
  row = np.argmax(below, axis=0)
  missed = ~below.any(axis=0)
  seeds = np.arange(len(missed))
  spent = count_projections(trained)[row, seeds].astype(float)
  steps = upper_steps * trained.steps[row].astype(float)
  return Reached(
    np.where(missed, np.inf, spent), np.where(missed, np.inf, steps)
  )


def target_average(trained: harness.Trained) -> np.ndarray:
  """Running average of AiPOD at 80 % of its iterations, (seeds,)."""
  row = int(np.searchsorted(trained.steps, 0.8 * trained.steps[-1]))
  return trained.history['average'][row]


def ratio(spent: np.ndarray, base: np.ndarray) -> np.ndarray:
  """Ratio per seed; infinite wherever `spent` is."""
  finite = np.isfinite(spent)
  return np.where(finite, np.where(finite, spent, 0) / base, np.inf)


def summarise(
  variants: Sequence[Any], runs: Mapping[str, harness.Trained]
) -> harness.Results:
  """Collects metrics of all variants.

  Args:
    variants: `synthetic.Variant`s, AiPOD first for each kind of matrices.
    runs: runs by the name of their variant.

  Returns:
    Means over seeds, medians if a seed misses the target, by run.
  """
  results = harness.Results()
  targets: dict[str, np.ndarray] = {}
  base: dict[str, Reached] = {}
  for variant in variants:
    kind, trained = variant.matrices, runs[variant.name]
    if kind not in targets:
      targets[kind] = target_average(trained)
      base[kind] = reach(trained, targets[kind], 1)
    reached = reach(trained, targets[kind], variant.upper_steps)
    ratios = {
      'projections_ratio': ratio(reached.projections, base[kind].projections),
      'upper_steps_ratio': ratio(reached.upper_steps, base[kind].upper_steps),
    }
    if variant.upper_steps == 2 and kind == 'orthonormal':
      twice = reach(runs['aipod_twice_step'], targets[kind], 1)
      ratios['projections_ratio_equal_step'] = ratio(
        reached.projections, twice.projections
      )
    at, arrived = {'run': variant.name}, np.isfinite(reached.projections)
    for name, values in ratios.items():
      if np.isfinite(values).all():
        results.put(at, {name: values})
        continue
      median = harness.reduced(values, 'median')
      results.put(at, {name: median})
      if np.isinf(median):
        results.note(at, {name: 'not reached'})
    results.add(
      at,
      seeds_reaching=np.sum(arrived),
      seeds_stopped=len(trained.stopped),
      outside=harness.reduced(trained.history['outside'].ravel(), 'max'),
    )
    cells = {'seeds reaching': f'{arrived.sum()} of {len(arrived)}'}
    results.note(at, cells | {'iterations': int(trained.steps[-1])})
  return results


def draw(
  variants: Sequence[Any], runs: Mapping[str, harness.Trained]
) -> dict[str, matplotlib.figure.Figure]:
  """Draws stationarity over projections and over upper steps."""
  by_projections, by_steps = {}, {}
  for variant in variants:
    if title := _TITLES.get(variant.name):
      trained = runs[variant.name]
      average = trained.history['average']
      spent = count_projections(trained).mean(axis=1)
      by_projections[title] = (spent, average)
      by_steps[title] = (variant.upper_steps * trained.steps, average)
  draw_over = lambda curves, label: harness.draw_curves(
    curves, xlabel=label, ylabel='running average of stationarity', logy=True
  )
  return {
    'projections.png': draw_over(
      by_projections, 'projections, lower and upper'
    ),
    'upper_steps.png': draw_over(by_steps, 'upper steps'),
  }
