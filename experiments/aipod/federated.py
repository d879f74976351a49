"""Federated bilevel learning: E-AiPOD beside FedNest, by communication rounds.

Paper: Xiao, Shen, Yin and Chen, Alternating Projected SGD for
Equality-constrained Bilevel Optimization, 2023.

    python -m experiments.aipod.federated --preset=quick
    python -m experiments.aipod.federated --preset=paper --data_dir=MNIST

Expected: on packaged digits 0.76 of FedNest's rounds with one upper step each,
1.03 against ten local ones. Time: 6 minutes for quick, hours for paper on 2
cores.

Clients with digits of about two classes each agree on a network. Each mean of
any vector over the clients is one round. Both methods choose from the same grid
of step sizes, on digits and seeds that no number in the table uses, and so does
E-AiPOD its lower steps S. FedNest takes the best of its rounds T and local
steps tau by the reported numbers themselves, first with one upper step, as
E-AiPOD, then with several local ones.
"""

import dataclasses
import functools
import itertools
import pathlib
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.aipod import clients, fednest

# First weights, batches and coins of the tuning runs; seeds count up from 0.
TUNING_SEEDS = (1_000_000, 1_000_001, 1_000_002)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Xiao et al., 2023, section 5.2.

  Attributes:
    task: hyper_representation or loss_tuning.
    clients: the paper's 50.
    taking_part: clients in each update of E-AiPOD; 0 is all.
    devices: over which clients are spread; 1 needs no more.
    shards: of the digits sorted by label for each client, the paper's 2.
    pooling: side of the squares of pixels that are averaged; the paper's 1.
    hidden: units, the paper's 200.
    decay: of the squared norm of the lower variable, the paper's .05.
    ratio: of the largest to the smallest class, for loss_tuning the paper's 10.
    selection: digits that choose step sizes.
    test: digits of the accuracy; with data_dir, all of the test file.
    batch: training digits of a client in a gradient, the paper's 256.
    probability: p, the paper's .1, and .3 for loss_tuning.
    lower_steps: S of E-AiPOD, the paper's 20.
    products: N', the paper's 5, and 3 for loss_tuning.
    linear_rate: step size of the linear system's series.
    upper_rates: grid of alpha.
    lower_rates: grid of beta; the paper has .05, and .04 for loss_tuning.
    fednest_rounds: T of FedNest, the paper's 1 and 5.
    fednest_steps: tau of FedNest; the paper has 10.
    fednest_upper_steps: local upper steps of FedNest, beside one; 0 leaves
      them out. They go with the first tau.
    published_rate: the published alpha, reported beside; 0 leaves it out.
    goal: test accuracy, in per cent, whose rounds are compared.
    rounds: a run ends after as many.
    tuning_rounds: likewise, in tuning.
    seeds: of weights, batches and coins.
  """

  task: Literal['hyper_representation', 'loss_tuning'] = 'hyper_representation'
  clients: int = 50
  taking_part: int = 0
  devices: int = 1
  shards: int = 2
  pooling: int = 2
  hidden: int = 200
  decay: float = 0.05
  ratio: float = 1.0
  selection: int = 1_000
  test: int = 1_500
  batch: int = 256
  probability: float = 0.1
  lower_steps: tuple[int, ...] = (20, 60)
  products: int = 5
  linear_rate: float = 0.05
  upper_rates: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
  lower_rates: tuple[float, ...] = (0.02, 0.05)
  fednest_rounds: tuple[int, ...] = (1, 5)
  fednest_steps: tuple[int, ...] = (10, 20)
  fednest_upper_steps: int = 10
  published_rate: float = 0.01
  goal: int = 87
  rounds: int = 300
  tuning_rounds: int = 120
  seeds: int = 3


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    clients=8,
    pooling=4,
    hidden=16,
    selection=200,
    test=400,
    batch=32,
    probability=0.4,
    lower_steps=(5,),
    upper_rates=(0.4,),
    lower_rates=(0.1,),
    fednest_rounds=(1,),
    fednest_steps=(5,),
    fednest_upper_steps=0,
    published_rate=0.0,
    goal=40,
    rounds=60,
    tuning_rounds=30,
    seeds=2,
  ),
  'paper': Settings(
    pooling=1,
    selection=5_000,
    goal=90,
    rounds=2_500,
    tuning_rounds=500,
  ),
}


def check(settings: Settings) -> None:
  """Raises ValueError for settings that no run can have."""
  if not 0 <= settings.taking_part <= settings.clients:
    raise ValueError(
      f'taking_part is from 0 (all) to {settings.clients} clients, got '
      f'{settings.taking_part}.'
    )
  if settings.devices > 1 and settings.taking_part:
    raise ValueError('taking_part is for one device: leave devices at 1.')
  if settings.clients % settings.devices:
    raise ValueError(
      f'{settings.devices} devices do not divide {settings.clients} clients.'
    )


class Method(NamedTuple):
  """A method with what the grid of step sizes does not hold."""

  name: str
  lower_steps: int = 0  # S of E-AiPOD.
  lower_rounds: int = 0  # T of FedNest; 0 for E-AiPOD.
  local_steps: int = 0  # tau of FedNest.
  upper_steps: int = 1  # Local ones.


def methods(settings: Settings) -> list[Method]:
  """E-AiPOD with each S; FedNest with each T, tau and local upper steps."""
  found = [Method(f'e_aipod/s{s}', s) for s in settings.lower_steps]
  for t in settings.fednest_rounds:
    found += [
      Method(f'fednest/t{t}/tau{tau}', 0, t, tau)
      for tau in settings.fednest_steps
    ]
    if settings.fednest_upper_steps:
      tau, several = settings.fednest_steps[0], settings.fednest_upper_steps
      found.append(
        Method(f'fednest/t{t}/tau{tau}/upper{several}', 0, t, tau, several)
      )
  return found


def make_task(settings: Settings, digits: clients.Digits) -> clients.Task:
  """The task of the settings."""
  if settings.task == 'hyper_representation':
    return clients.hyper_representation(settings.hidden, settings.decay)
  labels = np.asarray(digits.train.labels).ravel()
  prior = np.bincount(labels, minlength=clients.CLASSES) / len(labels)
  return clients.loss_tuning(settings.hidden, settings.decay, prior)


def make_solver(
  method: Method, settings: Settings, task: clients.Task, hyper: Any
) -> optax.GradientTransformationExtraArgs:
  """The solver of a method, for all clients at once."""
  series = bj.linear_solvers.neumann(settings.products, settings.linear_rate)

  def one_client(axis_name):
    if method.lower_rounds:
      return fednest.fednest(
        task.problem,
        axis_name,
        upper_rate=hyper['upper'],
        lower_rate=hyper['lower'],
        lower_rounds=method.lower_rounds,
        local_steps=method.local_steps,
        upper_steps=method.upper_steps,
        solve=series,
        batch_at=clients.batch_at,
      )
    agree = bj.projections.consensus_set(axis_name)
    return bj.e_aipod(
      task.problem,
      upper=bj.Sequence(optax.sgd(hyper['upper']), set=agree),
      lower=bj.Sequence(
        optax.sgd(hyper['lower']),
        set=bj.projections.Lazy(agree, settings.probability, key=hyper['coin']),
        steps=method.lower_steps,
        batch_at=clients.batch_at,
      ),
      solve=series,
    )

  mesh = None
  if settings.devices > 1:
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh(
      (settings.devices,), (clients.DEVICES,), axis_types=kind
    )
  solver = clients.over_clients(one_client, mesh)
  if settings.taking_part and not method.lower_rounds:
    solver = clients.sampled_clients(
      solver, settings.taking_part, hyper['coin'] + 1
    )
  return solver


def rounds_an_update(method: Method, settings: Settings) -> float:
  """Communication rounds of one update, on average."""
  if method.lower_rounds:
    return 2 * method.lower_rounds + settings.products + 3
  extra = 1 if settings.taking_part else 0
  lower = method.lower_steps * settings.probability
  return lower + settings.products + 2 + extra


class Runner:
  """Runs methods on one deal of the digits.

  Args:
    options: what the flags say.
    digits: the digits.
  """

  def __init__(self, options: harness.Options, digits: clients.Digits) -> None:
    self._options = options
    self._settings = options.settings
    self._digits = digits
    self._task = make_task(self._settings, digits)

  def run(
    self,
    method: Method,
    name: str,
    seeds: tuple[int, ...],
    upper: Any,
    lower: Any,
    *,
    tuning: bool,
  ) -> harness.Trained:
    """Runs members with given step sizes; ends once all reach the goal."""
    settings, task = self._settings, self._task
    times = max(
      method.lower_steps,
      method.lower_rounds * method.local_steps,
      method.upper_steps,
    )
    pixels = self._digits.test.images.shape[-1]
    balanced = settings.task == 'loss_tuning'

    def init(context):
      one = task.init(context.seed_key, pixels)
      return jax.tree.map(lambda z: jnp.stack([z] * settings.clients), one)

    def batch(context):
      return clients.draw_batch(
        context.key, context.data, settings.batch, times
      )

    def evaluate(context, params, state):
      mean = clients.mean_client(params)
      measured = {}
      for part in ('selection', 'test'):
        images, labels = getattr(context.data, part)
        logits = task.logits(mean, images)
        measured[f'{part}_accuracy'] = clients.accuracy(
          logits, labels, balanced=balanced
        )
      counted = bj.counts(state)
      rounds = [n for k, n in counted.items() if k.startswith('rounds/')]
      return measured | {'rounds': sum(rounds)}

    part = 'selection' if tuning else 'test'
    limit = settings.tuning_rounds if tuning else settings.rounds
    goal = settings.goal / 100

    def over(history):
      reached = np.nan_to_num(history[f'{part}_accuracy']).max(0) >= goal
      return bool(np.all(reached))

    each = rounds_an_update(method, settings)
    spread = lambda z: jnp.broadcast_to(jnp.float32(z), (len(seeds),))
    given = dataclasses.asdict(settings)
    others = (
      'upper_rates',
      'lower_rates',
      'fednest_rounds',
      'fednest_steps',
      'fednest_upper_steps',
      'lower_steps',
    )
    train = functools.partial(
      harness.train,
      lambda hyper: make_solver(method, settings, task, hyper),
      init,
      batch,
      steps=int(np.ceil(limit / each)),
      chunk=1,
      seeds=seeds,
      workdir=self._options.workdir,
      name=name,
      data=self._digits,
      hyper={
        'upper': spread(upper),
        'lower': spread(lower),
        'coin': jnp.asarray(seeds, jnp.uint32),
      },
      evaluate=evaluate,
      stop_when=over,
      # One coin for each member: mapped at once, both its sides were computed.
      at_once=1,
      settings={k: v for k, v in given.items() if k not in (*others, 'seeds')}
      | {'grid': [np.ravel(upper).tolist(), np.ravel(lower).tolist()]},
    )
    try:
      return train()
    except harness.AllStoppedError:
      if self._options.workdir is None:
        raise
      # Too large a step for all seeds; what they reached before counts.
      return recorded(pathlib.Path(self._options.workdir) / name)

  def tune(self, method: Method) -> tuple[float, float, float]:
    """The best step sizes on the selection digits, and their rounds.

    Returns:
      Upper and lower step size, and a score, lower is better: rounds to the
      goal; where it is not reached, the limit plus what the accuracy lacks.
    """
    settings = self._settings
    grid = list(itertools.product(settings.upper_rates, settings.lower_rates))
    upper, lower = np.repeat(np.transpose(grid), len(TUNING_SEEDS), axis=1)
    seeds = TUNING_SEEDS * len(grid)
    name = f'{method.name}/tuning'
    trained = self.run(method, name, seeds, upper, lower, tuning=True)
    scores = rounds_to(trained, settings.goal / 100, 'selection')
    # From where a seed stopped on, it classifies nothing: NaN would win below.
    best = np.nan_to_num(trained.history['selection_accuracy']).max(axis=0)
    missed = settings.tuning_rounds * (2 - best)
    # A tie of rounds goes to the more accurate.
    scores = np.where(np.isfinite(scores), scores, missed) - 1e-3 * best
    # The worst of the seeds: step sizes on the brink fail on other seeds.
    scores = scores.reshape(len(grid), -1).max(axis=1)
    winner = int(np.argmin(scores))
    return (*grid[winner], float(np.round(scores[winner])))


def recorded(folder: pathlib.Path) -> harness.Trained:
  """The history of a run all of whose seeds became non-finite."""
  records = harness.read_records(folder / 'metrics.jsonl')
  steps = np.array([record['step'] for record in records])
  history = {
    name: np.array([record[name] for record in records], np.float64)
    for name in records[0]
    if name != 'step'
  }
  return harness.Trained(
    None, None, (), int(steps[-1]), steps, history, (), 0.0, 0.0
  )


def rounds_to(
  trained: harness.Trained, goal: float, part: str = 'test'
) -> np.ndarray:
  """Rounds until an accuracy is reached, by member; infinity where not."""
  accuracy = np.nan_to_num(trained.history[f'{part}_accuracy'])
  reached = accuracy >= goal
  row = np.argmax(reached, axis=0)
  rounds = trained.history['rounds'][row, np.arange(reached.shape[1])]
  return np.where(reached.any(axis=0), rounds, np.inf)


def main(options: harness.Options) -> dict[str, float]:
  """Tunes and runs both methods, and writes table, plot and results."""
  start = time.monotonic()
  settings = options.settings
  check(settings)
  digits, source = clients.load_digits(
    options.data_dir,
    clients=settings.clients,
    shards=settings.shards,
    pooling=settings.pooling,
    selection=settings.selection,
    test=settings.test,
    ratio=settings.ratio,
  )
  print(f'Data: {source}.')
  runner = Runner(options, digits)
  metrics: dict[str, float] = {}
  rows, curves = [], {}
  medians: dict[str, float] = {}
  seeds = options.seeds
  everything = methods(settings)
  for method in everything:
    began = time.monotonic()
    upper, lower, score = runner.tune(method)
    trained = runner.run(method, method.name, seeds, upper, lower, tuning=False)
    row, median = summarise(method.name, trained, settings, metrics)
    medians[method.name] = median
    metrics[f'{method.name}/alpha'] = upper
    metrics[f'{method.name}/beta'] = lower
    metrics[f'{method.name}/tuning_score'] = score
    row |= {'alpha': upper, 'beta': lower, 'tuning': score}
    rows.append(row | {'seconds': round(time.monotonic() - began)})
    curves[method.name] = curve(trained)
  # Its S too is chosen on the selection digits.
  ours = min(
    (m for m in everything if not m.lower_rounds),
    key=lambda m: metrics[f'{m.name}/tuning_score'],
  )
  prefix = f'{ours.name}/'
  metrics |= {
    f'e_aipod/{k.removeprefix(prefix)}': v
    for k, v in list(metrics.items())
    if k.startswith(prefix)
  }
  metrics['e_aipod/lower_steps'] = ours.lower_steps
  published = settings.published_rate
  if published:
    lower = metrics['e_aipod/beta']
    name = 'e_aipod_published_step'
    trained = runner.run(ours, name, seeds, published, lower, tuning=False)
    row, _ = summarise(name, trained, settings, metrics)
    rows.append(row | {'alpha': published, 'beta': lower})
    curves[name] = curve(trained)
  # The strongest FedNest, by what is reported: nothing is left to its tuning.
  # With one upper step in each method, and with FedNest's local upper steps.
  goal = settings.goal
  compared = {}
  for prefix, several in (('', False), ('local_upper/', True)):
    others = [
      m for m in everything if m.lower_rounds and (m.upper_steps > 1) == several
    ]
    if not others:
      continue
    best = min(others, key=lambda m: medians[m.name])
    ratio = quotient(medians[ours.name], medians[best.name])
    metrics[f'{prefix}rounds_to_{goal}_ratio'] = ratio
    metrics[f'{prefix}fednest/best_t'] = best.lower_rounds
    metrics[f'{prefix}fednest/best_tau'] = best.local_steps
    compared[describe(best)] = best
    print(f'Rounds to {goal} %, {ours.name} / {best.name}: {ratio:.3f}')
  harness.write_table(options.workdir, rows)
  shown = {
    f'E-AiPOD, S = {ours.lower_steps}': curves[ours.name],
    **{f'FedNest, {text}': curves[m.name] for text, m in compared.items()},
  }
  if published:
    shown[f'E-AiPOD, published step {published:g}'] = curves[name]
  harness.plot_curves(
    pathlib.Path(options.workdir) / 'rounds.png',
    shown,
    xlabel='communication rounds',
    ylabel='test accuracy',
    band='range',
  )
  harness.write_results(
    options,
    metrics=metrics,
    seconds=time.monotonic() - start,
    curves={name: accuracy for name, (_, accuracy) in curves.items()},
    data=source,
  )
  return metrics


def quotient(ours: float, theirs: float) -> float:
  """Ours over theirs; infinite where ours is, also where both are."""
  return ours / theirs if np.isfinite(ours) else np.inf


def describe(method: Method) -> str:
  """What a FedNest is, for a plot."""
  return (
    f'T = {method.lower_rounds}, {method.local_steps} lower, '
    f'{method.upper_steps} upper local steps'
  )


def curve(trained: harness.Trained) -> tuple[np.ndarray, np.ndarray]:
  """Mean rounds so far, and test accuracy of each seed."""
  rounds = trained.history['rounds']
  going = np.isfinite(rounds).any(axis=1)
  accuracy = trained.history['test_accuracy'][going]
  return np.nanmean(rounds[going], axis=1), accuracy


def summarise(
  name: str,
  trained: harness.Trained,
  settings: Settings,
  metrics: dict[str, float],
) -> tuple[dict[str, Any], float]:
  """A row of the table, and the median rounds; fills in metrics."""
  rounds = rounds_to(trained, settings.goal / 100)
  median = harness.reduced(rounds, 'median')
  metrics[f'{name}/rounds_to_{settings.goal}'] = median
  for seed, number in enumerate(rounds):
    metrics[f'{name}/rounds_to_{settings.goal}/seed{seed}'] = number
  best = np.nan_to_num(trained.history['test_accuracy']).max(axis=0)
  metrics[f'{name}/best_accuracy'] = harness.reduced(best, 'median')
  texts = [f'{n:.0f}' if np.isfinite(n) else '-' for n in rounds]
  row = {
    'method': name,
    f'rounds to {settings.goal} %': (
      f'{median:.0f}' if np.isfinite(median) else 'not reached'
    ),
    'each seed': ' '.join(texts),
    'best accuracy': metrics[f'{name}/best_accuracy'],
  }
  return row, median


if __name__ == '__main__':
  harness.run(main, PRESETS, paper='aipod', binary='federated')
