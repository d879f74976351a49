"""Hyper-cleaning over the share of polluted or the number of clean digits.

Paper: Shen and Chen, On Penalty-based Bilevel Gradient Descent Method, 2023.

    python -m experiments.pbgd.pollution --preset=quick
    python -m experiments.pbgd.pollution --preset=clean --data_dir=MNIST
    python -m experiments.pbgd.pollution --preset=paper --data_dir=MNIST

Expected: on MNIST, F1 of V-PBGD from 0.96 at a tenth of polluted digits to 0.60
at nine tenths. Time: some minutes on 2 cores.

All points of the sweep and all seeds run as one compiled program. Step sizes
are tuned at `digits.polluted` and with all clean digits only; those of `both`
and its weight are tuned at each point.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from experiments import harness
from experiments.harness.study import comparison
from experiments.pbgd import cleaning_report, cleaning_runs, hyper_cleaning

# Its best weight of a polluted digit depends on the point.
TUNED_BY_POINT = ('both',)
METHODS = ('v_pbgd', 'rhg', *hyper_cleaning.CONTROLS)


@dataclasses.dataclass(frozen=True)
class Settings(hyper_cleaning.Settings):
  """Settings of the sweep; all others are those of `hyper_cleaning.Settings`.

  Attributes:
    over: what the sweep is over, the fraction of polluted digits with all clean
      ones, or the number of clean digits with `digits.polluted`.
    fractions: fractions of digits with a redrawn label.
    clean: numbers of clean digits of the upper loss, and at most as many for
      the selection of steps.
  """

  methods: hyper_cleaning.Methods = METHODS
  over: Literal['polluted', 'clean'] = 'polluted'
  fractions: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.9)
  clean: tuple[int, ...] = (50, 100, 300, 1_000)


def _sweep(preset: str, **changes: Any) -> Settings:
  """A preset of `hyper_cleaning` with the methods of the sweep."""
  fields = vars(hyper_cleaning.PRESETS[preset])
  return Settings(**fields | {'methods': METHODS} | changes)


# V-PBGD reaches its best accuracy within a fortieth of the paper's steps.
_SHORT = {'steps': 1_000, 'chunk': 50, 'seeds': 10}
PRESETS = {
  'quick': Settings(),
  'smoke': _sweep(
    'smoke', methods=('v_pbgd', 'noisy_train'), fractions=(0.3, 0.7)
  ),
  # On MNIST, by the share of redrawn labels.
  'paper': _sweep('paper', grid=hyper_cleaning.Grid(steps=500), **_SHORT),
  # On MNIST, by the number of clean digits.
  'clean': _sweep(
    'paper',
    grid=hyper_cleaning.Grid(steps=500),
    over='clean',
    clean=(100, 300, 1_000, 5_000),
    **_SHORT,
  ),
}


def summarise(
  outcomes: cleaning_report.Outcomes,
  by_point: Mapping[str, Sequence[comparison.Outcome]],
  axis: str,
  points: tuple[float, ...],
) -> tuple[harness.Results, dict[str, np.ndarray]]:
  """Collects metrics, and curves (points, seeds) by `metric/method`.

  Args:
    outcomes: runs, whose members are points times seeds.
    by_point: runs of the methods that were tuned at each point.
    axis: coordinate of the points, 'polluted' or 'clean'.
    points: shares of polluted digits, or numbers of clean ones.
  """
  measured = {
    method: _measure(outcome) | outcomes.retrained_accuracies(method)
    for method, outcome in outcomes.by_method.items()
    if not outcome.failure
  }
  for method, f1 in outcomes.f1.items():
    measured[method] = {'f1': f1} | outcomes.retrained_accuracies(method)
  for method, runs in by_point.items():
    if not any(outcome.failure for outcome in runs):
      parts = [_measure(outcome) for outcome in runs]
      measured[method] = {m: np.stack([p[m] for p in parts]) for m in parts[0]}
  curves = {
    f'{metric}/{method}': values.reshape(len(points), -1)
    for method, metrics in measured.items()
    for metric, values in metrics.items()
    if not metric.startswith('last/')
  }
  results = harness.Results()
  for i, point in enumerate(points):
    if axis == 'polluted':
      # F1 of keeping every digit: precision 1 - point, recall 1.
      keep_all = 2 * (1 - point) / (2 - point)
      results.note({axis: point}, {'f1/keep_all': keep_all})
    for name, values in curves.items():
      metric, method = name.split('/')
      results.put({'method': method, axis: point}, {metric: values[i]})
    at_point = {method: runs[i] for method, runs in by_point.items()}
    comparison.add_outcomes(
      results, outcomes.by_method | at_point, lambda _: {}, {axis: point}
    )
    for method, retrained in outcomes.retrained.items():
      if not retrained.failure:
        results.put(
          {'method': method, axis: point},
          cleaning_report.retraining_choice(retrained),
        )
  return results, curves


def _measure(outcome):
  """Metrics at the selected step, per member."""
  return {
    metric: cleaning_report.at_best(outcome, metric, 'selection_accuracy')
    for metric in ('f1', 'test_accuracy')
    if metric in outcome.trained.history
  }


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  hyper_cleaning.check(settings)
  if max(settings.fractions) >= 1:
    raise harness.SettingsError(
      f'fractions are between 0 and 1, got {max(settings.fractions)}.'
    )
  largest, wanted = settings.digits.validation, max(settings.clean)
  if settings.over == 'clean' and wanted > largest:
    raise harness.SettingsError(
      f'{wanted} clean digits are more than digits.validation={largest}.'
    )


def main(options: harness.Options) -> harness.Report:
  """Runs the sweep."""
  settings = options.settings
  axis = settings.over
  by_axis = {'polluted': 'fractions', 'clean': 'clean'}
  points = getattr(settings, by_axis[axis])
  pairs = list(itertools.product(points, options.seeds))
  by_member, seeds = zip(*pairs, strict=True)
  tuned_by_point = [m for m in settings.methods if m in TUNED_BY_POINT]
  methods = tuple(m for m in settings.methods if m not in TUNED_BY_POINT)
  members = options._replace(
    seeds=seeds, settings=dataclasses.replace(settings, methods=methods)
  )
  runs = cleaning_runs.Cleaning(members, **{by_axis[axis]: by_member})
  outcomes = runs.compare()
  by_point = {
    method: [
      runs.at_point(
        f'{axis}={point:g}', options.seeds, method, **{by_axis[axis]: point}
      )
      for point in points
    ]
    for method in tuned_by_point
  }
  results, curves = summarise(outcomes, by_point, axis, points)
  xlabel = {
    'polluted': 'fraction of digits with a redrawn label',
    'clean': 'clean digits',
  }[axis]
  panel = lambda names, ylabel: harness.Panel(
    {n.split('/')[1]: (points, curves[n]) for n in names},
    xlabel=xlabel,
    ylabel=ylabel,
    logx=axis == 'clean',
  )
  f1 = [n for n in curves if n.startswith('f1/')]
  trained = [
    f'test_accuracy/{method}'
    for method in hyper_cleaning.CONTROLS
    if f'test_accuracy/{method}' in curves
  ]
  trained += [n for n in curves if n.startswith('retrained_accuracy')]
  figure = harness.draw_panels(
    [
      panel(f1, 'F1 of keeping clean digits'),
      panel(trained, 'test accuracy, trained on the kept digits'),
    ]
  )
  columns = ('f1', 'test_accuracy', 'retrained_accuracy')
  return harness.Report(
    results,
    rows=axis,
    columns=(*(('f1/keep_all',) if axis == 'polluted' else ()), *columns),
    plots={f'{axis}.png': figure},
    data=(runs.source,),
    published=('MNIST',),
  )


STUDY = harness.Study(
  main, PRESETS, check=check, renamed=hyper_cleaning.RENAMED
)

if __name__ == '__main__':
  harness.run(STUDY)
