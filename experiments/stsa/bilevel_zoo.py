"""Stochastic bilevel methods on one problem, with equal calls and equal grids.

Paper: Shen and Chen, A Single-Timescale Analysis for Stochastic Approximation
with Multiple Coupled Sequences, 2022.

    python -m experiments.stsa.bilevel_zoo --problem=quadratic --preset=quick
    python -m experiments.stsa.bilevel_zoo --problem=regularisation \
      --data_dir=DATA
    python -m experiments.stsa.bilevel_zoo --problem=cleaning --data_dir=DATA

Expected: on the quadratic, SOBA ends 4e4 times below its start, SABA at
rounding, the control 4e2 times. Time: 7 minutes for a problem, all methods on 2
cores.

Every method gets the same number of calls on a batch (a gradient, or a product
with a Hessian) and the same grid of step sizes, tuned with a seed that no
number in the table uses. `control/direct` drops the implicit term: what it
reaches, any method must beat.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal

import numpy as np

from experiments import harness
from experiments.stsa import (
  label_cleaning,
  methods,
  quadratic,
  regularisation,
  zoo_figure,
  zoo_problem,
  zoo_run,
)

CONTROL = 'control/direct'
# Samples of the lower and the upper loss, at most, of the packaged 569.
PACKAGED_SIZES = (256, 192)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    problem: `quadratic`, `regularisation` of a logistic regression, or
      `cleaning` of digits.
    methods: what is compared, by the names in `methods.METHODS`; one that would
      write down a Hessian of thousands of numbers is left out.
    calls: calls on a batch that each method gets on the quadratic.
    data_calls: likewise, on the problems with data.
    coupling: of the quadratic's lower loss: how much its solution moves with x.
    samples: of each of its losses.
    size: dimension of each of its variables.
    tables: of the regularisation; breast_cancer needs no data folder.
    table_sizes: samples of its lower and of its upper loss.
    corruptions: shares of wrong labels of the cleaning.
    digit_sizes: digits for training, validation, selection and test.
    batch_size: samples in a fixed batch.
    lower_steps: tried step sizes of the lower variable at the start.
    ratios: tried ratios of the upper step to the lower one, in units of the
      problem's.
    exponents: tried powers with which both fall after the first `warm` part.
    warm: share of the run before which steps stay.
    series: step of the Neumann series.
    seeds: of the start and the draws.
    correction_seeds: of SUSTAIN beside itself without its correction, on the
      quadratic.
    records: how many times a run is measured.
  """

  problem: Literal['quadratic', 'regularisation', 'cleaning'] = 'quadratic'
  methods: tuple[str, ...] = tuple(methods.METHODS)
  calls: int = 100_000
  data_calls: int = 12_000
  coupling: float = 0.3
  samples: int = 1_024
  size: int = 100
  tables: tuple[str, ...] = ('a9a', 'magic')
  table_sizes: tuple[int, ...] = (1_024, 4_096)
  corruptions: tuple[float, ...] = (0.5, 0.7, 0.9)
  digit_sizes: tuple[int, ...] = (2_048, 512, 512, 1_024)
  batch_size: int = 64
  lower_steps: tuple[float, ...] = (0.1, 0.3)
  ratios: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
  exponents: tuple[float, ...] = (0.0, 1.0)
  warm: float = 0.02
  series: float = 0.3
  seeds: int = 4
  correction_seeds: int = 8
  records: int = 50


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    methods=('control/direct', 'soba', 'saba'), calls=30_000, seeds=2
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
  for name in settings.methods:
    if name not in methods.METHODS:
      known = ', '.join(methods.METHODS)
      raise harness.SettingsError(f'unknown method {name!r}; known: {known}.')
  samples = {'--samples': settings.samples}
  if settings.problem == 'cleaning':
    samples = {'--digit_sizes': settings.digit_sizes[0]}
  for flag, count in samples.items():
    if count % settings.batch_size:
      raise harness.SettingsError(
        f'{flag}: {count} samples are no multiple of {settings.batch_size}.'
      )
  for flag, given, wanted in (
    ('--table_sizes', settings.table_sizes, 2),
    ('--digit_sizes', settings.digit_sizes, len(label_cleaning.PARTS)),
  ):
    if len(given) != wanted:
      raise harness.SettingsError(f'{flag} takes {wanted} numbers.')


def make_problems(
  options: harness.Options,
) -> list[zoo_problem.Problem]:
  """The problems that the settings name; says what data they use."""
  settings = options.settings
  if settings.problem == 'quadratic':
    made = make_quadratic(settings)
    title = f'Bilevel quadratics, lower coupling {settings.coupling}'
    return [quadratic.as_problem(made, title)]
  problems = []
  if settings.problem == 'regularisation':
    names = settings.tables
    if options.data_dir is None:
      print('No --data_dir: the packaged table.')
      names = ('breast_cancer',)
    for name in names:
      sizes = settings.table_sizes
      if name == 'breast_cancer':
        sizes = tuple(map(min, sizes, PACKAGED_SIZES))
      problem, source = regularisation.make_regularisation(
        name,
        options.data_dir,
        train=sizes[0],
        validation=sizes[1],
        batch_size=settings.batch_size,
      )
      print(f'Data: {source}')
      problems.append(problem)
    return problems
  for corruption in settings.corruptions:
    problem, source = label_cleaning.make_cleaning(
      options.data_dir,
      corruption=corruption,
      sizes=dict(zip(label_cleaning.PARTS, settings.digit_sizes, strict=True)),
      batch_size=settings.batch_size,
    )
    problems.append(problem)
  print(f'Data: {source}')
  return problems


def make_quadratic(settings: Settings) -> quadratic.Quadratic:
  """The quadratic of the settings."""
  return quadratic.make_quadratic(
    coupling=settings.coupling,
    samples=settings.samples,
    size=settings.size,
    batch_size=settings.batch_size,
  )


def compare(
  options: harness.Options, problem: zoo_problem.Problem
) -> tuple[dict[str, float], list[dict[str, Any]], zoo_figure.Row]:
  """Runs the methods on one problem.

  Args:
    options: what the flags say.
    problem: of the comparison.

  Returns:
    Metrics, rows of the table and what the picture shows.
  """
  settings, zoo = options.settings, zoo_run.Zoo(options, problem)
  prefix = f'{problem.name}/' if problem.name else ''
  metrics: dict[str, float] = {}
  rows, by_calls, by_time = [], {}, {}
  for method in settings.methods:
    if not methods.affordable(method, problem.lower_size):
      print(
        f'{method} is left out: a Hessian of {problem.lower_size:,} numbers.'
      )
      continue
    chosen, trained = zoo.tune_and_run(method)
    values, calls = trained.history[problem.judge_by], trained.history['calls']
    final_value = float(np.mean(values[-1]))
    reduction = float(np.mean(values[0])) / final_value
    spent = float(np.mean(calls[-1]))
    seconds = trained.seconds / settings.seeds
    of_one = {
      'final': final_value,
      'reduction': reduction,
      'calls': spent,
      'seconds': seconds,
    }
    metrics |= {f'{prefix}{method}/{k}': v for k, v in of_one.items()}
    shown = {
      name: float(np.mean(ends[-1]))
      for name, ends in trained.history.items()
      if name == 'test_error' != problem.judge_by
    }
    rows.append(
      ({'problem': problem.name} if problem.name else {})
      | {'method': method, 'final': final_value, **shown}
      | {
        'reduction': reduction,
        'calls a step': spent / trained.step,
        's a run': seconds,
        **chosen,
      }
    )
    by_calls[method] = (calls.mean(axis=1), values.mean(axis=1))
    shares = np.linspace(0, 1, len(values))
    by_time[method] = (seconds * shares, values.mean(axis=1))
  final = lambda method: metrics[f'{prefix}{method}/final']
  others = [name for name in by_calls if not name.startswith('control/')]
  if len(others) < len(by_calls):
    for method in by_calls:
      metrics[f'{prefix}{method}/of_control'] = final(method) / final(CONTROL)
  for name, worst in (('reduction', 'min'), ('of_control', 'max')):
    found = [metrics.get(f'{prefix}{method}/{name}') for method in others]
    metrics[f'{prefix}worst/{name}'] = harness.reduced(found, worst)
  if {'soba', 'saba'} <= set(others):
    metrics[f'{prefix}saba/below_soba'] = final('soba') / final('saba')
  for name, reached in problem.references.items():
    metrics[f'{prefix}reference/{name}'] = reached
    print(f'{problem.title}, {name.replace("_", " ")} alone: {reached:.4g}.')
  picture = zoo_figure.Row(
    by_calls,
    by_time,
    problem.title,
    problem.label,
    problem.logarithmic,
    problem.references,
  )
  return metrics, rows, picture


def main(options: harness.Options) -> None:
  """Runs the methods and writes the table, the plots and the results."""
  start = time.monotonic()
  settings = options.settings
  check(settings)
  problems = make_problems(options)
  print(
    'Grid: lower step '
    f'{settings.lower_steps}, ratio {settings.ratios}, exponent '
    f'{settings.exponents}; the unit of the ratio is '
    f'{problems[0].upper_scale:g}.'
  )
  metrics: dict[str, float] = {}
  rows, pictures = [], []
  for problem in problems:
    found, table, picture = compare(options, problem)
    metrics |= found
    rows += table
    pictures.append(picture)

  if settings.problem == 'quadratic':
    floor = make_quadratic(settings).series_floor(
      methods.TERMS, settings.series
    )
    metrics['floor/series'] = floor
    print(
      f'Bias floor of {methods.TERMS} terms of the Neumann series (BSA, TTSA, '
      f'SUSTAIN; one term more in the others): {floor:.3g}.'
    )
    if 'sustain' in settings.methods:
      gain = zoo_run.Zoo(options, problems[0]).correction_gain()
      metrics['sustain/correction_gain'] = gain
      print(
        f'SUSTAIN beside itself without the correction: {gain:.2f} x below.'
      )
  harness.write_table(options.workdir, rows)
  path = pathlib.Path(options.workdir) / f'{settings.problem}.png'
  zoo_figure.draw(path, pictures)
  path = harness.write_results(
    options,
    metrics=metrics,
    seconds=time.monotonic() - start,
    curves={
      f'{problem.name}/{method}'.removeprefix('/'): values
      for problem, picture in zip(problems, pictures, strict=True)
      for method, (_, values) in picture.by_calls.items()
    },
  )
  print(f'Results: {path}')


if __name__ == '__main__':
  harness.run(main, PRESETS, paper='stsa', binary='bilevel_zoo')
