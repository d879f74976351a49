"""Compares multi-objective methods on one problem, with equal tuning for all.

Every method, single-task nets included, gets the same steps, batches and number
of trials: a method with a hyperparameter of its own tries three values of it at
each of a few learning rates, one without tries three times as many learning
rates. The trial is chosen on validation data, as the mean over seeds of the
mean score over tasks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.harness import comparison
from experiments.moco import bias, methods
from experiments.moco import problem as problems

VALUES = 3  # Of a method's own hyperparameter.
LAST = (
  'dm',
  'bias, SMG / own',
  'rate',
  'own',
  'step_seconds',
  'trials',
  'seconds',
)
SHOWN = 9  # Measures in the table, at most.
# Settings of the grid: what is tried is kept with each run.
APART = ('rates', 'rates_beside_own', 'widen')


class Grid(NamedTuple):
  """The learning rates that are tried.

  Attributes:
    alone: by methods without a hyperparameter of their own.
    beside_own: by the others, at each value of theirs: a third as many.
  """

  alone: tuple[float, ...]
  beside_own: tuple[float, ...]


def check(names: tuple[str, ...], grid: Grid) -> None:
  """Raises SettingsError for methods or rates that no comparison can have."""
  unknown = set(names) - set(methods.EVERY)
  if unknown or not names:
    raise harness.SettingsError(
      f'unknown methods {sorted(unknown)}; known: {", ".join(methods.EVERY)}.'
    )
  trials, few = len(grid.alone), len(grid.beside_own)
  if not few or trials != VALUES * few:
    raise harness.SettingsError(
      f'rates are {VALUES} times as many as rates_beside_own, so that every '
      f'method has as many trials: got {trials} and {few}.'
    )


def make_solver(
  problem: problems.Problem,
  name: str,
  rate: Any,
  own: Any,
  steps: int,
  key: Any,
):
  """A method by name, `only <task>` for a single-task net, with Adam.

  The learning rate decays by a cosine, for every method.

  Args:
    problem: what to learn.
    name: of the method.
    rate: the first learning rate.
    own: index of its own hyperparameter's value.
    steps: of the run.
    key: of random methods.

  Returns:
    A solver.
  """
  schedule = optax.cosine_decay_schedule(1.0, steps)
  adam = optax.chain(
    optax.scale_by_adam(),
    optax.scale_by_schedule(schedule),
    optax.scale(-1.0 * rate),
  )
  count = len(problem.tasks)
  if name.startswith('only '):
    task = int(name.removeprefix('only '))
    loss = lambda params, batch: problem.losses(params, batch)[task]
    return optax.chain(bj.gradient(loss), adam)
  value = methods.own_value(name, own)
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
    problem: what to learn.
    options: what the flags say.
    steps: of every method.
    chunk: steps between two records.
    grid: the learning rates that are tried.
    settings: of the run, for its folder.
    at_once: members that run side by side, as in `harness.train`.
    widenings: how often a grid may grow.
  """

  def __init__(
    self,
    problem: problems.Problem,
    options: harness.Options,
    *,
    steps: int,
    chunk: int,
    grid: Grid,
    settings: Any,
    at_once: int | None = None,
    widenings: int = 3,
  ) -> None:
    self._problem, self._grid = problem, grid
    self._steps, self._chunk, self._at_once = steps, chunk, at_once
    measures = problem.measured()
    mixed = len({measure.higher_is_better for measure in measures}) > 1
    better = 1.0 if mixed or measures[0].higher_is_better else -1.0
    self._rules = comparison.Rules(
      options,
      settings=settings,
      score=lambda trained: better * trained.history['validation/mean'][-1],
      widenings=widenings,
    )

  def run(self, name: str) -> comparison.Outcome:
    """Trains a method for all trials and seeds, and chooses a trial."""
    return comparison.run(self._rules, name, self._train, self._grid_of(name))

  def compare(self, names: tuple[str, ...]) -> dict[str, comparison.Outcome]:
    """Likewise, several methods, all with as many trials at first."""
    return comparison.compare(self._rules, names, self._train, self._grid_of)

  def scores(self, outcome: comparison.Outcome) -> np.ndarray:
    """The measures on the test data at the end, (seeds, measures)."""
    count = len(outcome.members)
    last = jax.jit(
      lambda params, part: jax.lax.map(
        lambda one: self._score(outcome.method, one, part),
        params,
        batch_size=self._at_once or count,
      )
    )(
      jax.tree.map(
        lambda x: jnp.asarray(x)[outcome.members], outcome.trained.params
      ),
      self._problem.data['test'],
    )
    stopped = np.isnan(outcome.last('test/mean'))
    return np.where(stopped[:, None], np.nan, np.asarray(last, np.float64))

  def step_seconds(self, outcome: comparison.Outcome) -> float:
    """Wall time of one step of one seed, without compilation."""
    members = outcome.trained.history['test/mean'].shape[1]
    return outcome.trained.seconds / (self._steps * members)

  def _grid_of(self, name):
    own = None if name.startswith('only ') else methods.own(name)
    if own is None:
      return {'own': (0,), 'rate': self._grid.alone}
    values = comparison.among(range(len(own.values)))
    return {'own': values, 'rate': self._grid.beside_own}

  def _score(self, name, params, part):
    measures = self._problem.measured()
    every = range(len(measures))
    alone = name.startswith('only ')
    kept = [i for i in every if not alone or name == _only(measures[i])]
    return self._problem.score(params, part)[jnp.array(kept)]

  def _train(self, job):
    problem, name = self._problem, job.method
    measures = problem.measured()
    if name.startswith('only '):
      measures = [m for m in measures if name == _only(m)]

    def solver(context):
      rate, own = context.hyper['rate'], context.hyper['own'].astype(int)
      key = jax.random.key(17)
      return make_solver(problem, name, rate, own, self._steps, key)

    def evaluate(context, params, state):
      found = {
        f'{part}/mean': problems.summary(
          measures, self._score(name, params, context.data[part])
        )
        for part in ('validation', 'test')
      }
      if not name.startswith('only '):
        weights = bj.diagnostics.objective_weights(state)
        shown = weights[: min(len(weights), 8)]
        found |= {f'weight/{i}': weight for i, weight in enumerate(shown)}
      return found

    return harness.train(
      solver,
      init=lambda context: problem.init(context.seed_key),
      batch=lambda context: problem.batch(context.key, context.data),
      steps=self._steps,
      chunk=self._chunk,
      data=problem.data,
      evaluate=evaluate,
      at_once=self._at_once,
      **job.keywords | {'name': f'{problem.name}/{job.keywords["name"]}'},
    )


def _only(measure):
  return f'only {measure.task}'


def compare(
  problem: problems.Problem,
  names: tuple[str, ...],
  options: harness.Options,
  *,
  baseline: np.ndarray | None = None,
  by_batch: dict[int, problems.Problem] | None = None,
  **given: Any,
) -> tuple[
  dict[str, float], list[dict[str, Any]], dict[str, comparison.Outcome]
]:
  """Runs all methods; gives metrics, rows of the table and outcomes.

  Args:
    problem: what to learn.
    names: methods.
    options: what the flags say.
    baseline: test scores (measures,) of single-task models where they are
      fitted otherwise.
    by_batch: the same problem with other sizes of a batch, at which biases are
      measured, see `bias`; the last is that of the training; empty for none.
    **given: further arguments of `Runs`.

  Returns:
    Metrics by stable name, rows and outcomes by method.
  """
  runs = Runs(problem, options, **given)
  measures, place = problem.measured(), problem.name
  if baseline is None:
    # The measures of a task stand together.
    alone = [runs.run(f'only {i}') for i in range(len(problem.tasks))]
    baseline = np.concatenate([runs.scores(one).mean(axis=0) for one in alone])
  better = np.array([measure.higher_is_better for measure in measures])
  outcomes = runs.compare(names)

  def measure(outcome):
    score = runs.scores(outcome)
    found = {}
    if len(measures) <= SHOWN:
      found = {each.name: score[:, i] for i, each in enumerate(measures)}
    if len(set(better)) == 1:
      found[problem.metric] = score.mean(axis=-1)
    found['dm'] = methods.relative_change(score, baseline, better)
    return found | {'step_seconds': runs.step_seconds(outcome)}

  metrics, rows = comparison.report_outcomes(outcomes, measure, where=place)
  for each, value in zip(measures, baseline):
    metrics[f'single/{place}/{each.name}'] = float(value)
  biases, ratios = bias.measure(place, by_batch or {}, outcomes)
  for row in rows:
    own = methods.own(row['method'])
    if 'own' in row:
      row['own'] = own.label(int(float(row['own']))) if own else ''
    if row['method'] in ratios:
      row['bias, SMG / own'] = ratios[row['method']]
  return metrics | biases, rows, outcomes


def columns(rows: list[dict[str, Any]]) -> list[str]:
  """Columns of a table of rows that have not all the same."""
  every = dict.fromkeys(column for row in rows for column in row)
  last = [c for c in LAST if c in every]
  return [*(c for c in every if c not in last), *last]


def curves_of(
  outcomes: dict[str, comparison.Outcome],
) -> dict[str, np.ndarray]:
  """The mean test score over steps at the chosen trial, by method."""
  return {
    name: outcome.values('test/mean')
    for name, outcome in outcomes.items()
    if not outcome.failure
  }


def plot(
  path: Any,
  outcomes: dict[str, comparison.Outcome],
  metric: str,
  ylabel: str,
  title: str,
) -> None:
  """A metric over steps, at the chosen trials of a few methods."""
  shown = ('moco', 'moco_exact', 'smg', 'mean', 'cagrad', 'upgrad')
  curves = {
    name: (outcomes[name].trained.steps, outcomes[name].values(metric))
    for name in shown
    if name in outcomes and not outcomes[name].failure
  }
  harness.plot_curves(path, curves, xlabel='step', ylabel=ylabel, title=title)


def plot_both(
  folder: Any,
  name: str,
  outcomes: dict[str, comparison.Outcome],
  ylabel: str,
  title: str,
) -> None:
  """The first objective's weight and the mean test score over steps."""
  weight = 'weight of the first objective'
  plot(folder / f'{name}_weights.png', outcomes, 'weight/0', weight, title)
  plot(folder / f'{name}.png', outcomes, 'test/mean', ylabel, title)
