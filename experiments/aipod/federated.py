"""Federated bilevel learning: E-AiPOD beside FedNest, by communication rounds.

Paper: Xiao, Shen, Yin and Chen, Alternating Projected SGD for
Equality-constrained Bilevel Optimization, 2023.

    python -m experiments.aipod.federated --preset=quick
    python -m experiments.aipod.federated --preset=loss_tuning
    python -m experiments.aipod.federated --preset=reduced --data_dir=MNIST
    python -m experiments.aipod.federated --preset=paper --data_dir=MNIST

Expected: on packaged digits 1.04 of FedNest's rounds, with one upper step each
and with ten local ones: no saving. Time: 15 minutes for quick, hours for paper
on 2 cores.

Clients with digits of about two classes each agree on a network. Each mean of
any vector over the clients is one round. All choose from the same grid of step
sizes, on digits and seeds that no number in the table uses, and so does E-AiPOD
its lower steps S. FedNest takes the best of its rounds T and local steps tau by
the reported numbers themselves, first with one upper step, as E-AiPOD, then
with several local ones.
"""

import dataclasses
from typing import Annotated, Literal

import numpy as np

from experiments import harness
from experiments.aipod import client_digits, federated_compare, federated_run
from experiments.harness.study import comparison

# Of the reported seeds: those below were looked at when the grids were made.
FIRST_SEED = 10
SPLIT = client_digits.Split()


@dataclasses.dataclass(frozen=True)
class Grid:
  """What tuning tries at first.

  Attributes:
    upper_rates: step sizes alpha of the upper variable.
    lower_rates: step sizes beta of the lower variable; the paper has 0.05, and
      0.04 for loss_tuning.
    widen: how often a grid may grow where its end is chosen.
    rounds: a run of the tuning ends after as many, or once the best is known.
  """

  upper_rates: tuple[float, ...] = (0.2, 0.4, 0.8, 1.6)
  lower_rates: tuple[float, ...] = (0.02, 0.05, 0.125)
  widen: Annotated[int, harness.Allowed(0)] = 3
  rounds: int = 120


@dataclasses.dataclass(frozen=True)
class FedNest:
  """The variants of FedNest; all of them are tried.

  Attributes:
    rounds: lower rounds T of an update, the paper's 1 and 5.
    steps: local lower steps tau of a round; the paper has 10.
    upper_steps: local upper steps of a further variant, with the first tau; 0
      leaves it out.
  """

  rounds: tuple[int, ...] = (1, 5)
  steps: tuple[int, ...] = (10, 20)
  upper_steps: Annotated[int, harness.Allowed(0)] = 10


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Xiao et al., 2023, section 5.2.

  Attributes:
    task: hyper_representation or loss_tuning.
    digits: how digits are dealt to clients.
    taking_part: clients in each update of a further E-AiPOD; 0 leaves it out.
    devices: over which clients are spread; 1 needs no more.
    hidden: units of the network, the paper's 200.
    batch: training digits of a client in a gradient, the paper's 256.
    probability: p of a lower projection, the paper's 0.1, and 0.3 for
      loss_tuning.
    lower_steps: lower steps S of E-AiPOD; tuning chooses one. The paper has 20.
    products: Hessian products N' of the linear system, the paper's 5, and 3 for
      loss_tuning.
    grid: what tuning tries.
    fednest: the baseline.
    published_rate: the published alpha, reported too; 0 leaves it out.
    goal: test accuracy, in per cent, whose rounds are compared.
    rounds: a run ends after as many.
    seeds: of weights, batches and coins.
  """

  task: Literal['hyper_representation', 'loss_tuning'] = 'hyper_representation'
  digits: client_digits.Split = SPLIT
  taking_part: Annotated[int, harness.Allowed(0)] = 10
  devices: int = 1
  hidden: int = 200
  batch: int = 256
  probability: Annotated[float, harness.Allowed(high=1)] = 0.1
  lower_steps: tuple[int, ...] = (10, 20, 40, 60, 100, 160, 250)
  products: int = 5
  grid: Grid = Grid()
  fednest: FedNest = FedNest()
  published_rate: Annotated[float, harness.Allowed(0)] = 0.01
  goal: Annotated[int, harness.Allowed(high=100)] = 87
  rounds: int = 300
  seeds: int = 3


_MNIST = dataclasses.replace(SPLIT, selection=5_000)
PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    digits=client_digits.Split(clients=8, pooling=4, selection=200, test=400),
    taking_part=4,
    hidden=16,
    batch=32,
    probability=0.4,
    lower_steps=(5,),
    grid=Grid((0.4,), (0.1,), rounds=30),
    fednest=FedNest((1,), (5,), 0),
    published_rate=0.0,
    goal=40,
    rounds=60,
    seeds=2,
  ),
  'loss_tuning': Settings(
    task='loss_tuning',
    digits=dataclasses.replace(SPLIT, ratio=10.0),
    probability=0.3,
    products=3,
    lower_steps=(10, 20, 40),
    grid=Grid((0.1, 0.4, 1.6), (0.05, 0.1, 0.2)),
    fednest=FedNest(steps=(10,)),
    goal=75,
  ),
  # MNIST in about an hour of two cores.
  'reduced': Settings(
    digits=_MNIST,
    batch=128,
    grid=Grid(rounds=150),
    fednest=FedNest(steps=(10,)),
    goal=90,
  ),
  'paper': Settings(
    digits=dataclasses.replace(_MNIST, pooling=1),
    grid=Grid(rounds=500),
    goal=90,
    rounds=2_500,
  ),
}
RENAMED = {
  'tuning_rounds': 'grid.rounds',
  'fednest_rounds': 'fednest.rounds',
  'fednest_steps': 'fednest.steps',
  'fednest_upper_steps': 'fednest.upper_steps',
}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  count, part = settings.digits.clients, settings.taking_part
  devices = settings.devices
  for wrong, said in (
    (not 0 <= part <= count, f'taking_part is from 0 to {count} clients'),
    (devices > 1 and part, 'taking_part is for one device: set it to 0'),
    (count % devices, f'{devices} devices do not divide {count} clients'),
  ):
    if wrong:
      raise harness.SettingsError(f'{said}.')


def summarise(
  settings: Settings,
  variants: dict[str, comparison.Outcome],
  compared: dict[str, comparison.Outcome],
) -> harness.Results:
  """The numbers of all variants, of what is compared, and ratios of rounds.

  Args:
    settings: of the run.
    variants: by method.
    compared: those that stand for a method; their numbers are `selected`.

  Returns:
    Numbers by method.
  """
  goal, results = settings.goal, harness.Results()

  def measure(outcome):
    accuracy = np.nan_to_num(outcome.values('test_accuracy'))
    tuned = {'tuning': -outcome.score} if np.isfinite(outcome.score) else {}
    return {
      f'rounds_to_{goal}': federated_compare.median(outcome, goal / 100),
      'best_accuracy': accuracy.max(axis=0),
      **tuned,
    }

  comparison.add_outcomes(results, variants, measure)
  comparison.add_outcomes(results, compared, measure, {'choice': 'selected'})
  for name, outcome in variants.items():
    if not outcome.failure:
      rounds = federated_run.rounds_to(outcome.trained.history, goal / 100)
      texts = [f'{n:.0f}' if np.isfinite(n) else '-' for n in rounds]
      results.note({'method': name}, {'each seed': ' '.join(texts)})
  for at, method, baseline in (
    ({}, 'e_aipod', 'fednest'),
    ({'variant': 'local_upper'}, 'e_aipod', 'local_upper/fednest'),
    ({'variant': 'partial'}, 'e_aipod_partial', 'fednest'),
  ):
    if method in compared and baseline in compared:
      ends = [
        federated_compare.median(compared[name], goal / 100)
        for name in (method, baseline)
      ]
      ratio = federated_compare.quotient(*ends, settings.rounds)
      results.put(at, {f'rounds_to_{goal}_ratio': ratio})
      print(
        f'Rounds to {goal} %, {method} / {baseline}, the best of '
        f'{compared[baseline].evaluations_on_test} by reported data: '
        f'{ratio:.3f}'
      )
  return results


def main(options: harness.Options) -> harness.Report:
  """Tunes and runs all methods."""
  settings = options.settings
  seeds = tuple(FIRST_SEED + seed for seed in options.seeds)
  options = options._replace(seeds=seeds)
  digits, source = client_digits.load_digits(options.data_dir, settings.digits)
  print(f'Data: {source.words}.')
  variants, compared = federated_compare.compare(options, digits)
  columns = (
    *(f'rounds_to_{settings.goal}', 'each seed', 'best_accuracy', 'tuning'),
    *('upper_rate', 'lower_rate', 'trials'),
  )
  curves = {
    name: (one.values('rounds').mean(axis=1), one.values('test_accuracy'))
    for name, one in (variants | compared).items()
    if not one.failure
  }
  figure = harness.draw_curves(
    {name: curves[name] for name in compared if name in curves},
    xlabel='communication rounds',
    ylabel='test accuracy',
    band='range',
  )
  return harness.Report(
    summarise(settings, variants, compared),
    columns=[harness.Column(name) for name in columns],
    curves={name: curves[name][1] for name in variants if name in curves},
    plots={'rounds.png': figure},
    data=(source,),
    published=('MNIST',),
    more={'seeds': seeds, 'tuning_seeds': federated_compare.TUNING_SEEDS},
  )


STUDY = harness.Study(
  main,
  PRESETS,
  paper='aipod',
  binary='federated',
  check=check,
  renamed=RENAMED,
)


if __name__ == '__main__':
  harness.run(STUDY)
