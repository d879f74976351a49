"""What an exact step of a Stackelberg Markov game costs, beside NumPy.

    python -m experiments.benchmarks.stackelberg

Expected: the bound does not hold: between a half and once NumPy's CPU time, the
more the busier the memory is. NumPy has one thread: those of BLAS wait for each
other on products this small, which makes it look bad. Time: some minutes.

One update of `bj.solvers.pbrl`, value penalty: an inner step of policy
iteration, the penalty's and the leader's gradients, both players' steps. Ten
games by `vmap` in one program, against the same formulas in NumPy, one game
after another; a test compares their numbers. Bound: 0.2 times its time. Then
the growth with the number of states, at fewer games.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import threadpoolctl

from experiments import harness
from experiments.benchmarks import measure
from experiments.benchmarks import stackelberg_steps as steps

BOUND = 0.2


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    states: of the comparison with NumPy.
    actions: of each player.
    seeds: games at once.
    growth: further numbers of states.
    growth_seeds: games at once there.
    rounds: pairs of timings.
  """

  states: int = 100
  actions: int = 5
  seeds: int = 10
  growth: tuple[int, ...] = (30, 100, 300, 1_000)
  growth_seeds: int = 1
  rounds: int = 5


PRESETS = {
  'paper': Settings(),
  'smoke': Settings(states=20, growth=(10, 20), rounds=2),
}


def compare(
  settings: Settings, states: int, seeds: int
) -> tuple[measure.Ratio, measure.Program]:
  """The library's step against NumPy's."""
  actions = (settings.actions, settings.actions)
  games = steps.games_of(states, actions, seeds)
  start = steps.start_of(states, actions, seeds)
  ours = measure.Program(*steps.library(games, *start), games)
  theirs = steps.by_hand_runner(*steps.by_hand(games, *start))
  with threadpoolctl.threadpool_limits(1, 'blas'):
    return measure.time_ratio(ours.run, theirs, rounds=settings.rounds), ours


def main(options: harness.Options) -> None:
  """Runs the comparisons, prints them and writes them down."""
  begin = time.perf_counter()
  settings = options.settings
  rows: list[dict[str, Any]] = []
  metrics: dict[str, float] = {}
  cases: Sequence[tuple[int, int]] = (
    (settings.states, settings.seeds),
    *((states, settings.growth_seeds) for states in settings.growth),
  )
  for states, seeds in cases:
    ratio, program = compare(settings, states, seeds)
    bound = ''
    if seeds == settings.seeds:
      holds = measure.judge(ratio.cpu, ratio.low, ratio.high, BOUND)
      bound = f'CPU <= {BOUND}: {holds}'
    rows.append(
      {
        'states': states,
        'games': seeds,
        'wall (range)': str(ratio),
        'CPU': f'{ratio.cpu:.3f}',
        'ms': f'{1e3 * ratio.seconds:.3g} / {1e3 * ratio.base_seconds:.3g}',
        'MB': f'{program.memory / 1e6:.1f}',
        'bound': bound,
      }
    )
    name = f'states{states}/games{seeds}'
    metrics |= {
      f'{name}/wall': ratio.wall,
      f'{name}/wall_low': ratio.low,
      f'{name}/wall_high': ratio.high,
      f'{name}/cpu': ratio.cpu,
      f'{name}/milliseconds': 1e3 * ratio.seconds,
    }
  harness.write_table(options.workdir, rows)
  harness.write_results(
    options, metrics=metrics, seconds=time.perf_counter() - begin
  )


STUDY = harness.Study(main, PRESETS, paper='benchmarks', binary='stackelberg')


if __name__ == '__main__':
  harness.run(STUDY)
