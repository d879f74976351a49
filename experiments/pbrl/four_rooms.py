"""Four rooms: penalties on cells that lead a follower by a cell of its leader.

Paper: Shen, Yang and Chen, Principled Penalty-based Methods for Bilevel
Reinforcement Learning and RLHF, 2024. The problem and its table are of Thoma,
Pasztor, Krause, Ramponi and Hu, Contextual Bilevel Reinforcement Learning for
Incentive Alignment, 2024.

    python -m experiments.pbrl.four_rooms --preset=quick

Expected: the value penalty above in 2 cells, level in 7 of 9. Time: eight
CPU-minutes.

Nine cells of a table: three temperatures of the follower's entropy, three
prices of the penalties to the leader. All methods are judged by the leader's
return, the mean over both goals, at the follower's exact optimum.
"""

import dataclasses

import jax

from experiments import harness
from experiments.pbrl import contextual
from experiments.pbrl import rooms as rooms_lib

ROOMS = rooms_lib.make_rooms()


@dataclasses.dataclass(frozen=True)
class Settings(contextual.Settings):
  """Settings of a run, and of this problem.

  Attributes:
    prices: of the penalties to the leader, the paper's.
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
  'paper': Settings(
    steps=10_000, chunk=500, backups=100, rates=(0.01, 0.05, 0.1, 0.5)
  ),
}


def study_of(settings: Settings) -> contextual.Study:
  """The nine cells."""
  return contextual.Study(
    lambda w, goal, hyper: rooms_lib.process(ROOMS, w, goal, hyper['price']),
    len(ROOMS.goals),
    lambda key: 0.01 * jax.random.normal(key, (ROOMS.start.size + 1,)),
    ROOMS.transitions.shape[1:3],
    contextual.product(
      temperature=settings.temperatures, price=settings.prices
    ),
  )


def main(options: harness.Options) -> harness.Report:
  """Tunes and runs all methods."""
  return contextual.run(options, study_of(options.settings))


STUDY = harness.Study(main, PRESETS, paper='pbrl', binary='four_rooms')


if __name__ == '__main__':
  harness.run(STUDY)
