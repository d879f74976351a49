"""Compares multi-objective methods on one problem, with equal tuning.

Each method, including single-task networks, gets the same steps, batches and
number of trials. A method with its own hyperparameter tries three of its values
at a few learning rates; other methods try three times as many learning rates.
The trial with the best validation score, averaged over seeds and tasks, is
chosen.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.harness.study import comparison
from experiments.moco import bias, methods
from experiments.moco import problem as problems

VALUES = 3  # Number of values of a method's own hyperparameter.
MAX_TASKS = 9  # Up to this number, each task has metrics and a column.
CURVES = ('moco', 'moco_exact', 'smg', 'mean', 'cagrad', 'upgrad')
# Settings that no single run depends on.
COMPARISON_SETTINGS = ('methods', 'bias_batches', 'datasets', 'grid')

Outcomes = dict[str, comparison.Outcome]
Sizes = Annotated[tuple[int, ...], harness.Allowed(empty=True)]
Methods = Annotated[
  tuple[str, ...], harness.Among(methods.EVERY, methods.MEANINGS)
]


@dataclasses.dataclass(frozen=True)
class Grid:
  """Grid of the tuning.

  Attributes:
    rates: learning rates of methods without an own hyperparameter.
    extra_learning_rates: learning rates per hyperparameter value of the other
      methods, a third as many. One of each for no tuning.
    max_grid_extensions: how often the rates may be extended when the best one
      is at an end.
  """

  rates: tuple[float, ...]
  extra_learning_rates: tuple[float, ...]
  max_grid_extensions: Annotated[int, harness.Allowed(0)] = 3

  def axes(self, name: str) -> comparison.Grid:
    """Axes of the grid of a method, or of `only <task>`."""
    if name.startswith('only ') or methods.hyperparameter(name) is None:
      return {'own': (0,), 'rate': self.rates}
    values = range(VALUES if len(self.rates) > 1 else 1)
    return {'own': comparison.among(values), 'rate': self.extra_learning_rates}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a comparison on a perceptron.

  Attributes:
    methods: methods to compare.
    steps: training steps.
    chunk: steps between two records.
    batch: batch size.
    hidden: units of each of the two hidden layers of the trunk.
    grid: grid of the tuning.
    bias_batches: batch sizes of the measured biases; the last, usually that of
      training, gives the metric `bias_ratio`. Empty to skip.
    seeds: number of seeds, for initial weights and batches.
  """

  methods: Methods = methods.EVERY
  steps: int = 500
  chunk: int = 100
  batch: int = 64
  hidden: int = 64
  grid: Grid = Grid((1e-3, 3e-3, 1e-2), (3e-3,))
  bias_batches: Sizes = (4, 16, 64)
  seeds: int = 5


# Former flags of the grid.
RENAMED = {
  'rates_beside_own': 'grid.extra_learning_rates',
  'grid.rates_beside_own': 'grid.extra_learning_rates',
  'widen': 'grid.max_grid_extensions',
  'grid.widen': 'grid.max_grid_extensions',
}
# Small settings of the smoke presets.
SMOKE: dict[str, Any] = {
  'methods': ('mean', 'moco', 'moco_no_memory', 'moco_exact'),
  'steps': 100,
  'chunk': 50,
  'batch': 32,
  'bias_batches': (32,),
  'seeds': 3,
}


def check(settings: Any) -> None:
  """Raises SettingsError unless all methods have the same number of trials."""
  grid = settings.grid
  trials, few = len(grid.rates), len(grid.extra_learning_rates)
  if trials != VALUES * few and not trials == few == 1:
    raise harness.SettingsError(
      f'grid.rates must be {VALUES} times as many as grid.extra_learning_rates '
      f'for equal numbers of trials, got {trials} and {few}.'
    )


def make_adam(rate: Any, steps: int) -> optax.GradientTransformation:
  """Makes Adam with cosine decay."""
  schedule = optax.cosine_decay_schedule(1.0, steps)
  return optax.chain(
    optax.scale_by_adam(),
    optax.scale_by_schedule(schedule),
    optax.scale(-1.0 * rate),
  )


def make_solver(
  problem: problems.Problem,
  name: str,
  rate: Any,
  own: Any,
  steps: int,
  key: Any,
):
  """Makes a method by name with Adam and cosine decay.

  Args:
    problem: problem to learn.
    name: name of the method, or `only <task>` for a single-task network.
    rate: initial learning rate.
    own: index of the value of the method's own hyperparameter.
    steps: number of training steps.
    key: PRNG key of random methods.

  Returns:
    A solver.
  """
  adam = make_adam(rate, steps)
  count = len(problem.tasks)
  if name.startswith('only '):
    task = int(name.removeprefix('only '))
    loss = lambda params, batch: problem.losses(params, batch)[task]
    return optax.chain(bj.gradient(loss), adam)
  value = methods.hyperparameter_value(name, own)
  if name == 'famo':
    return bj.solvers.famo(
      problem.losses, count, optimiser=adam, weight_rate=value
    )
  oracle = problem.oracle()
  if name == 'moco_plus':
    like = bj.oracles.jacobian_like(count, rest=('heads',))
    oracle = bj.evaluation.storm(oracle, methods.share(*value), like=like)
    link = bj.aggregators.moco(
      count, tracking=1.0, weight_step=methods.decay(0.1), rest=('heads',)
    )
    return optax.chain(oracle, link, adam)
  method = methods.METHODS[name]
  if method.samples > 1:
    oracle = bj.evaluation.independent(
      oracle, method.samples, split=problem.split
    )
  return optax.chain(oracle, method.make(count, key, ('heads',), value), adam)


class Runs:
  """Runs methods on one problem.

  Args:
    problem: problem to learn.
    options: options of the run, with `Settings`.
  """

  def __init__(
    self, problem: problems.Problem, options: harness.Options
  ) -> None:
    self.problem, self._settings = problem, options.settings
    settings = options.settings
    sign = 1.0 if problem.higher_is_better else -1.0
    self._rules = comparison.Rules(
      options,
      settings=harness.run_settings(settings, *COMPARISON_SETTINGS),
      score=lambda trained: sign * trained.history['validation/mean'][-1],
      widenings=settings.grid.max_grid_extensions,
    )

  def run(self, name: str) -> comparison.Outcome:
    """Trains a method with all trials and seeds, and chooses a trial."""
    grid = self._settings.grid.axes(name)
    return comparison.run(self._rules, name, self._train, grid)

  def compare(self, names: Sequence[str]) -> Outcomes:
    """Runs several methods, with the same initial number of trials."""
    axes = self._settings.grid.axes
    return comparison.compare(self._rules, names, self._train, axes)

  def scores(self, outcome: comparison.Outcome) -> np.ndarray:
    """Final test scores, (seeds, tasks)."""
    count = len(outcome.members)
    last = jax.jit(
      lambda params, part: jax.lax.map(
        lambda one: self._score(outcome.method, one, part),
        params,
        batch_size=count,
      )
    )(
      jax.tree.map(
        lambda x: jnp.asarray(x)[outcome.members], outcome.trained.params
      ),
      self.problem.data['test'],
    )
    stopped = np.isnan(outcome.last('test/mean'))
    return np.where(stopped[:, None], np.nan, np.asarray(last, np.float64))

  def step_seconds(self, outcome: comparison.Outcome) -> float:
    """Wall time per step and seed, without compilation."""
    members = outcome.trained.history['test/mean'].shape[1]
    return outcome.trained.seconds / (self._settings.steps * members)

  def _score(self, name, params, part):
    tasks = range(len(self.problem.tasks))
    if name.startswith('only '):
      tasks = [int(name.removeprefix('only '))]
    return self.problem.score(params, part)[jnp.array(tasks)]

  def _train(self, job):
    problem, name = self.problem, job.method

    def solver(context):
      rate, own = context.hyper['rate'], context.hyper['own'].astype(int)
      key = jax.random.key(17)
      return make_solver(problem, name, rate, own, self._settings.steps, key)

    def evaluate(context, params, state):
      metrics = {
        f'{part}/mean': jnp.mean(self._score(name, params, context.data[part]))
        for part in ('validation', 'test')
      }
      if not name.startswith('only '):
        weights = bj.diagnostics.objective_weights(state)
        metrics |= {f'weight/{i}': w for i, w in enumerate(weights[:8])}
      return metrics

    settings = self._settings
    return harness.train(
      solver,
      harness.Task(
        init=lambda context: problem.init(context.seed_key),
        batch=lambda context: problem.batch(
          context.key, context.data, settings.batch
        ),
        data=problem.data,
        hyper=job.hyper,
      ),
      job.training(
        settings.steps, settings.chunk, name=f'{problem.name}/{job.name}'
      ),
      harness.Measure(evaluate),
    )


def compare(
  runs: Runs,
  results: harness.Results,
  names: Sequence[str],
  *,
  baseline: np.ndarray | None = None,
  bias_batches: Sequence[int] = (),
) -> tuple[Outcomes, dict[str, harness.Interval]]:
  """Runs all methods, and adds their metrics.

  Args:
    runs: runs on the problem.
    results: receives the metrics, at the coordinates `method`, `data` and, for
      single tasks, `task`.
    names: methods to compare.
    baseline: test scores (tasks,) of single-task models; by default,
      single-task networks are trained.
    bias_batches: batch sizes of the measured biases, see `bias`.

  Returns:
    Outcomes and bias ratios by method.
  """
  problem, at = runs.problem, {'data': runs.problem.name}
  if baseline is None:
    singles = [runs.run(f'only {i}') for i in range(len(problem.tasks))]
    single = np.concatenate([runs.scores(one) for one in singles], axis=1)
  else:
    single = baseline[None]
  outcomes = runs.compare(names)
  scores = {
    name: runs.scores(outcome)
    for name, outcome in outcomes.items()
    if not outcome.failure
  }
  for name, score in (*scores.items(), ('single_task', single)):
    if len(problem.tasks) <= MAX_TASKS or name == 'single_task':
      for task, values in zip(problem.tasks, score.T, strict=True):
        place = {'method': name, **at, 'task': task}
        results.put(place, {problem.metric: values})

  def measure(outcome):
    score = scores[outcome.method]
    change = methods.relative_change(
      score, single.mean(axis=0), problem.higher_is_better
    )
    return {
      problem.metric: score.mean(axis=-1),
      'dm': change,
      'step_seconds': runs.step_seconds(outcome),
    }

  comparison.add_outcomes(results, outcomes, measure, at)
  note_hyperparameters(results, outcomes, at)
  return outcomes, bias.measure(results, problem, bias_batches, outcomes)


def note_hyperparameters(
  results: harness.Results,
  outcomes: Mapping[str, comparison.Outcome],
  at: Mapping[str, Any],
) -> None:
  """Notes the chosen values of own hyperparameters in the table."""
  for name, outcome in outcomes.items():
    if not outcome.failure:
      own = methods.hyperparameter(name)
      label = own.label(int(outcome.point['own'])) if own else ''
      results.note({'method': name, **at}, {'own': label})


def report(
  results: harness.Results,
  compared: Sequence[tuple[problems.Problem, Outcomes]],
  **more: Any,
) -> harness.Report:
  """Makes the report of a binary, with a table, curves and plots.

  Args:
    results: metrics of all problems.
    compared: problems, each with its outcomes by method.
    **more: further fields of the report.
  """
  columns, curves, plots = [], {}, {}
  for problem, outcomes in compared:
    few = len(problem.tasks) <= MAX_TASKS
    columns += [
      harness.Column(problem.metric, task, {'task': task})
      for task in (problem.tasks if few else ())
    ]
    columns.append(harness.Column(problem.metric))
    finished = {n: one for n, one in outcomes.items() if not one.failure}
    for name, one in finished.items():
      curves[f'{problem.name}/{name}'] = one.values('test/mean')
    for end, metric, ylabel in (
      ('', 'test/mean', f'mean test {problem.metric}'),
      ('_weights', 'weight/0', 'weight of the first objective'),
    ):
      drawn = {
        name: (finished[name].trained.steps, finished[name].values(metric))
        for name in CURVES
        if name in finished
      }
      plots[f'{problem.name}{end}.png'] = harness.draw_curves(
        drawn,
        xlabel='step',
        ylabel=ylabel,
        title=f'{problem.name}, learning rate chosen on validation data',
      )
  columns += ['dm', harness.Column('bias_ratio', 'bias, SMG / own')]
  columns += ['rate', 'own', 'step_seconds', 'trials', 'seconds']
  return harness.Report(
    results,
    rows=('data', 'method'),
    columns=columns,
    curves=curves,
    plots=plots,
    **more,
  )
