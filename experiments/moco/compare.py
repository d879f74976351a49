"""Compares multi-objective methods on one problem, with equal tuning for all.

Every method, single-task nets included, gets the same steps, batches and grid
of learning rates; the rate is chosen on validation data, as the mean over seeds
of the mean score over tasks.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.moco import methods

BIAS_BATCHES = 256
BIASED = ('smg', 'moco', 'moco_exact')


class Problem(NamedTuple):
  """Several tasks on one shared trunk.

  Attributes:
    name: of the problem, in metrics.
    tasks: names of the tasks.
    metric: name of what is measured of each task.
    higher_is_better: of that metric.
    init: key -> sequences `trunk` and `heads`.
    oracle: given `multi_objective`'s keywords, gives the oracle.
    losses: (params, batch) -> all losses, for methods without rows.
    batch: (key, data) -> a training batch.
    split: (batch, parts) -> independent parts of it.
    score: (params, part of the data) -> the metric of each task.
    data: with the parts `train`, `validation` and `test`.
  """

  name: str
  tasks: tuple[str, ...]
  metric: str
  higher_is_better: bool
  init: Callable[[Any], Any]
  oracle: Callable[[], optax.GradientTransformationExtraArgs]
  losses: Callable[[Any, Any], Any]
  batch: Callable[[Any, Any], Any]
  split: Callable[[Any, int], Any]
  score: Callable[[Any, Any], Any]
  data: dict[str, Any]


class Outcome(NamedTuple):
  """What a method came to.

  Attributes:
    rate: the chosen learning rate.
    score: of each task on the test data, (seeds, tasks).
    trained: the run, all learning rates.
    members: indices of the seeds at the chosen rate.
    step_seconds: wall time of one step of one seed, without compilation.
  """

  rate: float
  score: np.ndarray
  trained: harness.Trained
  members: np.ndarray
  step_seconds: float


def dense(key: Any, inputs: int, outputs: int) -> dict[str, Any]:
  """Weights of a dense layer, by He's initialisation for ReLU."""
  scale = (2 / inputs) ** 0.5
  return {
    'w': scale * jax.random.normal(key, (inputs, outputs)),
    'b': jnp.zeros(outputs),
  }


def mlp_trunk(sizes: tuple[int, ...]) -> tuple[Any, Any]:
  """A perceptron with ReLU after every layer: (init, apply)."""

  def init(key):
    keys = jax.random.split(key, len(sizes) - 1)
    return [dense(k, i, o) for k, i, o in zip(keys, sizes, sizes[1:])]

  def apply(layers, inputs):
    for layer in layers:
      inputs = jax.nn.relu(inputs @ layer['w'] + layer['b'])
    return inputs

  return init, apply


def make_solver(problem: Problem, name: str, rate: Any, steps: int, key: Any):
  """A method by name, `only <task>` for a single-task net, with Adam.

  The learning rate decays by a cosine, for every method.
  """
  schedule = optax.cosine_decay_schedule(1.0, steps)
  adam = lambda: optax.chain(
    optax.scale_by_adam(),
    optax.scale_by_schedule(schedule),
    optax.scale(-1.0 * rate),
  )
  move = bj.per_sequence(trunk=adam(), heads=adam())
  count = len(problem.tasks)
  if name == 'famo':
    return bj.famo(problem.losses, count, optimiser=move)
  if name.startswith('only '):
    task = int(name.removeprefix('only '))
    loss = lambda params, batch: problem.losses(params, batch)[task]
    return optax.chain(bj.gradient(loss), move)
  method = methods.METHODS[name]
  oracle = problem.oracle()
  if method.samples > 1:
    oracle = bj.independent(oracle, method.samples, split=problem.split)
  return optax.chain(oracle, method.make(count, key, ('heads',)), move)


def run(
  problem: Problem,
  name: str,
  options: harness.Options,
  *,
  steps: int,
  chunk: int,
  rates: tuple[float, ...],
  settings: Any,
) -> Outcome:
  """Trains a method for all learning rates and seeds, and chooses a rate."""
  seeds, hyper = harness.members(options.seeds, rate=rates)
  better = 1.0 if problem.higher_is_better else -1.0

  def solver(hyper):
    return make_solver(problem, name, hyper['rate'], steps, jax.random.key(17))

  def evaluate(context, params, state):
    found = {}
    for part in ('validation', 'test'):
      scores = problem.score(params, context.data[part])
      if name.startswith('only '):
        scores = scores[int(name.removeprefix('only '))][None]
      found |= {f'{part}/{i}': score for i, score in enumerate(scores)}
      found[f'{part}/mean'] = jnp.mean(scores)
    if not name.startswith('only '):
      weights = bj.objective_weights(state)
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
  )
  count = len(options.seeds)
  grid = lambda values: values.reshape(len(rates), count)
  validation = grid(better * trained.history['validation/mean'][-1])
  chosen = int(np.nanargmax(np.nanmean(validation, axis=1)))
  members = np.arange(count) + chosen * count
  tasks = 1 if name.startswith('only ') else len(problem.tasks)
  score = np.stack(
    [trained.history[f'test/{i}'][-1][members] for i in range(tasks)], axis=-1
  )
  seconds = trained.seconds / (steps * len(seeds))
  return Outcome(rates[chosen], score, trained, members, seconds)


def bias(
  problem: Problem, name: str, outcome: Outcome, seed: int
) -> dict[str, float]:
  """Multi-gradient biases at the end of a run, of its method and of SMG.

  The mean over the same fresh batches stands for the expectation and for the
  true gradients alike, so that no error of sampling is counted as a bias.
  """
  member = int(outcome.members[seed])
  take = lambda tree: jax.tree.map(lambda x: x[member], tree)
  params, state = take(outcome.trained.params), take(outcome.trained.state)
  keys = jax.random.split(jax.random.key(10_000 + seed), BIAS_BATCHES)
  count = len(problem.tasks)
  oracle = problem.oracle()
  links = {'own': methods.METHODS[name].make(count, keys[0], ('heads',))}
  states = {'own': state[1]}
  links['smg'] = bj.smg(count)
  states['smg'] = links['smg'].init(params)

  @jax.jit
  def measure(params, states, data):
    begin = oracle.init(params)
    batches = jax.vmap(lambda key: problem.batch(key, data))(keys)
    jacobian = lambda batch: oracle.update(batch, begin, params)[0]

    def add(total, batch):
      return jax.tree.map(jnp.add, total, jacobian(batch)), None

    first = jacobian(jax.tree.map(lambda x: x[0], batches))
    total, _ = jax.lax.scan(add, optax.tree.zeros_like(first), batches)
    truth = jax.tree.map(lambda x: x / BIAS_BATCHES, total)
    found = {}
    for which, link in links.items():
      found[which] = bj.multi_gradient_bias(
        oracle, link, states[which], params, batches, truth
      )
    return found

  found = jax.device_get(measure(params, states, problem.data))
  return {
    f'{which}/{field}': float(value)
    for which, result in found.items()
    for field, value in result._asdict().items()
  }


def compare(
  problem: Problem,
  names: tuple[str, ...],
  options: harness.Options,
  *,
  steps: int,
  chunk: int,
  rates: tuple[float, ...],
  settings: Any,
  single: tuple[int, ...] | None = None,
  baseline: np.ndarray | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, Outcome]]:
  """Runs all methods; gives metrics, rows of the table and outcomes.

  Args:
    problem: what to learn.
    names: methods.
    options: what the flags say.
    steps: of every method.
    chunk: steps between two records.
    rates: the tuning grid of learning rates.
    settings: of the run, for its folder.
    single: indices of tasks that get a single-task net; all by default.
    baseline: test scores (tasks,) of single-task models where they are fitted
      otherwise.

  Returns:
    Metrics by stable name, rows and outcomes by method.
  """
  start = time.monotonic()
  given = {
    'steps': steps,
    'chunk': chunk,
    'rates': rates,
    'settings': settings,
  }
  if baseline is None:
    single = tuple(range(len(problem.tasks))) if single is None else single
    alone = [run(problem, f'only {i}', options, **given) for i in single]
    baseline = np.array([np.nanmean(one.score) for one in alone])
  outcomes, metrics, rows = {}, {}, []
  better = np.full(len(problem.tasks), problem.higher_is_better)
  place = problem.name
  for task, value in zip(problem.tasks, baseline):
    metrics[f'single/{place}/{task}'] = float(value)
  for name in names:
    outcome = outcomes[name] = run(problem, name, options, **given)
    change = methods.relative_change(outcome.score, baseline, better)
    row: dict[str, Any] = {'method': name}
    shown = problem.tasks if len(problem.tasks) <= 7 else ()
    for i, task in enumerate(shown):
      interval = harness.mean_interval(outcome.score[:, i])
      metrics[f'{name}/{place}/{task}'] = interval.mean
      row[f'{task}'] = interval
    interval = harness.mean_interval(outcome.score.mean(axis=-1))
    metrics[f'{name}/{place}/{problem.metric}'] = interval.mean
    row[f'mean {problem.metric}'] = interval
    interval = harness.mean_interval(np.asarray(change))
    metrics[f'{name}/{place}/dm'] = interval.mean
    metrics[f'{name}/{place}/dm/half_width'] = interval.half_width
    row['dm %'] = interval
    row['rate'] = metrics[f'{name}/{place}/rate'] = outcome.rate
    row['ms a step'] = 1e3 * outcome.step_seconds
    metrics[f'{name}/{place}/step_seconds'] = outcome.step_seconds
    rows.append(row)
  for name in set(names) & set(BIASED):
    found = [
      bias(problem, name, outcomes[name], i) for i in range(len(options.seeds))
    ]
    mean = {
      key: float(np.mean([one[key] for one in found])) for key in found[0]
    }
    for key, value in mean.items():
      metrics[f'{name}/{place}/bias/{key}'] = value
    if name != 'smg':
      ratios = [
        one['smg/at_own_weights'] / one['own/at_own_weights'] for one in found
      ]
      interval = harness.mean_interval(ratios)
      metrics[f'{name}/{place}/bias_ratio'] = interval.mean
      metrics[f'{name}/{place}/bias_ratio/half_width'] = interval.half_width
  if f'moco/{place}/bias_ratio' in metrics:
    metrics[f'{place}/bias_ratio'] = metrics[f'moco/{place}/bias_ratio']
  metrics[f'{place}/seconds'] = time.monotonic() - start
  return metrics, rows, outcomes


def plot_weights(path: Any, outcomes: dict[str, Outcome], title: str) -> None:
  """The weight of the first objective over steps, at the chosen rates."""
  curves = {
    name: (
      outcome.trained.steps,
      outcome.trained.history['weight/0'][:, outcome.members],
    )
    for name, outcome in outcomes.items()
    if name in ('smg', 'moco', 'moco_exact', 'cagrad', 'famo', 'stch')
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
  shown = [
    name
    for name in ('moco', 'moco_exact', 'smg', 'mean', 'cagrad', 'upgrad')
    if name in outcomes
  ]
  curves = {
    name: (
      outcomes[name].trained.steps,
      outcomes[name].trained.history['test/mean'][:, outcomes[name].members],
    )
    for name in shown
  }
  harness.plot_curves(path, curves, xlabel='step', ylabel=ylabel, title=title)
