"""Hyper-cleaning over the fraction of polluted digits.

Paper: Shen and Chen, On Penalty-based Bilevel Gradient Descent Method, 2023.

    python -m experiments.pbgd.pollution --preset=quick
    python -m experiments.pbgd.pollution --preset=paper --data_dir=MNIST

Expected: on MNIST, F1 of V-PBGD from 0.96 at a tenth of polluted digits to 0.60
at nine tenths. Time: some minutes on 2 cores.

All fractions and seeds run as one compiled program. Step sizes are tuned at
`digits.polluted` only.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from experiments import harness
from experiments.pbgd import cleaning_report, hyper_cleaning

METHODS = ('v_pbgd', 'noisy_train', 'clean_part')


@dataclasses.dataclass(frozen=True)
class Settings(hyper_cleaning.Settings):
  """Settings of the sweep; all others are those of `hyper_cleaning.Settings`.

  Attributes:
    fractions: fractions of digits with a redrawn label.
  """

  methods: hyper_cleaning.Methods = METHODS
  fractions: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)


def _sweep(preset: str, **changes: Any) -> Settings:
  """A preset of `hyper_cleaning` with the methods of the sweep."""
  fields = vars(hyper_cleaning.PRESETS[preset])
  return Settings(**fields | {'methods': METHODS} | changes)


PRESETS = {
  'quick': Settings(),
  'smoke': _sweep('smoke', fractions=(0.3, 0.7)),
  # V-PBGD reaches its best accuracy within a twentieth of the paper's steps.
  'paper': _sweep(
    'paper',
    steps=2_000,
    chunk=50,
    grid=hyper_cleaning.Grid(steps=500),
    fractions=tuple(n / 10 for n in range(1, 10)),
  ),
}


def summarise(
  outcomes: cleaning_report.Outcomes, settings: Settings
) -> tuple[harness.Results, dict[str, np.ndarray]]:
  """Collects metrics, and curves (fractions, seeds) by `metric/method`."""
  shape = (len(settings.fractions), -1)
  curves = {}
  for method, outcome in outcomes.by_method.items():
    if outcome.failure:
      continue
    metrics = {
      metric: cleaning_report.at_best(outcome, metric, 'selection_accuracy')
      for metric in ('f1', 'test_accuracy')
      if metric in outcome.trained.history
    } | outcomes.retrained_accuracies(method)
    curves |= {
      f'{metric}/{method}': values.reshape(shape)
      for metric, values in metrics.items()
      if not metric.startswith('last/')
    }
  results = harness.Results()
  for i, fraction in enumerate(settings.fractions):
    # F1 of keeping every digit: precision 1 - fraction, recall 1.
    keep_all = 2 * (1 - fraction) / (2 - fraction)
    results.note({'polluted': fraction}, {'f1/keep_all': keep_all})
    for name, values in curves.items():
      metric, method = name.split('/')
      at = {'method': method, 'polluted': fraction}
      results.put(at, {metric: values[i]})
  return results, curves


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  hyper_cleaning.check(settings)
  if max(settings.fractions) >= 1:
    raise harness.SettingsError(
      f'fractions are between 0 and 1, got {max(settings.fractions)}.'
    )


def main(options: harness.Options) -> harness.Report:
  """Runs the sweep."""
  settings = options.settings
  pairs = list(itertools.product(settings.fractions, options.seeds))
  fractions, seeds = zip(*pairs, strict=True)
  runs = hyper_cleaning.Cleaning(options._replace(seeds=seeds), fractions)
  results, curves = summarise(runs.compare(), settings)
  panel = lambda names, ylabel: harness.Panel(
    {n.split('/')[1]: (settings.fractions, curves[n]) for n in names},
    xlabel='fraction of digits with a redrawn label',
    ylabel=ylabel,
  )
  f1 = [n for n in curves if n.startswith('f1/')]
  trained = [n for n in curves if n.startswith('test') and '/v_' not in n]
  trained += [n for n in curves if n.startswith('retrained_accuracy')]
  figure = harness.draw_panels(
    [
      panel(f1, 'F1 of keeping clean digits'),
      panel(trained, 'test accuracy, trained on the kept digits'),
    ]
  )
  return harness.Report(
    results,
    rows='polluted',
    columns=('f1/keep_all', 'f1', 'test_accuracy', 'retrained_accuracy'),
    plots={'pollution.png': figure},
    data=(runs.source,),
    published=('MNIST',),
  )


STUDY = harness.Study(
  main,
  PRESETS,
  paper='pbgd',
  binary='pollution',
  check=check,
  renamed=hyper_cleaning.RENAMED,
)

if __name__ == '__main__':
  harness.run(STUDY)
