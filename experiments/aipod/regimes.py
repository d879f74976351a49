"""Where E-AiPOD saves rounds: heterogeneity, local steps, participation.

Paper: Xiao, Shen, Yin and Chen, Alternating Projected SGD for
Equality-constrained Bilevel Optimization, 2023.

    python -m experiments.aipod.regimes --preset=quick --data_dir=MNIST

Expected: see the table. Time: an hour on 2 cores.

Clients tune the class weights of a linear classifier of imbalanced digits. The
lower loss is strongly convex with a condition number of about a thousand, so
the lower rounds dominate. E-AiPOD projects with the probability 1 / local
steps; with one local step, it is AiPOD. FedNest's means of equal vectors are
not counted.

For each cell, each method tunes both step sizes and the number of lower rounds
per update on draws of the digits that the report does not use. The goal of a
seed is a share of the way from centralised training without upper steps to that
with upper steps. The regime of the claim is the cell, with more than one local
step, in which E-AiPOD leads FedNest most in tuning.
"""

import dataclasses
import itertools
from typing import Annotated

import numpy as np

from experiments import harness, vision
from experiments.aipod import (
  regimes_cells,
  regimes_problem,
  regimes_report,
)


@dataclasses.dataclass(frozen=True)
class Grid:
  """Grid of the tuning, the same for all methods and cells.

  Attributes:
    upper_rates: step sizes alpha of the upper variable.
    lower_rates: step sizes beta of the lower variable and the linear system.
    lower_rounds: expected lower rounds per update.
    max_grid_extensions: how often the step sizes are extended when their end is
      chosen.
  """

  upper_rates: tuple[float, ...] = (0.5, 2.0, 8.0)
  lower_rates: tuple[float, ...] = (0.004, 0.008, 0.016, 0.032)
  lower_rounds: tuple[int, ...] = (3, 10, 30)
  max_grid_extensions: Annotated[int, harness.Allowed(0)] = 1


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    shards: heterogeneities: label-sorted shards per client, with about as many
      classes; 0 for clients with equal distributions.
    local_steps: local steps per lower round, all with full participation.
    shares: participating shares of clients, the first one 1.
    partial_steps: local steps with partial participation.
    clients: number of clients; 50 in the paper.
    digits_per_client: digits per client, 60 % of them for the lower loss.
    pooling: side of the average-pooling window.
    ratio: imbalance ratio, largest to smallest class; 10 in the paper.
    selection: digits for the tuning.
    test: test digits.
    decay: weight decay of the classifier; 0.05 in the paper.
    products: Hessian-vector products N' of the linear system.
    grid: grid of the tuning.
    goal: share of the way from no upper steps to the best, in per cent.
    reference_updates: updates of the centralised runs.
    rounds: maximum number of expected rounds of a run.
    seeds: number of seeds, each with its own digits.
  """

  shards: Annotated[tuple[int, ...], harness.Allowed(0)] = (0, 5, 2, 1)
  local_steps: tuple[int, ...] = (1, 5, 10, 20)
  shares: tuple[float, ...] = (1.0, 0.5, 0.1)
  partial_steps: tuple[int, ...] = (10,)
  clients: int = 20
  digits_per_client: int = 50
  pooling: int = 4
  ratio: Annotated[float, harness.Allowed(1)] = 10.0
  selection: int = 2_000
  test: int = 2_000
  decay: float = 0.05
  products: int = 5
  grid: Grid = Grid()
  goal: Annotated[int, harness.Allowed(high=100)] = 70
  reference_updates: int = 200
  rounds: int = 240
  seeds: int = 5


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    shards=(0, 1),
    local_steps=(1, 5),
    shares=(1.0, 0.5),
    partial_steps=(5,),
    clients=4,
    digits_per_client=40,
    pooling=7,
    selection=200,
    test=200,
    grid=Grid((2.0,), (0.004, 0.008), (3,), max_grid_extensions=0),
    goal=30,
    reference_updates=40,
    rounds=40,
    seeds=2,
  ),
  'paper': Settings(
    partial_steps=(1, 5, 10, 20),
    clients=50,
    digits_per_client=400,
    pooling=2,
    selection=5_000,
    test=10_000,
    rounds=600,
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  count, block = settings.digits_per_client, regimes_problem.BLOCK
  for invalid, message in (
    (
      any(count % (block * (shards or 1)) for shards in settings.shards),
      f'digits_per_client={count} must be divisible by {block} times each of '
      f'shards={settings.shards}',
    ),
    (
      settings.shares[0] != 1 or max(settings.shares) > 1,
      f'shares={settings.shares} must start with 1 and not exceed it',
    ),
    (
      vision.SIDE % settings.pooling,
      f'pooling={settings.pooling} must divide {vision.SIDE}, the side of an '
      'image',
    ),
  ):
    if invalid:
      raise harness.SettingsError(f'{message}.')


def main(options: harness.Options) -> harness.Report:
  """Tunes and runs all methods in all cells."""
  settings = options.settings
  pool, source = regimes_problem.load_pool(options.data_dir, settings)
  print(f'Data: {source.words}.', flush=True)
  federation = regimes_problem.make_federation(settings)
  seeds = regimes_cells.TUNING_SEEDS + tuple(options.seeds)
  references = regimes_problem.train_references(
    pool, options, federation, seeds
  )
  runner = regimes_cells.Runner(options, pool, federation, references)
  table = {}
  cells = regimes_cells.list_cells(settings)
  order = lambda pair: (-pair[0].taking_part, pair[0].local_steps, pair[1])
  # Neighbours differ in their digits only, and share their programs.
  pairs = itertools.product(cells, regimes_cells.METHODS)
  for cell, name in sorted(pairs, key=order):
    table[cell, name] = result = runner.run(name, cell)
    rounds = np.array2string(result.rounds, precision=0)
    print(f'{cell.coordinates()} {name}: {rounds}', flush=True)
  results = harness.Results()
  regimes_report.add_headroom(results, references, options.seeds)
  regimes_report.add_rounds(results, table)
  regime = regimes_report.add_ratios(results, table, settings.rounds)
  return harness.Report(
    results,
    rows=('split', 'steps', 'part'),
    columns=regimes_report.COLUMNS,
    plots={'regimes.png': regimes_report.draw_map(table, settings)},
    data=(source,),
    published=('MNIST',),
    more={'tuning_seeds': regimes_cells.TUNING_SEEDS, 'regime': regime},
  )


STUDY = harness.Study(main, PRESETS, check=check)


if __name__ == '__main__':
  harness.run(STUDY)
