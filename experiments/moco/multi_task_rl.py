"""One policy for several games, or for MT10: MoCo beside other aggregators.

Paper: Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, Mitigating Gradient
Bias in Multi-objective Learning, 2023.

    python -m experiments.moco.multi_task_rl --preset=quick
    python -m experiments.moco.multi_task_rl --preset=mt10

Expected: no method differs from another by its interval. Time: 40 minutes.

Actor-critic with a trunk that all tasks share and a head for each; every update
plays all tasks, and the aggregator makes one gradient of their losses. The
paper's reinforcement learning is MT10, of robots, by soft actor-critic. Games
of MinAtar run compiled beside the learning; MT10 runs on the host, and needs
the extra of that name. Its preset cuts episodes after 150 of 500 steps.
Learning rates are chosen on seeds, and runs, of their own. Returns are of the
training's last episodes, actions drawn.
"""

import dataclasses
import pathlib
import time
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.harness import comparison
from experiments.moco import methods, minatar, mt10, multi_task

VALUES = 3  # Of a method's own hyperparameter.
TUNING_SEED = 1_000_000


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    suite: minatar or mt10.
    games: of MinAtar, or tasks of MT10, where () is all ten.
    methods: what is compared, of `methods.METHODS`.
    frames: of each game, in a reported run.
    tuning_frames: of each game, in the runs that choose the learning rate.
    environments: of each game, side by side.
    rollout: steps of each in an update; for mt10, the first ones of an episode,
      which has 500: returns and successes are of these steps only.
    reward_scale: of rewards in the losses.
    records: in a run.
    rates: of Adam, that are tried by a method without a hyperparameter of its
      own; falls linearly to 0. One, here and beside it, for no tuning.
    rates_beside_own: by the others, a third as many, at each value of theirs.
    widen: how often rates may be widened where the best is at an end.
    episodes: of which the last ones count.
    seeds: of weights, environments and actions.
  """

  suite: Literal['minatar', 'mt10'] = 'minatar'
  games: Annotated[tuple[str, ...], harness.Allowed(empty=True)] = (
    'Breakout',
    'Asterix',
    'SpaceInvaders',
  )
  methods: tuple[str, ...] = (
    'mean',
    'pcgrad',
    'cagrad',
    'smg',
    'nash_mtl',
    'moco',
  )
  frames: int = 500_000
  tuning_frames: int = 50_000
  environments: int = 32
  rollout: int = 16
  reward_scale: float = 1.0
  records: int = 10
  rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
  rates_beside_own: tuple[float, ...] = (4e-3,)
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
  # Ten robots on the host, from end to end: too short to learn much, and
  # episodes are cut after 150 of 500 steps.
  'mt10': Settings(
    suite='mt10',
    games=(),
    methods=('mean', 'moco'),
    frames=4_500,
    environments=1,
    rollout=150,
    reward_scale=0.1,
    rates=(1e-3,),
    rates_beside_own=(1e-3,),
    episodes=10,
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
  learning = _learning(settings)
  tasks = make_tasks(settings)
  tasks.collector(multi_task.make_model(tasks), [0], learning)
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


def make_tasks(settings: Settings) -> multi_task.Tasks:
  """What is played; a SettingsError says what is not there."""
  make = mt10.make_tasks if settings.suite == 'mt10' else minatar.make_tasks
  return make(settings.games)


def _learning(settings):
  return multi_task.Learning(
    settings.environments,
    settings.rollout,
    reward_scale=settings.reward_scale,
    window=settings.episodes,
  )


def updates_of(settings: Settings, *, tuning: bool) -> int:
  """Updates of a run: each takes a rollout of every game."""
  frames = settings.tuning_frames if tuning else settings.frames
  return max(1, frames // (settings.environments * settings.rollout))


def make_solver(settings: Settings, name: str, hyper, key, updates: int):
  """A method by name, or `only <game>` for one game alone, with Adam."""
  tasks = make_tasks(settings)
  if name.startswith('only '):
    played = [tasks.names.index(name.removeprefix('only '))]
    aggregator = bj.aggregators.mean(1)
  else:
    played = list(range(len(tasks.names)))
    value = methods.own_value(name, hyper['own'].astype(int))
    aggregator = methods.METHODS[name].make(
      len(played), jax.random.key(17), ('heads',), value
    )
  oracle = multi_task.make_oracle(
    multi_task.make_model(tasks),
    aggregator,
    _learning(settings),
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
  updates = updates_of(settings, tuning=job.tuning)
  tasks = make_tasks(settings)
  model = multi_task.make_model(tasks)
  alone = job.method.startswith('only ')
  played = [job.method.removeprefix('only ')] if alone else tasks.names

  def measure(context, params, state):
    del context, params
    episodes = bj.outputs(state)['episodes']
    found = {
      f'{name}/{game}': value
      for game, each in zip(played, episodes)
      for name, value in tasks.measure(each).items()
    }
    # No game is to outweigh the others by the size of its rewards.
    returns = jnp.stack([found[f'return/{game}'] for game in played])
    found['score'] = jnp.mean(jnp.log1p(jnp.maximum(returns, 0)))
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


def substituted_by(settings: Settings) -> str:
  """What stands in for the paper's reinforcement learning."""
  if settings.suite != 'mt10':
    return 'games of MinAtar in place of MT10'
  actor_critic = 'actor-critic in place of soft actor-critic'
  if settings.rollout == mt10.LONGEST:
    return actor_critic
  return (
    f'{actor_critic}, episodes cut after {settings.rollout} of {mt10.LONGEST} '
    'steps'
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
  games = list(make_tasks(settings).names)
  alone = comparison.compare(rules, [f'only {g}' for g in games], run, grid)
  single = {
    game: alone[f'only {game}'].last(f'return/{game}')
    for game in games
    if not alone[f'only {game}'].failure
  }
  outcomes = comparison.compare(rules, settings.methods, run, grid)
  baseline = np.array(
    [np.mean(single[game]) if game in single else np.nan for game in games]
  )

  def measure(outcome):
    found = {game: outcome.last(f'return/{game}') for game in games}
    won = [f'success/{game}' for game in games]
    if won[0] in outcome.trained.history:
      found['success'] = np.mean([outcome.last(name) for name in won], axis=0)
    score = np.stack([found[game] for game in games], axis=-1)
    better = np.ones(len(games), bool)
    found['dm'] = np.asarray(
      methods.relative_change(score, baseline, better), np.float64
    )
    return found

  metrics, rows = comparison.report_outcomes(outcomes, measure)
  row: dict[str, Any] = {'method': 'each task alone'}
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
  columns = min(5, len(panels))
  harness.plot_panels(folder / 'returns.png', panels, columns=columns)
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
    substituted=substituted_by(settings),
  )
  print(f'Results: {path}')


STUDY = harness.Study(
  main, PRESETS, paper='moco', binary='multi_task_rl', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
