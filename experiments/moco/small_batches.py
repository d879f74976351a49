"""MoCo by batch size: conflicts, biases of directions, and dm %.

Paper: Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, Mitigating Gradient
Bias in Multi-objective Learning, 2023.

    python -m experiments.moco.small_batches --preset=quick --data_dir=DATA

Expected: from batches of 256 to 4, the lead of MoCo with exact weights over SMG
grows by 51 ± 43 on SARCOS; over all methods without memory by 12 ± 42. Time: 40
minutes on 2 cores.

All batch sizes have the same number of updates, so that only the noise of the
gradients differs. dm % is relative to single-task networks trained with the
largest batches, a fixed unit. The lead of MoCo at a batch size is the mean dm %
of the methods without memory minus its own.

Without --data_dir, the only data set is `dense`, which is synthetic. The preset
`paper` adds Multi-MNIST and Multi-Fashion (folder `fashion`), which takes
hours.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from experiments import harness
from experiments.moco import (
  compare,
  dense_toy,
  direction_errors,
  methods,
  multi_mnist,
  tabular,
  tabular_data,
)
from experiments.moco import problem as problems

MEMORYLESS = ('mean', 'mgda', 'smg', 'pcgrad', 'cagrad', 'nash_mtl', 'upgrad')
MOCO = ('moco', 'moco_exact')
DATA = ('sarcos', 'adult', 'school', 'multi_mnist', 'multi_fashion')
DATA_MEANINGS = {
  'sarcos': 'seven torques of a robot arm.',
  'adult': 'income, and parity of the sexes.',
  'school': 'exam scores in the five largest schools.',
  'multi_mnist': 'two overlapping digits.',
  'multi_fashion': 'two overlapping clothes.',
  'dense': 'synthetic images with two maps per pixel.',
}
# Sizes of the settings of `tabular` that are one row, or one pupil per school.
_UNITS = {'adult': 0.25, 'school': 8}
SCHOOLS = 5  # The largest schools: with all 139, weights are too costly.


GRID = compare.Grid(
  (2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1), (1e-2, 3e-2), max_grid_extensions=0
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    methods: methods to compare.
    datasets: sarcos, adult, school, multi_mnist, multi_fashion or dense.
    batches: batch sizes, ascending: rows, pupils per school, or images.
    steps: training steps, the same for all batch sizes.
    hidden: units of each of the two hidden layers of the trunk; not of `dense`.
    grid: grid of the tuning, for each batch size.
    bias_samples: batches of a measured bias.
    pool: side of the average-pooling window of Multi-MNIST.
    evaluated: pairs of the validation data of Multi-MNIST, and of the test
      data.
    seeds: number of seeds, for initial weights and batches.
  """

  methods: compare.Methods = (*MEMORYLESS, *MOCO, 'famo')
  datasets: Annotated[
    tuple[str, ...], harness.Among(DATA_MEANINGS, DATA_MEANINGS)
  ] = (
    'sarcos',
    'adult',
    'school',
  )
  batches: tuple[int, ...] = (4, 16, 64, 256)
  steps: int = 300
  hidden: int = 16
  grid: compare.Grid = GRID
  bias_samples: int = 64
  pool: int = 2
  evaluated: int = 2_000
  seeds: int = 5


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    methods=('mean', 'smg', 'moco', 'moco_exact'),
    datasets=('dense',),
    batches=(4, 16),
    steps=40,
    grid=compare.Grid((5e-3, 1e-2, 2e-2), (1e-2,), max_grid_extensions=0),
    bias_samples=16,
    seeds=2,
  ),
  'paper': Settings(
    datasets=(*DATA, 'dense'),
    steps=5_000,
    hidden=128,
    bias_samples=256,
    evaluated=10_000,
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  compare.check(settings)
  batches = settings.batches
  if len(batches) < 2 or list(batches) != sorted({*batches}):
    raise harness.SettingsError(
      f'batches must be two or more ascending sizes, got {batches}.'
    )
  if not {'mean', 'moco_exact'} <= {*settings.methods}:
    raise harness.SettingsError(
      'methods must include mean and moco_exact, whose directions are measured.'
    )


def select_largest(data: Mapping[str, Any], count: int) -> dict[str, Any]:
  """Selects the schools with most pupils for training."""
  largest = np.argsort(-np.asarray(data['train'][2]), kind='stable')[:count]
  return {part: tuple(x[largest] for x in data[part]) for part in data}


def load(
  name: str, settings: Settings, data_dir: str | None
) -> tuple[problems.Problem, harness.Source]:
  """Loads a problem whose batch sizes count rows, pupils per school or images.

  Args:
    name: name of the data set.
    settings: settings of the run.
    data_dir: folder of data sets, or None.

  Returns:
    The problem, and the source of its data.
  """
  if name == 'dense':
    data, source = dense_toy.make_images()
    return dense_toy.make_problem(data), source
  if name.startswith('multi_'):
    folder = 'fashion' if name == 'multi_fashion' else ''
    digits, source = multi_mnist.load(str(pathlib.Path(data_dir, folder)))
    images = multi_mnist.Settings(
      hidden=settings.hidden, pool=settings.pool, evaluated=settings.evaluated
    )
    problem = multi_mnist.make_problem(images, digits)
    return problem._replace(name=name), source
  data, source = tabular_data.read(name, data_dir)
  if name == 'school':
    data = select_largest(data, SCHOOLS)
  make = tabular.PROBLEMS.get(name, tabular.regression_problem)
  problem = make(name, data, tabular.Settings(hidden=settings.hidden))
  unit = _UNITS.get(name, 1)
  draw = lambda key, data, size: problem.batch(key, data, int(unit * size))
  return problem._replace(batch=draw), source


def single_scores(runs: compare.Runs) -> np.ndarray:
  """Test scores of single-task models, (tasks,)."""
  problem = runs.problem
  if problem.name.startswith('school'):
    return tabular.ridge_baseline(problem.data)
  singles = [runs.run(f'only {i}') for i in range(len(problem.tasks))]
  scores = np.concatenate([runs.scores(one) for one in singles], axis=1)
  return scores.mean(axis=0)


def add_leads(
  results: harness.Results,
  data: str,
  changes: Mapping[tuple[str, int], np.ndarray],
) -> dict[tuple[str, str], list[np.ndarray]]:
  """Adds the leads of MoCo over methods without memory, and their growth.

  Args:
    results: receives the metrics.
    data: name of the data set.
    changes: dm % per seed by method and batch size.

  Returns:
    Leads by MoCo variant and other method, or `all` for the mean over methods
    without memory, at ascending batch sizes.
  """
  batches = sorted({batch for _, batch in changes})
  names = {method for method, _ in changes}
  others = [name for name in MEMORYLESS if name in names]
  leads = {}
  for moco in (name for name in MOCO if name in names):
    for other in ('all', *others):
      values = leads[moco, other] = [
        np.mean([changes[n, batch] for n in others], axis=0)
        - changes[moco, batch]
        if other == 'all'
        else changes[other, batch] - changes[moco, batch]
        for batch in batches
      ]
      growth = {'lead_growth': values[0] - values[-1]}
      if other != 'all':
        if moco == 'moco_exact':  # `results.json` must stay small.
          place = {'method': moco, 'over': other, 'data': data}
          results.put(place, growth)
        continue
      results.put({'method': moco, 'data': data}, growth)
      for batch, lead in zip(batches, values, strict=True):
        place = {'method': moco, 'data': data, 'batch': batch}
        results.put(place, {'lead': lead})
  return leads


def compare_batches(
  problem: problems.Problem, options: harness.Options, results: harness.Results
) -> list[harness.Panel]:
  """Compares all methods on one data set at each batch size.

  Args:
    problem: problem to learn.
    options: options of the run, with `Settings`.
    results: receives the metrics, at the coordinates `method`, `data` and
      `batch`.

  Returns:
    Panels of the leads and of the biases by batch size.
  """
  settings, data = options.settings, problem.name
  changes, biases, edges, single = {}, {}, [], None
  # The largest batches first, because they give the baseline.
  for batch in sorted(settings.batches, reverse=True):
    run_options = options._replace(
      settings=compare.Settings(
        methods=settings.methods,
        steps=settings.steps,
        chunk=-(-settings.steps // 2),
        batch=batch,
        hidden=settings.hidden,
        grid=settings.grid,
        bias_batches=(),
        seeds=settings.seeds,
      )
    )
    named = problem._replace(name=f'{data}/batch_{batch}')
    runs = compare.Runs(named, run_options)
    if single is None:
      single = single_scores(runs)
    outcomes = runs.compare(settings.methods)
    for method, outcome in outcomes.items():
      place = {'method': method, 'data': data, 'batch': batch}
      if outcome.failure:
        results.note(place, {'dm': outcome.failure})
        changes[method, batch] = np.full(len(options.seeds), np.nan)
        continue
      scores = runs.scores(outcome)
      changes[method, batch] = methods.relative_change(
        scores, single, problem.higher_is_better
      )
      results.add(place, dm=changes[method, batch])
      if method in MOCO:
        results.add(place, own=outcome.point['own'])
      if methods.hyperparameter(method) is None:
        edges.append('rate' in outcome.edges)
    points = [outcomes[n].point for n in ('mean', 'moco_exact')]
    trained = direction_errors.train_watched(
      runs, run_options, points, settings.bias_samples
    )
    errors = direction_errors.add_errors(
      results, {'data': data, 'batch': batch}, trained
    )
    for name, values in errors.items():
      biases.setdefault(name, []).insert(0, values)
  # How often the best of six rates is at an end of the grid.
  results.add({'data': data}, edges=sum(edges), choices=len(edges))
  leads = add_leads(results, data, changes)
  batches = sorted(settings.batches)
  draw = lambda curves, ylabel, **axes: harness.Panel(
    {label: (batches, np.array(values)) for label, values in curves.items()},
    xlabel='batch size',
    ylabel=ylabel,
    title=data,
    logx=True,
    **axes,
  )
  drawn = {
    f'{moco} over {other}': leads[moco, other]
    for moco, other in (
      ('moco_exact', 'all'),
      ('moco_exact', 'smg'),
      ('moco_exact', 'mean'),
      ('moco', 'all'),
    )
    if (moco, other) in leads
  }
  return [
    draw(drawn, 'lead of MoCo, dm %'),
    draw(biases, 'relative bias of the direction', logy=True),
  ]


def add_means(
  results: harness.Results, names: Sequence[str], batches: Sequence[int]
) -> None:
  """Adds growths from the largest to the smallest batches, over data sets.

  Args:
    results: metrics of all data sets; receives the means.
    names: names of the data sets.
    batches: batch sizes, ascending.
  """
  values = lambda name: np.array(results[name].per_seed)
  mean = lambda growth: np.mean([growth(name) for name in names], axis=0)
  for moco in MOCO:
    if f'lead_growth/{moco}/{names[0]}' in results.metrics():
      lead = mean(lambda name, m=moco: values(f'lead_growth/{m}/{name}'))
      results.add({'method': moco}, lead_growth=lead)
  at = lambda name, batch: values(f'bias/smg/{name}/batch={batch}')
  bias = mean(lambda name: at(name, batches[0]) - at(name, batches[-1]))
  results.add({'method': 'smg'}, bias_growth=bias)


def main(options: harness.Options) -> harness.Report:
  """Compares all methods on all data sets."""
  settings, results = options.settings, harness.Results()
  names = [
    name for name in settings.datasets if options.data_dir or name == 'dense'
  ] or ['dense']
  # Reads all data first: a missing file is an error before any training.
  loaded = [load(name, settings, options.data_dir) for name in names]
  panels: list[harness.Panel] = []
  for problem, source in loaded:
    print(f'Data: {source.words}.', flush=True)
    panels += compare_batches(problem, options, results)
  add_means(results, names, settings.batches)
  figure = harness.draw_panels(panels)
  for axes in figure.axes[::2]:
    axes.axhline(0, color='black', linewidth=0.8)
  at = lambda measure: [
    harness.Column(measure, f'{measure}, batch {batch}', {'batch': batch})
    for batch in settings.batches
  ]
  return harness.Report(
    results,
    rows=('data', 'method'),
    columns=at('dm'),
    plots={'lead.png': figure},
    data=[source for _, source in loaded],
    published=[n for n in settings.datasets if n in tabular.PUBLISHED],
  )


STUDY = harness.Study(main, PRESETS, check=check)


if __name__ == '__main__':
  harness.run(STUDY)
