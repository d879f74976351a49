"""Compares stochastic bilevel methods with equal calls and equal tuning.

Paper: Shen and Chen, A Single-Timescale Analysis for Stochastic Approximation
with Multiple Coupled Sequences, 2022.

    python -m experiments.stsa.bilevel_zoo --problem=quadratic --preset=quick
    python -m experiments.stsa.bilevel_zoo --problem=regularisation
    python -m experiments.stsa.bilevel_zoo --problem=cleaning --data_dir=DATA

Expected: on the quadratic, SOBA reduces the squared hypergradient norm by 4e4,
SABA to rounding, the control by 4e2. Time: about 10 CPU minutes per problem,
and as much again for STABLE.

Each method gets the same number of calls (gradients and Hessian-vector products
of a batch) and the same grid of step sizes. It is tuned with seeds that are not
reported, and a grid is extended if its end is chosen. The control
`control/direct` drops the implicit term.
"""

import dataclasses
import functools
import pathlib
from typing import Annotated, Literal

import numpy as np

from experiments import harness
from experiments.harness.study import comparison
from experiments.stsa import (
  methods,
  zoo_figure,
  zoo_problem,
  zoo_problems,
  zoo_run,
)

CONTROL = 'control/direct'
# The worst seed decides, because near-unstable steps fail on other seeds.
TUNING_SEEDS = (1_000_000, 1_000_001, 1_000_002)
Methods = Annotated[
  tuple[str, ...], harness.Among(methods.METHODS, methods.MEANINGS)
]


@dataclasses.dataclass(frozen=True)
class Grid:
  """Grid of the tuning.

  Attributes:
    lower_steps: initial step sizes of the lower variable.
    ratios: upper step size over the lower one, in units of the problem's
      `upper_scale`.
    exponents: powers in [0, 1] of the decay of both step sizes.
    max_grid_extensions: how often a grid may be extended when its end is
      chosen.
  """

  lower_steps: tuple[float, ...] = (0.03, 0.1, 0.3)
  ratios: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
  exponents: Annotated[tuple[float, ...], harness.Allowed(0)] = (0.0, 1.0)
  max_grid_extensions: Annotated[int, harness.Allowed(0)] = 3

  def axes(self) -> comparison.Grid:
    """Axes of the grid, by hyperparameter."""
    return {
      'step': self.lower_steps,
      'ratio': self.ratios,
      'exponent': comparison.Axis(self.exponents, bounds=(0.0, 1.0)),
    }


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    problem: quadratic, regularisation of a logistic regression, or cleaning of
      digits.
    methods: methods to compare; STABLE is skipped if its Hessian is too large.
    calls: calls per method on the quadratic.
    data_calls: calls per method on problems with data.
    batch_size: samples per fixed batch.
    quadratic: settings of the quadratic problem.
    table: tables of the regularisation.
    digits: digits of the cleaning.
    grid: grid of the tuning.
    seeds: number of seeds, for starts and batches.
    records: number of records per run.
  """

  problem: Literal['quadratic', 'regularisation', 'cleaning'] = 'quadratic'
  methods: Methods = tuple(methods.METHODS)
  calls: int = 100_000
  data_calls: int = 12_000
  batch_size: int = 64
  quadratic: zoo_problems.Quadratic = zoo_problems.QUADRATIC
  table: zoo_problems.Tables = zoo_problems.TABLES
  digits: zoo_problems.Digits = zoo_problems.DIGITS
  grid: Grid = Grid()
  seeds: int = 4
  records: int = 50


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    methods=(CONTROL, 'soba', 'saba'),
    calls=15_000,
    batch_size=16,
    quadratic=zoo_problems.Quadratic(samples=256, size=20),
    grid=Grid((0.1, 0.3), (0.3, 1.0), max_grid_extensions=1),
    seeds=2,
    records=20,
  ),
  'paper': Settings(
    calls=1_000_000,
    data_calls=120_000,
    # Sizes for MNIST; smaller tables are used as a whole.
    digits=zoo_problems.Digits(sizes=(20_480, 5_120, 5_120, 10_000)),
    table=zoo_problems.Tables(sizes=(8_192, 8_192)),
    seeds=10,
  ),
}
# Former flags.
RENAMED = {
  'widen': 'grid.max_grid_extensions',
  'grid.widen': 'grid.max_grid_extensions',
  'tables': 'table.names',
  'table_sizes': 'table.sizes',
  'digit_sizes': 'digits.sizes',
}


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  for flag, sizes, count in (
    ('--table.sizes', settings.table.sizes, 2),
    ('--digits.sizes', settings.digits.sizes, len(zoo_problems.DIGITS.sizes)),
  ):
    if len(sizes) != count:
      raise harness.SettingsError(f'{flag} takes {count} numbers.')
  flag, count = '--quadratic.samples', settings.quadratic.samples
  if settings.problem == 'cleaning':
    flag, count = '--digits.sizes', settings.digits.sizes[0]
  if count % settings.batch_size:
    raise harness.SettingsError(
      f'{flag}: {count} samples must be a multiple of {settings.batch_size}.'
    )


def run(
  options: harness.Options, problem: zoo_problem.Problem
) -> dict[str, comparison.Outcome]:
  """Tunes and runs the affordable methods on one problem."""
  settings = options.settings
  last = -(-settings.records // 10)
  rules = comparison.Rules(
    options._replace(workdir=str(pathlib.Path(options.workdir, problem.name))),
    settings=harness.run_settings(settings, *zoo_run.COMPARISON_SETTINGS),
    score=lambda t: -np.mean(t.history[problem.tune_by][-last:], axis=0),
    tuning_seeds=TUNING_SEEDS,
    over_seeds=np.min,
    widenings=settings.grid.max_grid_extensions,
  )
  train = functools.partial(zoo_run.train, settings, problem)
  size = problem.lower_size
  affordable = [m for m in settings.methods if methods.affordable(m, size)]
  for method in set(settings.methods) - set(affordable):
    print(f'{method} is skipped: its Hessian is {size:,} x {size:,}.')
  outcomes = comparison.compare(rules, affordable, train, settings.grid.axes())
  if settings.problem == 'quadratic' and 'sustain' in affordable:
    point = {'step': (0.3,), 'ratio': (1.0,), 'exponent': (1 / 3,)}
    outcomes |= comparison.compare(rules, zoo_run.CORRECTION, train, point)
  return outcomes


def summarise(
  results: harness.Results,
  outcomes: dict[str, comparison.Outcome],
  problem: zoo_problem.Problem,
) -> None:
  """Adds metrics of all methods on one problem.

  Args:
    results: receives the metrics, by method and by the problem's name, if any.
    outcomes: outcomes by method.
    problem: problem of the comparison.
  """
  # NaN if a seed stopped or the method failed.
  mean = lambda outcome, at: (
    np.nan if outcome.failure else outcome.values(problem.judge_by)[at].mean()
  )
  starts = {method: mean(outcome, 0) for method, outcome in outcomes.items()}
  ends = {method: mean(outcome, -1) for method, outcome in outcomes.items()}
  at = {'problem': problem.name} if problem.name else {}

  def measure(outcome):
    trained, last = outcome.trained, outcome.last(problem.judge_by)
    metrics = {'final': last}
    if 'test_error' in trained.history and problem.judge_by != 'test_error':
      metrics['test_error'] = outcome.last('test_error')
    if CONTROL in ends:
      metrics['of_control'] = last / ends[CONTROL]
    return metrics | {
      'reduction': starts[outcome.method] / ends[outcome.method],
      'calls_a_step': outcome.last('calls').mean() / trained.step,
      'seconds_a_run': trained.seconds / len(last),
    }

  comparison.add_outcomes(results, outcomes, measure, at)
  tuned = [m for m in outcomes if '/' not in m]
  more = dict(problem.references)
  # NumPy's reductions keep a NaN; without methods the result is NaN.
  more['worst_reduction'] = np.min(
    [starts[m] / ends[m] for m in tuned] or [np.nan]
  )
  if CONTROL in ends:
    more['worst_of_control'] = np.max(
      [ends[m] / ends[CONTROL] for m in tuned] or [np.nan]
    )
  if {'soba', 'saba'} <= set(tuned):
    more['soba_over_saba'] = ends['soba'] / ends['saba']
  if set(zoo_run.CORRECTION) <= set(ends):
    corrected, plain = (ends[m] for m in zoo_run.CORRECTION)
    more['correction_gain'] = plain / corrected
  for name, value in more.items():
    print(f'{problem.title}: {name.replace("_", " ")} {value:.4g}')
  results.put(at, more)


def main(options: harness.Options) -> harness.Report:
  """Tunes and runs the methods."""
  settings, results = options.settings, harness.Results()
  problems, sources = zoo_problems.make_problems(options)
  compared = [(problem, run(options, problem)) for problem in problems]
  curves = {}
  for problem, outcomes in compared:
    summarise(results, outcomes, problem)
    for method, outcome in outcomes.items():
      if not outcome.failure:
        name = f'{problem.name}/{method}'.removeprefix('/')
        curves[name] = outcome.values(problem.judge_by)
  return harness.Report(
    results,
    rows=('problem', 'method') if problems[0].name else 'method',
    columns=(
      *('final', 'test_error', 'of_control', 'reduction', 'calls_a_step'),
      *('seconds_a_run', 'step', 'ratio', 'exponent', 'trials', 'seconds'),
    ),
    curves=curves,
    plots={f'{settings.problem}.png': zoo_figure.draw(compared)},
    data=sources,
    published=zoo_problems.published(settings),
    more={'tuning_seeds': TUNING_SEEDS},
  )


STUDY = harness.Study(main, PRESETS, check=check, renamed=RENAMED)


if __name__ == '__main__':
  harness.run(STUDY)
