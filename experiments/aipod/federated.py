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
import pathlib
import time
from typing import Annotated, Literal

import numpy as np

from experiments import harness
from experiments.aipod import client_digits, federated_compare, federated_run
from experiments.harness import comparison

# Of the reported seeds: those below were looked at when the grids were made.
FIRST_SEED = 10


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Xiao et al., 2023, section 5.2.

  Attributes:
    task: hyper_representation or loss_tuning.
    clients: the paper's 50.
    taking_part: clients in each update of a further E-AiPOD; 0 leaves it out.
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
    lower_steps: S of E-AiPOD, of which tuning chooses; the paper has 20.
    products: N', the paper's 5, and 3 for loss_tuning.
    linear_rate: step size of the linear system's series.
    upper_rates: grid of alpha, at first.
    lower_rates: grid of beta, at first; the paper has .05, and .04 for
      loss_tuning.
    widen: how often a grid may grow where its end is chosen.
    fednest_rounds: T of FedNest, the paper's 1 and 5.
    fednest_steps: tau of FedNest; the paper has 10.
    fednest_upper_steps: local upper steps of FedNest, beside one; 0 leaves
      them out. They go with the first tau.
    published_rate: the published alpha, reported beside; 0 leaves it out.
    goal: test accuracy, in per cent, whose rounds are compared.
    rounds: a run ends after as many.
    tuning_rounds: a run of the tuning ends after as many, or once the best is
      known.
    seeds: of weights, batches and coins.
  """

  task: Literal['hyper_representation', 'loss_tuning'] = 'hyper_representation'
  clients: int = 50
  taking_part: Annotated[int, harness.Allowed(0)] = 10
  devices: int = 1
  shards: int = 2
  pooling: int = 2
  hidden: int = 200
  decay: Annotated[float, harness.Allowed(0)] = 0.05
  ratio: Annotated[float, harness.Allowed(1)] = 1.0
  selection: int = 1_000
  test: int = 1_500
  batch: int = 256
  probability: Annotated[float, harness.Allowed(high=1)] = 0.1
  lower_steps: tuple[int, ...] = (10, 20, 40, 60, 100, 160, 250)
  products: int = 5
  linear_rate: float = 0.05
  upper_rates: tuple[float, ...] = (0.2, 0.4, 0.8, 1.6)
  lower_rates: tuple[float, ...] = (0.02, 0.05, 0.125)
  widen: Annotated[int, harness.Allowed(0)] = 3
  fednest_rounds: tuple[int, ...] = (1, 5)
  fednest_steps: tuple[int, ...] = (10, 20)
  fednest_upper_steps: Annotated[int, harness.Allowed(0)] = 10
  published_rate: Annotated[float, harness.Allowed(0)] = 0.01
  goal: Annotated[int, harness.Allowed(high=100)] = 87
  rounds: int = 300
  tuning_rounds: int = 120
  seeds: int = 3


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    clients=8,
    taking_part=4,
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
  'loss_tuning': Settings(
    task='loss_tuning',
    ratio=10.0,
    probability=0.3,
    products=3,
    lower_steps=(10, 20, 40),
    upper_rates=(0.1, 0.4, 1.6),
    lower_rates=(0.05, 0.1, 0.2),
    fednest_steps=(10,),
    goal=75,
  ),
  # MNIST in about an hour of two cores.
  'reduced': Settings(
    batch=128,
    selection=5_000,
    fednest_steps=(10,),
    goal=90,
    tuning_rounds=150,
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
  """Raises SettingsError for settings that no run can have."""
  count, part = settings.clients, settings.taking_part
  devices = settings.devices
  for wrong, said in (
    (not 0 <= part <= count, f'taking_part is from 0 to {count} clients'),
    (devices > 1 and part, 'taking_part is for one device: set it to 0'),
    (count % devices, f'{devices} devices do not divide {count} clients'),
  ):
    if wrong:
      raise harness.SettingsError(f'{said}.')


def main(options: harness.Options) -> None:
  """Tunes and runs all methods, and writes table, plot and results."""
  start = time.monotonic()
  settings, goal = options.settings, options.settings.goal
  seeds = tuple(FIRST_SEED + seed for seed in options.seeds)
  options = options._replace(seeds=seeds)
  digits, source = client_digits.load_digits(
    options.data_dir,
    clients=settings.clients,
    shards=settings.shards,
    pooling=settings.pooling,
    selection=settings.selection,
    test=settings.test,
    ratio=settings.ratio,
  )
  print(f'Data: {source.words}.')
  found, compared = federated_compare.compare(options, digits)

  def measure(outcome):
    accuracy = np.nan_to_num(outcome.values('test_accuracy'))
    tuned = {'tuning': -outcome.score} if np.isfinite(outcome.score) else {}
    return {
      f'rounds_to_{goal}': federated_compare.median(outcome, goal / 100),
      'best_accuracy': accuracy.max(axis=0),
      **tuned,
    }

  metrics, rows = comparison.report_outcomes(found, measure)
  metrics |= comparison.report_outcomes(compared, measure)[0]
  for row, outcome in zip(rows, found.values(), strict=True):
    if not outcome.failure:
      history = outcome.trained.history
      rounds = federated_run.rounds_to(history, goal / 100)
      texts = [f'{n:.0f}' if np.isfinite(n) else '-' for n in rounds]
      row['each seed'] = ' '.join(texts)
  chosen = compared['e_aipod']
  if not chosen.failure:
    edge = ' (edge)' if 'lower_steps' in chosen.edges else ''
    print(f'E-AiPOD, by tuning: S = {chosen.point["lower_steps"]}{edge}')
  for name, ours, theirs in (
    ('', 'e_aipod', 'fednest'),
    ('local_upper/', 'e_aipod', 'local_upper/fednest'),
    ('partial/', 'e_aipod_partial', 'fednest'),
  ):
    if ours in compared and theirs in compared:
      ends = [
        federated_compare.median(compared[which], goal / 100)
        for which in (ours, theirs)
      ]
      ratio = federated_compare.quotient(*ends, settings.rounds)
      metrics[f'{name}rounds_to_{goal}_ratio'] = ratio
      print(
        f'Rounds to {goal} %, {ours} / {theirs}, the best of '
        f'{compared[theirs].looks} by what is reported: {ratio:.3f}'
      )
  columns = (
    'method',
    f'rounds_to_{goal}',
    'each seed',
    'best_accuracy',
    'tuning',
    'upper_rate',
    'lower_rate',
    'trials',
  )
  harness.write_table(options.workdir, rows, columns)
  harness.plot_curves(
    pathlib.Path(options.workdir) / 'rounds.png',
    {
      name: (
        outcome.values('rounds').mean(axis=1),
        outcome.values('test_accuracy'),
      )
      for name, outcome in compared.items()
      if not outcome.failure
    },
    xlabel='communication rounds',
    ylabel='test accuracy',
    band='range',
  )
  path = harness.write_results(
    options,
    metrics=metrics,
    seconds=time.monotonic() - start,
    curves={
      name: outcome.values('test_accuracy')
      for name, outcome in found.items()
      if not outcome.failure
    },
    data=(source,),
    published=('MNIST',),
    tuning_seeds=federated_compare.TUNING_SEEDS,
  )
  print(f'Results: {path}')


STUDY = harness.Study(
  main, PRESETS, paper='aipod', binary='federated', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
