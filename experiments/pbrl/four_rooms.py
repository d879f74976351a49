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
# By temperature and price, means of 10 seeds: HPGD, adaptive model design, zero
# order.
PUBLISHED = {
  (0.001, 1.0): (0.91, 0.58, 0.59),
  (0.001, 3.0): (0.51, 0.51, 0.50),
  (0.001, 5.0): (0.46, 0.46, 0.46),
  (0.003, 1.0): (0.95, 1.00, 0.91),
  (0.003, 3.0): (0.73, 0.39, 0.40),
  (0.003, 5.0): (0.29, 0.32, 0.32),
  (0.005, 1.0): (1.17, 1.28, 1.15),
  (0.005, 3.0): (1.01, 1.13, 1.02),
  (0.005, 5.0): (0.87, 0.97, 0.79),
}


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
  cells = contextual.product(
    temperature=settings.temperatures, price=settings.prices
  )
  known = [PUBLISHED.get((c['temperature'], c['price']), ()) for c in cells]
  return contextual.Study(
    lambda w, goal, hyper: rooms_lib.process(ROOMS, w, goal, hyper['price']),
    len(ROOMS.goals),
    lambda key: 0.01 * jax.random.normal(key, (ROOMS.start.size + 1,)),
    ROOMS.transitions.shape[1:3],
    cells,
    [' / '.join(f'{x:.2f}' for x in numbers) for numbers in known],
  )


def main(options: harness.Options) -> dict[str, float]:
  """Tunes and runs all methods, and writes table, plots and results."""
  return contextual.run(options, study_of(options.settings))


STUDY = harness.Study(
  main, PRESETS, paper='pbrl', binary='four_rooms', check=contextual.check
)


if __name__ == '__main__':
  harness.run(STUDY)
