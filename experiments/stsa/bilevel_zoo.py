"""Stochastic bilevel methods on one problem, with equal calls and equal grids.

Paper: Shen and Chen, A Single-Timescale Analysis for Stochastic Approximation
with Multiple Coupled Sequences, 2022.

    python -m experiments.stsa.bilevel_zoo --problem=quadratic --preset=quick
    python -m experiments.stsa.bilevel_zoo --problem=regularisation \
      --data_dir=DATA
    python -m experiments.stsa.bilevel_zoo --problem=cleaning --data_dir=DATA

Expected: on the quadratic, SOBA ends 4e4 times below its start, SABA at
rounding, the control 4e2 times. Time: about 10 CPU minutes for a problem, all
methods but STABLE, which takes as long alone.

Every method gets the same number of calls on a batch (a gradient, or a product
with a Hessian) and the same grid of step sizes, tuned with seeds that no
number in the table uses; a grid whose end is chosen is widened.
`control/direct` drops the implicit term: what it reaches, any method must beat.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Annotated, Literal

import numpy as np

from experiments import harness
from experiments.harness import comparison
from experiments.stsa import (
  label_cleaning,
  methods,
  zoo_figure,
  zoo_problem,
  zoo_problems,
  zoo_run,
)

CONTROL = 'control/direct'
# The worst of them counts: steps on the brink fail on other seeds.
TUNING_SEEDS = (1_000_000, 1_000_001, 1_000_002)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    problem: `quadratic`, `regularisation` of a logistic regression, or
      `cleaning` of digits.
    methods: what is compared, by the names in `methods.METHODS`; one that would
      write down a Hessian of thousands of numbers is left out.
    calls: calls on a batch that each method gets on the quadratic.
    data_calls: calls on a batch that each method gets on those with data.
    coupling: of the quadratic's lower loss: how much its solution moves with x.
    samples: of each of its losses.
    size: dimension of each of its variables.
    tables: of the regularisation: a9a, magic, breast_cancer (needs no data
      folder), or names of LIBSVM or csv files of your own.
    targets: the column with the two classes of a file of your own: its name in
      the header, or its number; by default the last one.
    header: whether such a csv file has one; by default if no number is in it.
    table_sizes: samples of its lower and of its upper loss; shares of a table
      that has too few.
    corruptions: shares of wrong labels of the cleaning.
    digit_sizes: digits for training, validation, selection and test.
    batch_size: samples in a fixed batch.
    lower_steps: tried step sizes of the lower variable at the start.
    ratios: tried ratios of the upper step to the lower one, in units of the
      problem's.
    exponents: tried powers, in [0, 1], with which both fall after the first
      `warm` part.
    widen: how often a grid may grow where its end is chosen.
    warm: share of the run before which steps stay.
    series: step of the Neumann series.
    seeds: of the start and the draws.
    records: how many times a run is measured.
  """

  problem: Literal['quadratic', 'regularisation', 'cleaning'] = 'quadratic'
  methods: tuple[str, ...] = tuple(methods.METHODS)
  calls: int = 100_000
  data_calls: int = 12_000
  coupling: Annotated[float, harness.Allowed(0)] = 0.3
  samples: int = 1_024
  size: int = 100
  tables: tuple[str, ...] = ('a9a', 'magic')
  targets: Annotated[tuple[str, ...], harness.Allowed(empty=True)] = ()
  header: bool | None = None
  table_sizes: tuple[int, ...] = (1_024, 4_096)
  corruptions: Annotated[tuple[float, ...], harness.Allowed(0, 1)] = (
    0.5,
    0.7,
    0.9,
  )
  digit_sizes: tuple[int, ...] = (2_048, 512, 512, 1_024)
  batch_size: int = 64
  lower_steps: tuple[float, ...] = (0.03, 0.1, 0.3)
  ratios: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
  exponents: Annotated[tuple[float, ...], harness.Allowed(0)] = (0.0, 1.0)
  widen: Annotated[int, harness.Allowed(0)] = 3
  warm: Annotated[float, harness.Allowed(0, 1)] = 0.02
  series: float = 0.3
  seeds: int = 4
  records: int = 50


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    methods=('control/direct', 'soba', 'saba'),
    calls=15_000,
    samples=256,
    size=20,
    batch_size=16,
    lower_steps=(0.1, 0.3),
    ratios=(0.3, 1.0),
    widen=1,
    seeds=2,
    records=20,
  ),
  'paper': Settings(
    calls=1_000_000,
    data_calls=120_000,
    # Of MNIST; the tables are used as far as they go.
    digit_sizes=(20_480, 5_120, 5_120, 10_000),
    table_sizes=(8_192, 8_192),
    seeds=10,
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  unknown = sorted(set(settings.methods) - set(methods.METHODS))
  if unknown:
    known = ', '.join(methods.METHODS)
    raise harness.SettingsError(
      f'unknown method {unknown[0]!r}; known: {known}.'
    )
  for flag, given, wanted in (
    ('--table_sizes', settings.table_sizes, 2),
    ('--digit_sizes', settings.digit_sizes, len(label_cleaning.PARTS)),
  ):
    if len(given) != wanted:
      raise harness.SettingsError(f'{flag} takes {wanted} numbers.')
  flag, count = '--samples', settings.samples
  if settings.problem == 'cleaning':
    flag, count = '--digit_sizes', settings.digit_sizes[0]
  if count % settings.batch_size:
    raise harness.SettingsError(
      f'{flag}: {count} samples are no multiple of {settings.batch_size}.'
    )


def run(
  options: harness.Options, problem: zoo_problem.Problem
) -> dict[str, comparison.Outcome]:
  """Tunes and runs the methods on one problem; those that can be afforded."""
  settings = options.settings
  lately = -(-settings.records // 10)
  rules = comparison.Rules(
    options._replace(workdir=str(pathlib.Path(options.workdir, problem.name))),
    settings=harness.settings_of(settings, *zoo_run.NOT_OF_A_RUN),
    score=lambda t: -np.mean(t.history[problem.tune_by][-lately:], axis=0),
    tuning_seeds=TUNING_SEEDS,
    over_seeds=np.min,
    widenings=settings.widen,
  )
  train = functools.partial(zoo_run.train, settings, problem)
  grid = {
    'step': settings.lower_steps,
    'ratio': settings.ratios,
    'exponent': comparison.Axis(settings.exponents, bounds=(0.0, 1.0)),
  }
  size = problem.lower_size
  affordable = [m for m in settings.methods if methods.affordable(m, size)]
  for method in set(settings.methods) - set(affordable):
    print(f'{method} is left out: a Hessian of {size:,} numbers.')
  outcomes = comparison.compare(rules, affordable, train, grid)
  if settings.problem == 'quadratic' and 'sustain' in affordable:
    point = {'step': (0.3,), 'ratio': (1.0,), 'exponent': (1 / 3,)}
    outcomes |= comparison.compare(rules, zoo_run.CORRECTION, train, point)
  return outcomes


def summarise(
  outcomes: dict[str, comparison.Outcome], problem: zoo_problem.Problem
) -> tuple[dict[str, float], list[dict]]:
  """Metrics, and rows of the table; see `comparison.report_outcomes`."""
  # Means that are NaN if a seed stopped; so is that of a method that failed.
  mean = lambda outcome, at: (
    np.nan if outcome.failure else outcome.values(problem.judge_by)[at].mean()
  )
  starts = {method: mean(outcome, 0) for method, outcome in outcomes.items()}
  ends = {method: mean(outcome, -1) for method, outcome in outcomes.items()}

  def measure(outcome):
    trained, last = outcome.trained, outcome.last(problem.judge_by)
    found = {'final': last}
    if 'test_error' in trained.history and problem.judge_by != 'test_error':
      found['test_error'] = outcome.last('test_error')
    if CONTROL in ends:
      found['of_control'] = last / ends[CONTROL]
    return found | {
      'reduction': starts[outcome.method] / ends[outcome.method],
      'calls_a_step': outcome.last('calls').mean() / trained.step,
      'seconds_a_run': trained.seconds / len(last),
    }

  metrics, rows = comparison.report_outcomes(
    outcomes, measure, where=problem.name
  )
  tuned = [m for m in outcomes if '/' not in m]
  more = {('reference', k): v for k, v in problem.references.items()}
  # Of numpy, whose reductions keep a NaN; of no method, NaN.
  least = np.min([starts[m] / ends[m] for m in tuned] or [np.nan])
  more['worst', 'reduction'] = least
  if CONTROL in ends:
    most = np.max([ends[m] / ends[CONTROL] for m in tuned] or [np.nan])
    more['worst', 'of_control'] = most
  if {'soba', 'saba'} <= set(tuned):
    more['saba', 'below_soba'] = ends['soba'] / ends['saba']
  if set(zoo_run.CORRECTION) <= set(ends):
    corrected, plain = (ends[m] for m in zoo_run.CORRECTION)
    more['sustain', 'correction_gain'] = plain / corrected
  for (of, name), value in more.items():
    print(f'{problem.title}, {of}: {name.replace("_", " ")} {value:.4g}')
    metrics['/'.join(filter(None, (of, problem.name, name)))] = value
  if problem.name:
    rows = [{'problem': problem.name} | row for row in rows]
  return metrics, rows


def main(options: harness.Options) -> None:
  """Runs the methods and writes the table, the plots and the results."""
  start = time.monotonic()
  settings = options.settings
  problems, sources = zoo_problems.make_problems(options)
  print(
    f'Grid at first: lower step {settings.lower_steps}, ratio '
    f'{settings.ratios} in units of {problems[0].upper_scale:g}, exponent '
    f'{settings.exponents}; tuned on the seeds {TUNING_SEEDS}.'
  )
  pictures = [(problem, run(options, problem)) for problem in problems]
  metrics, rows = {}, []
  for problem, outcomes in pictures:
    found, table = summarise(outcomes, problem)
    metrics |= found
    rows += table
  harness.write_table(options.workdir, rows)
  path = pathlib.Path(options.workdir) / f'{settings.problem}.png'
  zoo_figure.draw(path, pictures)
  path = harness.write_results(
    options,
    metrics=metrics,
    seconds=time.monotonic() - start,
    curves={
      f'{problem.name}/{method}'.removeprefix('/'): outcome.values(
        problem.judge_by
      )
      for problem, outcomes in pictures
      for method, outcome in outcomes.items()
      if not outcome.failure
    },
    data=sources,
    published=zoo_problems.published(settings),
    tuning_seeds=TUNING_SEEDS,
  )
  print(f'Results: {path}')


STUDY = harness.Study(
  main, PRESETS, paper='stsa', binary='bilevel_zoo', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
