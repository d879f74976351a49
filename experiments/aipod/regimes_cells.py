"""Tuning and runs of all methods in one cell of `regimes`."""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.aipod import federated_run, regimes_problem
from experiments.harness.study import comparison

# Draws of the digits, initial weights and coins of the tuning.
TUNING_SEEDS = comparison.tuning_seeds(2)
METHODS = ('e_aipod', 'fednest', 'local_sgd', 'lfednest')


class Cell(NamedTuple):
  """One combination of heterogeneity, local steps and participation.

  Attributes:
    shards: label-sorted shards per client; 0 for equal distributions.
    local_steps: local steps per lower round, on average for E-AiPOD.
    taking_part: participating clients per update.
  """

  shards: int
  local_steps: int
  taking_part: int

  @property
  def split(self) -> str:
    """Name of the heterogeneity."""
    return f'shards{self.shards}' if self.shards else 'iid'

  def coordinates(self) -> dict[str, Any]:
    """Coordinates of the cell's metrics."""
    return {
      'split': self.split,
      'steps': self.local_steps,
      'part': self.taking_part,
    }


def list_cells(settings: Any) -> list[Cell]:
  """Lists all cells: full participation, and the others at one number."""
  taking_part = [max(1, round(s * settings.clients)) for s in settings.shares]
  return [
    Cell(shards, steps, part)
    for i, part in enumerate(taking_part)
    for steps in (settings.partial_steps if i else settings.local_steps)
    for shards in settings.shards
  ]


def make_method(
  name: str, cell: Cell, lower_rounds: int, clients: int
) -> federated_run.Method:
  """Makes a method with an expected number of lower rounds per update."""
  part = 0 if cell.taking_part == clients else cell.taking_part
  if name == 'e_aipod':
    return federated_run.Method(
      lower_steps=lower_rounds * cell.local_steps,
      probability=1 / cell.local_steps,
      taking_part=part,
    )
  return federated_run.Method(
    lower_rounds=lower_rounds,
    local_steps=cell.local_steps,
    taking_part=part,
    variant=name,
    count_redundant=False,
  )


class Result(NamedTuple):
  """The result of a method in a cell.

  Attributes:
    rounds: rounds to the goal by reported seed; infinity if it is missed.
    score: tuning score: minus the rounds of the worst tuning seed.
    point: the tuned values.
    edges: hyperparameters whose choice is at an edge of the grid.
    history: history of the reported run.
  """

  rounds: np.ndarray
  score: float
  point: dict[str, float]
  edges: tuple[str, ...]
  history: dict[str, np.ndarray]


class Runner:
  """Tunes and runs the methods of all cells.

  Args:
    options: options of the run.
    pool: digits to draw from.
    federation: problem and sizes.
    references: accuracies that define the goals.
  """

  def __init__(
    self,
    options: harness.Options,
    pool: regimes_problem.Pool,
    federation: federated_run.Federation,
    references: regimes_problem.References,
  ):
    self._options, self._pool = options, pool
    self._federation, self._references = federation, references
    self._draw = functools.cache(
      lambda shards, seed: regimes_problem.draw_clients(
        pool, options.settings, shards, seed
      )
    )

  def _train(self, method, cell, job, part):
    settings = self._options.settings
    goal = self._goal(part, job.seeds)
    points = len(job.settings['tried'])

    def done(history):
      if part == 'test':
        rounds = federated_run.rounds_to(history, goal, part)
        return bool(np.all(np.isfinite(rounds)))
      return federated_run.decided(history, goal, points)

    draws = [self._draw(cell.shards, seed) for seed in job.seeds]
    return federated_run.train(
      method,
      self._federation,
      self._pool.shared,
      job,
      rounds=settings.rounds,
      stop_when=done,
      own=jax.tree.map(lambda *z: jnp.stack(z), *draws),
      at_once=None,
    )

  def _goal(self, part, seeds):
    share = self._options.settings.goal / 100
    return self._references.goal(part, share, seeds)

  def _tune(self, name, cell, lower_rounds, extensions):
    settings, options = self._options.settings, self._options
    method = make_method(name, cell, lower_rounds, settings.clients)
    place = '_'.join(map(str, cell.coordinates().values()))

    def score(trained):
      seeds = TUNING_SEEDS * (trained.history['rounds'].shape[1] // 2)
      goal = self._goal('selection', seeds)
      return federated_run.scores(trained.history, goal, settings.rounds)

    rules = comparison.Rules(
      options._replace(seeds=TUNING_SEEDS),
      settings=harness.run_settings(settings, *_SWEEP_SETTINGS),
      score=score,
      # The worst seed: step sizes near instability fail on other seeds.
      over_seeds=np.min,
      widenings=extensions,
    )
    grid = {
      'upper_rate': settings.grid.upper_rates,
      'lower_rate': settings.grid.lower_rates,
    }
    with warnings.catch_warnings():
      # The largest step sizes of a grid often diverge.
      warnings.filterwarnings('ignore', '.*became non-finite')
      return comparison.run(
        rules,
        f'{place}/{name}/tuning/{lower_rounds}',
        lambda job: self._train(method, cell, job, 'selection'),
        grid,
      )

  def run(self, name: str, cell: Cell) -> Result:
    """Tunes lower rounds and step sizes of a method, and runs it.

    The grid of step sizes is extended for the best number of lower rounds, if
    that reaches the goal on all tuning seeds.

    Args:
      name: method.
      cell: cell.

    Returns:
      Its result.
    """
    settings, options = self._options.settings, self._options
    tuned = {
      n: self._tune(name, cell, n, 0) for n in settings.grid.lower_rounds
    }
    lower_rounds = max(tuned, key=lambda n: tuned[n].score)
    outcome = tuned[lower_rounds]
    extensions = settings.grid.max_grid_extensions
    if extensions and outcome.edges and outcome.score > -settings.rounds:
      outcome = self._tune(name, cell, lower_rounds, extensions)
    edges = outcome.edges
    axis = comparison.Axis(settings.grid.lower_rounds, (1, np.inf))
    if axis.side(lower_rounds):
      edges = (*edges, 'lower_rounds')
    method = make_method(name, cell, lower_rounds, settings.clients)
    place = '_'.join(map(str, cell.coordinates().values()))
    rules = comparison.Rules(
      options,
      settings=harness.run_settings(settings, *_SWEEP_SETTINGS),
      score=lambda trained: np.zeros(len(options.seeds)),
      tuning_seeds=TUNING_SEEDS,
    )
    reported = comparison.run(
      rules,
      f'{place}/{name}',
      lambda job: self._train(method, cell, job, 'test'),
      {key: (value,) for key, value in outcome.point.items()},
    )
    history = reported.trained.history
    goal = self._goal('test', options.seeds)
    return Result(
      federated_run.rounds_to(history, goal),
      outcome.score,
      outcome.point | {'lower_rounds': lower_rounds},
      edges,
      history,
    )


# Settings that no single run depends on.
_SWEEP_SETTINGS = ('shards', 'local_steps', 'shares', 'partial_steps', 'grid')
