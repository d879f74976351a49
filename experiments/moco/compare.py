"""Compares multi-objective methods on one problem, with equal tuning for all.

Every method, single-task nets included, gets the same steps, batches and number
of trials: a method with a hyperparameter of its own tries three values of it at
each of a few learning rates, one without tries three times as many learning
rates. The trial is chosen on validation data, as the mean over seeds of the
mean score over tasks.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.moco import bias, methods
from experiments.moco import problem as problems

VALUES = 3  # Of a method's own hyperparameter.
SHOWN = 9  # Measures in the table, at most.


class Grid(NamedTuple):
  """The learning rates that are tried.

  Attributes:
    alone: by methods without a hyperparameter of their own.
    beside_own: by the others, at each value of theirs: a third as many.
  """

  alone: tuple[float, ...]
  beside_own: tuple[float, ...]


class Outcome(NamedTuple):
  """What a method came to.

  Attributes:
    rate: the chosen learning rate.
    own: the chosen index of its own hyperparameter's values, or 0.
    score: the measures on the test data, (seeds, measures).
    trained: the run, all trials.
    members: indices of the seeds at the chosen trial.
    at_own: such indices at the best rate for each value of its own
      hyperparameter.
    step_seconds: wall time of one step of one seed, without compilation.
  """

  rate: float
  own: int
  score: np.ndarray
  trained: harness.Trained
  members: np.ndarray
  at_own: tuple[np.ndarray, ...]
  step_seconds: float


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


def run(
  problem: problems.Problem,
  name: str,
  options: harness.Options,
  *,
  steps: int,
  chunk: int,
  grid: Grid,
  settings: Any,
  at_once: int | None = None,
) -> Outcome:
  """Trains a method for all trials and seeds, and chooses a trial."""
  own = None if name.startswith('only ') else methods.own(name)
  rates = grid.alone if own is None else grid.beside_own
  values = range(1 if own is None else len(own.values))
  seeds, hyper = harness.members(options.seeds, own=tuple(values), rate=rates)
  every = problem.measured()
  kept = [
    i
    for i, measure in enumerate(every)
    if not name.startswith('only ') or name == f'only {measure.task}'
  ]
  measures = [every[i] for i in kept]
  mixed = len({measure.higher_is_better for measure in measures}) > 1
  better = 1.0 if mixed or measures[0].higher_is_better else -1.0

  def score(params, part):
    return problem.score(params, part)[jnp.array(kept)]

  def solver(hyper):
    key = jax.random.key(17)
    return make_solver(problem, name, hyper['rate'], hyper['own'], steps, key)

  def evaluate(context, params, state):
    found = {
      f'{part}/mean': problems.summary(
        measures, score(params, context.data[part])
      )
      for part in ('validation', 'test')
    }
    if not name.startswith('only '):
      weights = bj.diagnostics.objective_weights(state)
      shown = weights[: min(len(weights), 8)]
      found |= {f'weight/{i}': weight for i, weight in enumerate(shown)}
    return found

  trained = harness.train(
    solver,
    init=lambda context: problem.init(context.seed_key),
    batch=lambda context: problem.batch(context.key, context.data),
    steps=steps,
    chunk=chunk,
    seeds=seeds,
    hyper=hyper,
    data=problem.data,
    evaluate=evaluate,
    workdir=options.workdir,
    name=f'{problem.name}/{name}',
    settings=settings,
    at_once=at_once,
  )
  count = len(options.seeds)
  validation = better * trained.history['validation/mean'][-1]
  validation = validation.reshape(len(values), len(rates), count)
  # A trial with a seed that stopped is not chosen.
  by_trial = np.nan_to_num(validation.mean(axis=-1), nan=-np.inf)
  at = lambda own, rate: np.arange(count) + (own * len(rates) + rate) * count
  best = [int(np.argmax(of_own)) for of_own in by_trial]
  chosen = int(np.argmax(by_trial.max(axis=1)))
  members = at(chosen, best[chosen])
  last = jax.jit(
    lambda params, part: jax.lax.map(
      lambda one: score(one, part), params, batch_size=at_once or count
    )
  )(
    jax.tree.map(lambda x: jnp.asarray(x)[members], trained.params),
    problem.data['test'],
  )
  stopped = np.isnan(trained.history['test/mean'][-1][members])
  scores = np.where(stopped[:, None], np.nan, np.asarray(last, np.float64))
  return Outcome(
    rate=rates[best[chosen]],
    own=chosen,
    score=scores,
    trained=trained,
    members=members,
    at_own=tuple(at(i, rate) for i, rate in enumerate(best)),
    step_seconds=trained.seconds / (steps * len(seeds)),
  )


def compare(
  problem: problems.Problem,
  names: tuple[str, ...],
  options: harness.Options,
  *,
  steps: int,
  chunk: int,
  grid: Grid,
  settings: Any,
  at_once: int | None = None,
  baseline: np.ndarray | None = None,
  by_batch: dict[int, problems.Problem] | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, Outcome]]:
  """Runs all methods; gives metrics, rows of the table and outcomes.

  Args:
    problem: what to learn.
    names: methods.
    options: what the flags say.
    steps: of every method.
    chunk: steps between two records.
    grid: the learning rates that are tried.
    settings: of the run, for its folder.
    at_once: members that run side by side, as in `harness.train`.
    baseline: test scores (measures,) of single-task models where they are
      fitted otherwise.
    by_batch: the same problem with other sizes of a batch, at which biases are
      measured, see `bias`; the last is that of the training; empty for none.

  Returns:
    Metrics by stable name, rows and outcomes by method.
  """
  start = time.monotonic()
  given = {
    'steps': steps,
    'chunk': chunk,
    'grid': grid,
    'settings': settings,
    'at_once': at_once,
  }
  measures = problem.measured()
  if baseline is None:
    # The measures of a task stand together.
    baseline = np.concatenate(
      [
        np.nanmean(run(problem, f'only {i}', options, **given).score, axis=0)
        for i in range(len(problem.tasks))
      ]
    )
  outcomes, metrics, rows = {}, {}, []
  better = np.array([measure.higher_is_better for measure in measures])
  place = problem.name
  for measure, value in zip(measures, baseline):
    metrics[f'single/{place}/{measure.name}'] = float(value)
  for name in names:
    outcome = outcomes[name] = run(problem, name, options, **given)
    change = methods.relative_change(outcome.score, baseline, better)
    row: dict[str, Any] = {'method': name}
    shown = measures if len(measures) <= SHOWN else ()
    for i, measure in enumerate(shown):
      interval = harness.mean_interval(outcome.score[:, i])
      # Without their intervals: there may be many of them.
      metrics[f'{name}/{place}/{measure.name}'] = harness.reduced(
        outcome.score[:, i], 'mean'
      )
      row[measure.name] = interval
    if len(set(better)) == 1:
      interval = harness.mean_interval(outcome.score.mean(axis=-1))
      metrics |= interval.metrics(f'{name}/{place}/{problem.metric}')
      row[f'mean {problem.metric}'] = interval
    interval = harness.mean_interval(np.asarray(change))
    metrics |= interval.metrics(f'{name}/{place}/dm')
    row['dm %'] = interval
    row['rate'] = metrics[f'{name}/{place}/rate'] = outcome.rate
    own = methods.own(name)
    row['own'] = '' if own is None else own.label(outcome.own)
    metrics[f'{name}/{place}/own'] = outcome.own
    row['ms a step'] = 1e3 * outcome.step_seconds
    metrics[f'{name}/{place}/step_seconds'] = outcome.step_seconds
    rows.append(row)
  if by_batch:
    found, ratios = bias.measure(place, by_batch, outcomes)
    metrics |= found
    for row in rows:
      row['bias, SMG / own'] = ratios.get(row['method'], '')
  metrics[f'{place}/seconds'] = time.monotonic() - start
  return metrics, rows, outcomes


def curves_of(outcomes: dict[str, Outcome]) -> dict[str, np.ndarray]:
  """The mean test score over steps at the chosen trial, by method."""
  return {
    name: outcome.trained.history['test/mean'][:, outcome.members]
    for name, outcome in outcomes.items()
  }


def plot_weights(path: Any, outcomes: dict[str, Outcome], title: str) -> None:
  """The weight of the first objective over steps, at the chosen rates."""
  curves = {
    name: (
      outcome.trained.steps,
      outcome.trained.history['weight/0'][:, outcome.members],
    )
    for name, outcome in outcomes.items()
    if name in ('smg', 'moco', 'moco_exact', 'cagrad')
  }
  harness.plot_curves(
    path,
    curves,
    xlabel='step',
    ylabel='weight of the first objective',
    title=title,
  )


def plot_scores(
  path: Any, outcomes: dict[str, Outcome], ylabel: str, title: str
) -> None:
  """The mean test score over steps, at the chosen rates."""
  curves = {
    name: (outcomes[name].trained.steps, values)
    for name, values in curves_of(outcomes).items()
    if name in ('moco', 'moco_exact', 'smg', 'mean', 'cagrad', 'upgrad')
  }
  harness.plot_curves(path, curves, xlabel='step', ylabel=ylabel, title=title)
