"""Four rooms: a leader taxes cells to steer a follower past its own cell.

Paper: Shen, Yang and Chen, Principled Penalty-based Methods for Bilevel
Reinforcement Learning and RLHF, 2024. The problem and its table are from Thoma,
Pasztor, Krause, Ramponi and Hu, Contextual Bilevel Reinforcement Learning for
Incentive Alignment, 2024.

    python -m experiments.pbrl.four_rooms --preset=quick

Expected: the value penalty is above the best other method in 1 of 9 cells,
level in 7 and below in 1. Time: 6 CPU-minutes.

Methods: the value and the Bellman penalty of the paper; HPGD, the hypergradient
at the exact response, with its published mean; AMD, adaptive model design,
which differentiates some backups of the response; zero order, by random
differences. The exact gradient of both goals is a reference.
The table has nine cells: three temperatures of the follower's entropy and three
prices that the leader pays for its taxes. All methods are judged by the
leader's return at the follower's exact optimum, averaged over both goals. The
preset `long` takes the published 10,000 updates and rates, at prices 1 and 3,
in 100 minutes on a core.
"""

import dataclasses

import jax

from experiments import harness
from experiments.pbrl import contextual
from experiments.pbrl import rooms as rooms_lib

_PUBLISHED_RATES = (0.01, 0.05, 0.1, 0.5)
ROOMS = rooms_lib.make_rooms()


@dataclasses.dataclass(frozen=True)
class Settings(contextual.Settings):
  """Settings of a run, and of this problem.

  Attributes:
    prices: price per unit of tax that the leader pays, as in the paper.
  """

  prices: tuple[float, ...] = (1.0, 3.0, 5.0)


PRESETS = {
  'quick': Settings(rates=(0.5, 2.5, 12.5)),
  'smoke': Settings(
    temperatures=(0.005,),
    prices=(1.0,),
    steps=40,
    chunk=20,
    rates=(0.5, 2.5),
    seeds=2,
  ),
  'long': Settings(
    prices=(1.0, 3.0),
    steps=10_000,
    chunk=500,
    rates=_PUBLISHED_RATES,
    max_grid_extensions=0,
    seeds=5,
  ),
  'paper': Settings(
    steps=10_000,
    chunk=500,
    backups=100,
    rates=_PUBLISHED_RATES,
    max_grid_extensions=0,
  ),
}


def make_study(settings: Settings) -> contextual.Study:
  """Makes the study of all temperatures and prices."""
  return contextual.Study(
    lambda w, goal, hyper: rooms_lib.process(ROOMS, w, goal, hyper['price']),
    len(ROOMS.goals),
    lambda key: 0.01 * jax.random.normal(key, (ROOMS.weights,)),
    ROOMS.shape,
    contextual.product(
      temperature=settings.temperatures, price=settings.prices
    ),
  )


def main(options: harness.Options) -> harness.Report:
  """Tunes and runs all methods."""
  return contextual.run(options, make_study(options.settings))


STUDY = harness.Study(main, PRESETS)


if __name__ == '__main__':
  harness.run(STUDY)
