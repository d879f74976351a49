"""Multi-task reinforcement learning with MoCo and other aggregators.

Paper: Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, Mitigating Gradient
Bias in Multi-objective Learning, 2023.

    python -m experiments.moco.multi_task_rl --preset=quick

Expected: no method differs from another by its interval. Time: 40 minutes.

Actor-critic on games of MinAtar with a shared trunk and one head per game; each
update plays all games, and the aggregator combines the gradients of their
losses. The paper trains MT10 of Meta-World by soft actor-critic, which is not
built here. Learning rates are tuned with separate seeds and shorter runs.
Returns are those of the last training episodes, with sampled actions.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.harness.study import comparison
from experiments.moco import compare, methods
from experiments.rl import minatar, multi_task

TUNING_SEED = 1_000_000
# Methods that need one rollout per update.
METHODS = tuple(n for n, m in methods.METHODS.items() if m.samples == 1)
Methods = Annotated[tuple[str, ...], harness.Among(METHODS, methods.MEANINGS)]

LEARNING = multi_task.Learning()
GRID = compare.Grid((2e-3, 4e-3, 8e-3), (4e-3,), max_grid_extensions=0)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    games: games of MinAtar.
    methods: methods to compare.
    frames: frames per game in a reported run.
    tuning_frames: frames per game in a tuning run.
    records: number of records of a run.
    learning: settings of actor-critic, equal for all methods.
    grid: grid of the tuning; rates of Adam decay linearly to 0.
    seeds: number of seeds, for weights, environments and actions.
  """

  games: tuple[str, ...] = ('Breakout', 'Asterix', 'SpaceInvaders')
  methods: Methods = (*('mean', 'pcgrad', 'cagrad', 'smg', 'nash_mtl', 'moco'),)
  frames: int = 500_000
  tuning_frames: int = 50_000
  records: int = 10
  learning: multi_task.Learning = LEARNING
  grid: compare.Grid = GRID
  seeds: int = 2


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    games=('Breakout', 'Asterix'),
    methods=('mean', 'moco'),
    frames=4_000,
    learning=multi_task.Learning(environments=8),
    grid=compare.Grid((2e-3,), (4e-3,), max_grid_extensions=0),
    records=2,
  ),
  'paper': Settings(
    games=('Breakout', 'Asterix', 'SpaceInvaders', 'Freeway', 'Seaquest'),
    methods=METHODS,
    frames=10_000_000,
    tuning_frames=2_000_000,
    learning=multi_task.Learning(environments=64),
    records=50,
    grid=dataclasses.replace(GRID, max_grid_extensions=2),
    seeds=10,
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  compare.check(settings)
  minatar.make_tasks(settings.games)


def count_updates(settings: Settings, *, tuning: bool) -> int:
  """Number of updates of a run, with one rollout per game each."""
  frames = settings.tuning_frames if tuning else settings.frames
  learning = settings.learning
  return max(1, frames // (learning.environments * learning.rollout))


def make_solver(settings: Settings, name: str, hyper, key, updates: int):
  """Makes a method by name, or `only <game>` for a single game, with Adam."""
  tasks = minatar.make_tasks(settings.games)
  if name.startswith('only '):
    played = [tasks.names.index(name.removeprefix('only '))]
    aggregator = bj.aggregators.mean(1)
  else:
    played = list(range(len(tasks.names)))
    value = methods.hyperparameter_value(name, hyper['own'].astype(int))
    aggregator = methods.METHODS[name].make(
      len(played), jax.random.key(17), ('heads',), value
    )
  oracle = multi_task.make_oracle(
    multi_task.make_model(tasks),
    aggregator,
    settings.learning,
    key=key,
    played=played,
  )
  falling = optax.linear_schedule(1.0, 0.0, updates)
  return optax.chain(
    oracle,
    optax.clip_by_global_norm(0.5),
    optax.scale_by_adam(eps=1e-5),
    optax.scale_by_schedule(falling),
    optax.scale(-1.0 * hyper['rate']),
  )


def train(settings: Settings, job: comparison.Job) -> harness.Trained:
  """Trains all members of a job in one compiled program."""
  updates = count_updates(settings, tuning=job.tuning)
  tasks = minatar.make_tasks(settings.games)
  model = multi_task.make_model(tasks)
  single = job.method.startswith('only ')
  played = [job.method.removeprefix('only ')] if single else tasks.names

  def measure(context, params, state):
    episodes = bj.outputs(state)['episodes']
    metrics = {
      f'return/{game}': bj.rl.mean_return(window, len(window.returns))
      for game, window in zip(played, episodes)
    }
    # Logarithms, because games differ in the scale of their rewards.
    returns = jnp.stack([metrics[f'return/{game}'] for game in played])
    metrics['score'] = jnp.mean(jnp.log1p(jnp.maximum(returns, 0)))
    if not single:
      weights = bj.diagnostics.objective_weights(state)
      metrics |= {f'weight/{game}': w for game, w in zip(played, weights)}
    return metrics

  return harness.train(
    lambda context: make_solver(
      settings, job.method, context.hyper, context.seed_key, updates
    ),
    harness.Task(lambda context: model.init(context.key), hyper=job.hyper),
    job.training(updates, chunk=-(-updates // settings.records)),
    harness.Measure(measure),
  )


def main(options: harness.Options) -> harness.Report:
  """Runs single games and all methods on all games."""
  settings = options.settings
  rules = comparison.Rules(
    options,
    settings=harness.run_settings(settings, 'methods', 'grid'),
    score=lambda trained: trained.history['score'][-1],
    tuning_seeds=(TUNING_SEED,),
    widenings=settings.grid.max_grid_extensions,
  )
  run = lambda names: comparison.compare(
    rules, names, lambda job: train(settings, job), settings.grid.axes
  )
  games = settings.games
  singles = run([f'only {game}' for game in games])
  outcomes = run(settings.methods)
  return harness.Report(
    summarise(games, singles, outcomes),
    columns=[
      *(harness.Column('return', game, {'game': game}) for game in games),
      *('dm', 'own', 'rate', 'trials', 'seconds'),
    ],
    titles={'single_task': 'each task alone'},
    curves={
      name: one.values('score')
      for name, one in outcomes.items()
      if not one.failure
    },
    plots={'returns.png': draw(settings, games, singles, outcomes)},
    more={'substituted': 'games of MinAtar in place of MT10'},
  )


def summarise(
  games: Sequence[str],
  singles: compare.Outcomes,
  outcomes: compare.Outcomes,
) -> harness.Results:
  """Collects metrics of all methods.

  Args:
    games: names of the games.
    singles: runs of single games, by `only <game>`.
    outcomes: runs of all games, by method.

  Returns:
    Returns by method (or `single_task`) and game; other metrics by method.
  """
  results = harness.Results()
  baseline = np.full(len(games), np.nan)
  last = lambda outcome, game: outcome.last(f'return/{game}')
  scores = {
    name: np.stack([last(one, game) for game in games], axis=-1)
    for name, one in outcomes.items()
    if not one.failure
  }
  for i, game in enumerate(games):
    for name, score in scores.items():
      results.put({'method': name, 'game': game}, {'return': score[:, i]})
    if not singles[f'only {game}'].failure:
      values = last(singles[f'only {game}'], game)
      results.put({'method': 'single_task', 'game': game}, {'return': values})
      baseline[i] = np.mean(values)

  def measure(outcome):
    change = methods.relative_change(scores[outcome.method], baseline, True)
    return {'dm': np.asarray(change, np.float64)}

  comparison.add_outcomes(results, outcomes, measure)
  compare.note_hyperparameters(results, outcomes, {})
  return results


def draw(
  settings: Settings,
  games: Sequence[str],
  singles: compare.Outcomes,
  outcomes: compare.Outcomes,
) -> matplotlib.figure.Figure:
  """Draws returns over frames, per game."""
  frames = settings.learning.environments * settings.learning.rollout
  panels = [
    harness.Panel(
      {
        name: (one.trained.steps * frames, one.values(f'return/{game}'))
        for name, one in (*outcomes.items(), ('alone', singles[f'only {game}']))
        if not one.failure
      },
      xlabel='frames of the game',
      ylabel='return',
      title=game,
    )
    for game in games
  ]
  return harness.draw_panels(panels, columns=min(5, len(panels)))


STUDY = harness.Study(
  main,
  PRESETS,
  check=check,
  renamed=compare.RENAMED | {'episodes': 'learning.window'},
)


if __name__ == '__main__':
  harness.run(STUDY)
