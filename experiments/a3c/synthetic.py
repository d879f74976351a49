"""Random Markov decision process: what stale parameters cost N workers.

Paper: Shen, Zhang, Hong and Chen, Towards Understanding Asynchronous Advantage
Actor-Critic: Convergence and Linear Speedup, 2023.

    python -m experiments.a3c.synthetic --preset=quick

Expected: 64 workers arrive 61 times sooner than one, in samples of each; with
large constant steps they never do. Time: 2 to 4 minutes on 2 free cores.

Workers are simulated: gradients are evaluated at parameters that are as old as
they would be, in one program that is the same each time. The speedup counts
samples: it is N by construction where a delay does no harm, and says nothing
about seconds. Runs and numbers of workers are mapped; step sizes are chosen for
one worker, on a problem and on seeds that are not reported.
"""

import dataclasses
import pathlib
import time
from typing import Annotated, Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.a3c import speedup

SAMPLINGS = ('iid', 'markov')


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Shen et al., 2023, section 5.1.

  Attributes:
    states: of the process, the paper's 100.
    actions: in each state, the paper's 5.
    features: of a state, the paper's 10.
    discount: of the process; ours.
    workers: numbers of workers, the first of which is alone; the paper's go up
      to 16.
    steps: updates of all workers together.
    block: updates between two records.
    window: of the running average of rewards, in updates.
    share: of the way from the uniform to the best policy that has to be made.
    radius: of the ball that the critic is projected on.
    actor_scales: c1 of the actor's steps c1 / (1 + k)^(3/5), of which one is
      chosen.
    critic_scales: c2 of the critic's steps c2 / (1 + k)^(2/5), likewise.
    critic_fall: by which the critic's error has to fall for a choice.
    tuning_seeds: of the runs that choose.
    constant_actor: step size of the control's actor.
    constant_critic: step size of the control's critic.
    seeds: of the samples; the process is the same for all, as the paper's.
  """

  states: int = 100
  actions: int = 5
  features: int = 10
  discount: Annotated[float, harness.Allowed(0, 0.9999)] = 0.95
  workers: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
  steps: int = 20_000
  block: int = 50
  window: int = 4_000
  share: Annotated[float, harness.Allowed(0, 1)] = 0.4
  radius: float = 200.0
  actor_scales: tuple[float, ...] = (5.0, 10.0, 20.0, 40.0, 80.0)
  critic_scales: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
  critic_fall: float = 5.0
  tuning_seeds: int = 4
  constant_actor: float = 0.2
  constant_critic: float = 1.0
  seeds: int = 10


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    workers=(1, 8, 64),
    steps=8_000,
    actor_scales=(40.0,),
    critic_scales=(0.3,),
    seeds=3,
    tuning_seeds=1,
  ),
  # The published sizes are those above: longer, and more runs.
  'paper': Settings(steps=60_000, seeds=30),
}


class Problem(NamedTuple):
  """A process, features of its states, and rewards of a step to compare with.

  Attributes:
    mdp: the process.
    features: (states, size).
    uniform: the mean reward of a step of the uniform policy.
    best: that of the best one.
  """

  mdp: bj.rl.MDP
  features: chex.Array
  uniform: float
  best: float


def make_problem(settings: Settings, seed: int) -> Problem:
  """Uniform random transitions, rewards and features."""
  one, two = jax.random.split(jax.random.key(seed))
  sizes = {'states': settings.states}
  mdp = bj.rl.random_mdp(
    one, actions=settings.actions, discount=settings.discount, **sizes
  )
  step = lambda worth: float((1 - mdp.discount) * mdp.initial @ worth)
  shape = (settings.states, settings.actions)
  plain = bj.rl.state_values(mdp, jnp.full(shape, 1 / settings.actions))
  return Problem(
    mdp,
    bj.rl.random_features(two, size=settings.features, **sizes),
    uniform=step(plain),
    best=step(bj.rl.optimal(mdp).values),
  )


class BlockState(NamedTuple):
  """State of `blocks`.

  Attributes:
    inner: of the solver.
    values: what was measured over the last block, by name.
  """

  inner: Any
  values: dict[str, chex.Array]


def blocks(solver: Any, length: int) -> Any:
  """A solver whose update is a block of them.

  What goes round each update of a run, a look for numbers that are not finite
  for instance, then copies the snapshots of parameters once in a block.

  Args:
    solver: of A3C; it looks at no batch.
    length: updates in a block.

  Returns:
    A solver with the values `mean_reward`, `least_delay` and `most_delay`.
  """

  def init_fn(params):
    zero = jnp.zeros([])
    names = ('mean_reward', 'least_delay', 'most_delay')
    return BlockState(solver.init(params), dict.fromkeys(names, zero))

  def update_fn(batch, state, params=None, **extra_args):
    def body(carry, _):
      updates, inner = solver.update(batch, carry[1], carry[0], **extra_args)
      seen = bj.values(inner)
      new = bj.apply_updates(carry[0], updates), inner
      return new, (seen['reward'], seen['delay'])

    (after, inner), (rewards, delays) = jax.lax.scan(
      body, (params, state.inner), length=length
    )
    values = {
      'mean_reward': rewards.mean(),
      'least_delay': delays.min(),
      'most_delay': delays.max(),
    }
    return optax.tree.sub(after, params), BlockState(inner, values)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Grid(NamedTuple):
  """What is run at once: every combination, and every seed.

  Attributes:
    workers: numbers of workers.
    actor: scales of the actor's steps.
    critic: scales of the critic's.
    exponents: of the actor's and of the critic's schedule.
  """

  workers: tuple[int, ...]
  actor: tuple[float, ...]
  critic: tuple[float, ...]
  exponents: tuple[float, float] = (0.6, 0.4)


class Curves(NamedTuple):
  """Records of all runs of a grid; arrays (records, *grid, seeds).

  Attributes:
    steps: updates at each record, (records,).
    average: the running average of rewards, as a share of the way from the
      uniform to the best policy.
    worth: the same of the policies themselves, by exact returns.
    critic: the distance of the critic to its fixed point, over its start's.
    delay_error: how far the delay was from N - 1, at most, once the first N - 1
      updates are made; a number.
  """

  steps: np.ndarray
  average: np.ndarray
  worth: np.ndarray
  critic: np.ndarray
  delay_error: float


def run(
  options: harness.Options,
  name: str,
  problem: Problem,
  grid: Grid,
  sampling: str,
  seeds: Any,
) -> Curves:
  """Runs a grid as one program."""
  settings = options.settings
  members, hyper = harness.members(
    seeds, workers=grid.workers, actor=grid.actor, critic=grid.critic
  )
  first, second = (bj.solvers.power_schedule(1.0, p) for p in grid.exponents)

  def solver(context):
    mdp, features = context.data
    given = context.hyper
    one = bj.solvers.a3c_td0(
      mdp,
      features,
      workers=given['workers'],
      bound=max(grid.workers) - 1,
      actor=optax.sgd(lambda k: given['actor'] * first(k)),
      critic=optax.sgd(lambda k: given['critic'] * second(k)),
      radius=settings.radius,
      sampling=sampling,
      key=context.seed_key,
    )
    return blocks(one, settings.block)

  def init(context):
    mdp, features = context.data
    return bj.sequences(
      actor=jnp.zeros(mdp.rewards.shape), critic=jnp.zeros(features.shape[1])
    )

  def evaluate(context, params, state):
    mdp, features = context.data
    policy = jax.nn.softmax(params.actor)
    visits = bj.rl.visits(mdp, policy)
    root = bj.rl.td_fixed_point(
      mdp, policy, features, weights=visits.sum(axis=1)
    )
    return {
      'exact_reward': jnp.sum(visits * mdp.rewards),
      'critic_error': jnp.linalg.norm(params.critic - root),
    }

  trained = harness.train(
    solver,
    init,
    data=(problem.mdp, problem.features),
    shard=False,
    evaluate=evaluate,
    record_start=True,
    steps=settings.steps // settings.block,
    chunk=1,
    seeds=members,
    hyper=hyper,
    workdir=options.workdir,
    save_seconds=options.save_seconds,
    name=name,
    settings=harness.settings_of(settings, *CHOICES),
  )
  shape = *map(len, (grid.workers, grid.actor, grid.critic)), len(seeds)
  history = {
    key: np.asarray(values, np.float64).reshape(-1, *shape)
    for key, values in trained.history.items()
  }
  share = lambda x: (x - problem.uniform) / (problem.best - problem.uniform)
  window = settings.window // settings.block
  rewards = history['loss/mean_reward'][1:]
  error = history['critic_error']
  steps = settings.block * np.asarray(trained.steps[1:])
  return Curves(
    steps,
    share(speedup.running_average(rewards, window)),
    share(history['exact_reward'][1:]),
    error[1:] / error[:1],
    _delay_error(history, steps - settings.block, grid.workers),
  )


# What no single run depends on, beside its grid and its seeds.
CHOICES = (
  'workers',
  'share',
  'window',
  'actor_scales',
  'critic_scales',
  'critic_fall',
  'tuning_seeds',
  'constant_actor',
  'constant_critic',
)


def _delay_error(history, begins, workers) -> float:
  """How far delays were from N - 1, in blocks that begin after the start."""
  worst = 0.0
  for i, number in enumerate(workers):
    late = begins >= number - 1
    for name in ('least_delay', 'most_delay'):
      delays = history[f'loss/{name}'][1:][late, i]
      worst = max(worst, float(np.abs(delays - (number - 1)).max(initial=0)))
  return worst


def fall(critic: np.ndarray) -> np.ndarray:
  """The mean error of the critic over the last quarter, over its start's."""
  return critic[-(len(critic) // 4) :].mean(axis=0)


def choose(options: harness.Options) -> tuple[float, float, list[dict]]:
  """Step sizes with which one worker arrives first, and the table of them.

  Of those with which the critic comes close too, on average over the seeds of
  the choice; all of them, if it does so with none.
  """
  settings = options.settings
  grid = Grid((1,), settings.actor_scales, settings.critic_scales)
  # Neither the problem nor the samples are those that are reported.
  seeds = tuple(range(10_000, 10_000 + settings.tuning_seeds))
  curves = run(options, 'tuning', make_problem(settings, 1), grid, 'iid', seeds)
  rows = []
  for i, actor in enumerate(grid.actor):
    for j, critic in enumerate(grid.critic):
      curve = curves.average[:, 0, i, j].mean(axis=-1)
      rows.append(
        {
          'c1': actor,
          'c2': critic,
          'updates': speedup.first_at(curve, curves.steps, settings.share),
          'reached': float(curve[-1]),
          'critic': float(fall(curves.critic)[0, i, j].mean()),
        }
      )
  close = [r for r in rows if r['critic'] * settings.critic_fall <= 1] or rows
  best = min(close, key=lambda r: (r['updates'], -r['reached']))
  return best['c1'], best['c2'], rows


def summary(
  name: str, number: int, found: Curves, i: int, settings: Settings
) -> dict[str, Any]:
  """The row of the table of N workers, the i-th number of a grid."""
  average, worth = found.average[:, :, 0, 0], found.worth[:, :, 0, 0]
  target = settings.share
  gain = speedup.speedup(
    average[:, 0], average[:, i], number, found.steps, target
  )
  curve = average[:, i].mean(axis=-1)
  arrives = speedup.first_at(curve, found.steps, target)
  return {
    'run': f'{name}/n{number}',
    'workers': number,
    'updates': arrives if np.isfinite(arrives) else None,
    'samples each': arrives / number if np.isfinite(arrives) else None,
    'speedup': gain,
    'speedup of the policy': speedup.speedup(
      worth[:, 0], worth[:, i], number, found.steps, target
    ),
    'reward at the end': float(curve[-1]),
    'policy at the end': harness.mean_interval(worth[-1, i]),
    'critic error': harness.mean_interval(fall(found.critic)[i, 0, 0]),
  }


def metrics_of(name: str, number: int, row: dict[str, Any]) -> dict[str, float]:
  """What of a row the claims and the documents ask for."""
  if name.startswith('control'):
    reached = float(row['updates'] is not None)
    return {
      f'{name}/n{number}_reached': reached,
      f'{name}/n{number}_updates': row['updates'] or np.inf,
      **row['speedup'].metrics(f'{name}/n{number}'),
    }
  return {
    **row['speedup'].metrics(f'speedup/{name}/n{number}'),
    **row['speedup of the policy'].metrics(f'policy_speedup/{name}/n{number}'),
    f'updates/{name}/n{number}': row['updates'] or np.inf,
    f'critic_error/{name}/n{number}': row['critic error'].mean,
    **row['policy at the end'].metrics(f'share/{name}/n{number}'),
  }


def plot(folder, name, found, grid, settings):
  """Rewards over the updates of all workers, and critics' errors."""
  for what, label in (
    ('average', 'running average of rewards, share of the best'),
    ('critic', 'distance of the critic to its fixed point, of its start'),
  ):
    values = getattr(found, what)
    harness.plot_curves(
      folder / f'{name.replace("/", "_")}_{what}.png',
      {
        f'N = {number}': (found.steps, values[:, i, 0, 0])
        for i, number in enumerate(grid.workers)
      },
      xlabel='updates of all workers together',
      ylabel=label,
      logy=what == 'critic',
    )


def check(settings: Settings) -> None:
  """Raises ValueError where fields of the settings do not fit."""
  for name in ('steps', 'window'):
    if getattr(settings, name) % settings.block:
      raise harness.SettingsError(
        f'--{name}={getattr(settings, name)} is no multiple of '
        f'--block={settings.block}.'
      )
  if settings.steps < 4 * settings.block:
    raise harness.SettingsError(
      f'--steps={settings.steps}: at least four blocks of {settings.block}.'
    )
  if settings.workers[0] != 1 or len(settings.workers) < 2:
    raise harness.SettingsError(
      f'--workers={settings.workers}: 1 first, what the others are compared '
      'with, and at least one other.'
    )


def main(options: harness.Options) -> dict[str, float]:
  """Chooses step sizes, runs all workers, and writes what came out."""
  start = time.monotonic()
  settings = options.settings
  actor, critic, choices = choose(options)
  problem = make_problem(settings, 0)
  metrics: dict[str, float] = {
    'chosen/c1': actor,
    'chosen/c2': critic,
    'return/uniform': problem.uniform / (1 - settings.discount),
    'return/best': problem.best / (1 - settings.discount),
  }
  falling = Grid(settings.workers, (actor,), (critic,))
  ends = settings.workers[0], settings.workers[-1]
  constant = Grid(
    ends, (settings.constant_actor,), (settings.constant_critic,), (0.0, 0.0)
  )
  runs = {
    'iid': (falling, 'iid'),
    'markov': (falling, 'markov'),
    'control/large_step': (constant, 'iid'),
  }
  rows: list[dict[str, Any]] = []
  curves: dict[str, Any] = {}
  for name, (grid, sampling) in runs.items():
    found = run(options, name, problem, grid, sampling, options.seeds)
    metrics[f'delay/{name}'] = found.delay_error
    for i, number in enumerate(grid.workers):
      row = summary(name, number, found, i, settings)
      rows.append(row)
      metrics |= metrics_of(name, number, row)
      curves[row['run']] = found.average[:, i, 0, 0]
    plot(pathlib.Path(options.workdir), name, found, grid, settings)
  for name, of in (
    ('critic_error/worst', 'critic_error/'),
    ('delay/off', 'delay/'),
  ):
    found = [v for k, v in metrics.items() if k.startswith(of)]
    metrics[name] = harness.reduced(found, 'max')
  harness.write_table(options.workdir, rows)
  harness.write_results(
    options,
    metrics=metrics,
    seconds=time.monotonic() - start,
    curves=curves,
    choices=choices,
  )
  return metrics


STUDY = harness.Study(
  main, PRESETS, paper='a3c', binary='synthetic', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
