"""One policy for several games of MinAtar: MoCo beside other aggregators.

Paper: Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, Mitigating Gradient
Bias in Multi-objective Learning, 2023.

    python -m experiments.moco.multi_task_rl --preset=quick

Expected: no method differs from another by its interval. Time: 20 minutes.

Actor-critic with a trunk that all games share and a head for each; every update
plays all games, and the aggregator makes one gradient of their losses. The
paper's reinforcement learning is MT10, of robots; these are games, which run
compiled beside the learning. Learning rates are chosen on seeds, and runs, of
their own. Returns are of the training's last episodes, actions drawn.
"""

import dataclasses
import pathlib
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.harness import comparison
from experiments.moco import methods, minatar

VALUES = 3  # Of a method's own hyperparameter.
TUNING_SEED = 1_000_000


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    games: of MinAtar.
    methods: what is compared, of `methods.METHODS`.
    frames: of each game, in a reported run.
    tuning_frames: likewise, in the runs by which the learning rate is chosen.
    environments: of each game, side by side.
    rollout: steps of each in an update.
    records: in a run.
    rates: of Adam, that are tried by a method without a hyperparameter of its
      own; falls linearly to 0. One, here and beside it, for no tuning.
    rates_beside_own: by the others, a third as many, at each value of theirs.
    widen: how often rates may be widened where the best is at an end.
    episodes: of which the last ones count.
    seeds: of weights, environments and actions.
  """

  games: tuple[str, ...] = ('Breakout', 'Asterix', 'SpaceInvaders')
  methods: tuple[str, ...] = (
    'mean',
    'pcgrad',
    'cagrad',
    'smg',
    'nash_mtl',
    'moco',
  )
  frames: int = 100_000
  tuning_frames: int = 50_000
  environments: int = 32
  rollout: int = 16
  records: int = 10
  rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
  rates_beside_own: tuple[float, ...] = (2e-3,)
  widen: Annotated[int, harness.Allowed(0)] = 0
  episodes: int = 100
  seeds: int = 2


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    games=('Breakout', 'Asterix'),
    methods=('mean', 'moco'),
    frames=4_000,
    environments=8,
    rates=(2e-3,),
    records=2,
  ),
  'paper': Settings(
    games=('Breakout', 'Asterix', 'SpaceInvaders', 'Freeway', 'Seaquest'),
    methods=tuple(
      name for name, method in methods.METHODS.items() if method.samples == 1
    ),
    frames=10_000_000,
    tuning_frames=2_000_000,
    environments=64,
    records=50,
    widen=2,
    seeds=10,
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no comparison can have."""
  minatar.make_games(settings.games)
  fine = [n for n, m in methods.METHODS.items() if m.samples == 1]
  unknown = set(settings.methods) - set(fine)
  if unknown or not settings.methods:
    raise harness.SettingsError(
      f'unknown methods {sorted(unknown)}; those that take one rollout an '
      f'update: {", ".join(fine)}.'
    )
  if len(settings.rates) == 1 == len(settings.rates_beside_own):
    return  # Nothing is tuned.
  if len(settings.rates) != VALUES * len(settings.rates_beside_own):
    raise harness.SettingsError(
      f'rates are {VALUES} times as many as rates_beside_own, so that every '
      'method has as many trials.'
    )


def updates_of(settings: Settings, *, tuning: bool) -> int:
  """Updates of a run: each takes a rollout of every game."""
  frames = settings.tuning_frames if tuning else settings.frames
  return max(1, frames // (settings.environments * settings.rollout))


def make_solver(settings: Settings, name: str, hyper, key, updates: int):
  """A method by name, or `only <game>` for one game alone, with Adam."""
  model = minatar.make_model(minatar.make_games(settings.games))
  if name.startswith('only '):
    games = [settings.games.index(name.removeprefix('only '))]
    aggregator = bj.aggregators.mean(1)
  else:
    games = list(range(len(settings.games)))
    value = methods.own_value(name, hyper['own'].astype(int))
    aggregator = methods.METHODS[name].make(
      len(games), jax.random.key(17), ('heads',), value
    )
  learning = minatar.Learning(
    settings.environments, settings.rollout, window=settings.episodes
  )
  oracle = minatar.make_oracle(
    model, aggregator, learning, key=key, games=games
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
  updates = updates_of(settings, tuning=job.tuning)
  model = minatar.make_model(minatar.make_games(settings.games))
  alone = job.method.startswith('only ')
  played = [job.method[5:]] if alone else list(settings.games)

  def measure(context, params, state):
    del context, params
    episodes = bj.outputs(state)['episodes']
    found = {
      f'return/{game}': bj.rl.mean_return(each, settings.episodes)
      for game, each in zip(played, episodes)
    }
    # No game is to outweigh the others by the size of its rewards.
    logs = [jnp.log1p(jnp.maximum(x, 0)) for x in found.values()]
    found['score'] = jnp.mean(jnp.stack(logs))
    if not alone:
      weights = bj.diagnostics.objective_weights(state)
      found |= {f'weight/{game}': w for game, w in zip(played, weights)}
    return found

  return harness.train(
    lambda context: make_solver(
      settings, job.method, context.hyper, context.seed_key, updates
    ),
    init=lambda context: model.init(context.key),
    evaluate=measure,
    steps=updates,
    chunk=-(-updates // settings.records),
    **job.keywords,
  )


def main(options: harness.Options) -> None:
  """Runs single games and all methods, and writes table, plot and results."""
  start, cpu = time.monotonic(), time.process_time()
  settings = options.settings
  rules = comparison.Rules(
    options,
    settings=harness.settings_of(
      settings, 'methods', 'rates', 'rates_beside_own', 'widen'
    ),
    score=lambda trained: trained.history['score'][-1],
    tuning_seeds=(TUNING_SEED,),
    widenings=settings.widen,
  )

  def grid(name):
    if name.startswith('only ') or methods.own(name) is None:
      return {'own': (0,), 'rate': settings.rates}
    own = comparison.among(range(VALUES if len(settings.rates) > 1 else 1))
    return {'own': own, 'rate': settings.rates_beside_own}

  run = lambda job: train(settings, job)
  alone = comparison.compare(
    rules, [f'only {game}' for game in settings.games], run, grid
  )
  single = {
    game: alone[f'only {game}'].last(f'return/{game}')
    for game in settings.games
    if not alone[f'only {game}'].failure
  }
  outcomes = comparison.compare(rules, settings.methods, run, grid)
  games = list(settings.games)
  baseline = np.array(
    [np.mean(single[game]) if game in single else np.nan for game in games]
  )

  def measure(outcome):
    found = {game: outcome.last(f'return/{game}') for game in games}
    score = np.stack([found[game] for game in games], axis=-1)
    better = np.ones(len(games), bool)
    found['dm'] = np.asarray(
      methods.relative_change(score, baseline, better), np.float64
    )
    return found

  metrics, rows = comparison.report_outcomes(outcomes, measure)
  row = {'method': 'each game alone'}
  for game, values in single.items():
    row[game] = harness.mean_interval(values)
    metrics |= row[game].metrics(f'single/{game}')
  for each in rows:
    own = methods.own(each['method'])
    if 'own' in each:
      each['own'] = own.label(int(float(each['own']))) if own else ''
  rows.append(row)
  columns = list(dict.fromkeys(c for each in rows for c in each))
  harness.write_table(options.workdir, rows, columns)
  folder = pathlib.Path(options.workdir)
  each = settings.environments * settings.rollout
  panels = [
    harness.Panel(
      {
        name: (one.trained.steps * each, one.values(f'return/{game}'))
        for name, one in (*outcomes.items(), ('alone', alone[f'only {game}']))
        if not one.failure
      },
      xlabel='frames of the game',
      ylabel='return',
      title=game,
    )
    for game in games
  ]
  harness.plot_panels(folder / 'returns.png', panels, columns=len(panels))
  path = harness.write_results(
    options,
    metrics=metrics,
    seconds=time.monotonic() - start,
    cpu_seconds=round(time.process_time() - cpu, 1),
    curves={
      name: one.values('score')
      for name, one in outcomes.items()
      if not one.failure
    },
    substituted='games of MinAtar in place of MT10',
  )
  print(f'Results: {path}')


if __name__ == '__main__':
  harness.run(main, PRESETS, paper='moco', binary='multi_task_rl', check=check)
