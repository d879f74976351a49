"""Asynchronous actor-critic on CartPole, Acrobot and MinAtar, compiled.

Paper: Shen, Zhang, Hong and Chen, Towards Understanding Asynchronous Advantage
Actor-critic: Convergence and Linear Speedup, 2023.

    python -m experiments.a3c.gymnax --env=CartPole-v1 --preset=quick
    python -m experiments.a3c.gymnax evaluate --env=CartPole-v1 --preset=quick
    python -m experiments.a3c.gymnax render --env=CartPole-v1 --preset=quick

Expected: a training return of 490 to 500 of 500 on CartPole-v1 for each seed;
one worker learns sooner in the mean. -84 on Acrobot-v1.
Time: 2 minutes on a core, compilation included; MinAtar 0.1 ms a frame.

Sixteen workers in round robin, each with environments of its own and
parameters that are fifteen updates old: see `workers`. `training_return` is the
mean return of the last episodes of the training itself: sampled actions, while
the parameters change. `evaluate` reads the newest checkpoint and plays whole
episodes with fixed parameters. The control is one worker without delay, at as
many updates and frames. Training ends with a GIF of the best seed's policy;
`render` makes another from the file that it is kept in.
"""

import dataclasses
import pathlib
import time
import zlib
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.a3c import workers
from experiments.rl import environments, evaluation, networks, policies


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    env: an environment of gymnax.
    workers: number of workers that hold stale parameters; the paper has 16.
    environments: number of environments of each worker.
    rollout: steps of each environment for a gradient.
    frames: environment steps in all.
    records: number of records of the run; the last one is at its end.
    actor_rate: first step size of the actor's Adam; falls linearly to 0.
    critic_rate: first step size of the critic's Adam; falls linearly to 0.
    clip: largest norm of a gradient, of the actor and of the critic.
    discount: of rewards.
    decay: lambda of generalised advantages; 0 is the paper's TD(0).
    entropy: weight of the policy's entropy.
    reward_scale: of rewards in the losses.
    normalise: whether advantages are normalised for the actor.
    window: last episodes of the training that `training_return` averages.
    episodes: number that `evaluate` plays for each seed.
    policy: the actions in `evaluate`: the likeliest ones (greedy) or sampled.
    devices: number of devices over which the workers are split.
    seeds: of weights, environments and actions.
  """

  env: str = 'CartPole-v1'
  workers: int = 16
  environments: int = 8
  rollout: int = 20
  frames: int = 3_000_000
  records: int = 30
  actor_rate: float = 1e-3
  critic_rate: float = 3e-3
  clip: float = 0.5
  discount: Annotated[float, harness.Allowed(0, 1)] = 0.99
  decay: Annotated[float, harness.Allowed(0, 1)] = 0.95
  entropy: Annotated[float, harness.Allowed(0)] = 0.01
  reward_scale: float = 0.1
  normalise: bool = True
  window: int = 100
  episodes: int = 100
  policy: evaluation.Policy = 'greedy'
  devices: int = 1
  seeds: int = 3


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    workers=4,
    environments=4,
    frames=32_000,
    records=4,
    window=20,
    episodes=20,
    seeds=2,
  ),
  'paper': Settings(frames=10_000_000, records=100, seeds=10),
}


def frames_per_round(settings: Settings) -> int:
  """Frames of a round, in which each worker makes a rollout and an update."""
  return settings.workers * settings.environments * settings.rollout


def rounds_of(settings: Settings) -> int:
  """Rounds of all workers in a run."""
  return max(1, settings.frames // frames_per_round(settings))


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  environments.make(settings.env)


def make_solver(settings: Settings, key: jax.Array):
  """Workers in round robin, with Adam for actor and critic."""
  known = environments.make(settings.env)
  agent = networks.agent(known.shape, known.environment.actions)

  def make_oracle(key):
    return bj.rl.actor_critic(
      agent.policy,
      agent.value,
      known.environment,
      environments=settings.environments,
      steps=settings.rollout,
      discount=settings.discount,
      decay=settings.decay,
      entropy_bonus=settings.entropy,
      reward_scale=settings.reward_scale,
      normalise=settings.normalise,
      window=settings.window,
      key=key,
    )

  def adam(rate):
    updates = rounds_of(settings) * settings.workers
    falling = optax.linear_schedule(rate, 0.0, updates)
    return optax.chain(
      optax.clip_by_global_norm(settings.clip), optax.adam(falling, eps=1e-5)
    )

  move = workers.mover(
    actor=adam(settings.actor_rate), critic=adam(settings.critic_rate)
  )
  return agent, workers.round_robin(
    make_oracle,
    move,
    workers=settings.workers,
    key=key,
    devices=settings.devices,
  )


class Clock:
  """Processor time of a run over all its parts, s."""

  def __init__(self) -> None:
    """Starts."""
    self.set_state(0.0)

  def get_state(self) -> float:
    """The time so far."""
    return self._before + time.process_time() - self._start

  def set_state(self, before: float) -> None:
    """Goes on from the time of the parts before."""
    self._before, self._start = before, time.process_time()


def random_return(settings: Settings, key: jax.Array) -> float:
  """The control: the mean return of actions drawn without a policy."""
  environment = environments.make(settings.env).environment
  family = bj.rl.distribution_of(environment.actions)

  def act(params, key, observations):
    del params
    count = len(observations)
    if isinstance(environment.actions, int):
      return family.sample(key, jnp.zeros([count, environment.actions]))
    return jax.random.uniform(key, (count, *environment.actions), None, -1, 1)

  collector = bj.rl.rollouts(environment, act, environments=32, steps=1_000)
  _, state = jax.jit(lambda k: collector.collect(None, collector.init(k)))(key)
  return float(bj.rl.mean_return(collector.episodes(state)))


def one_worker(settings: Settings) -> Settings:
  """The control: one worker without delay, at as many updates and frames."""
  frames = rounds_of(settings) * frames_per_round(settings)
  return dataclasses.replace(settings, workers=1, devices=1, frames=frames)


def train(
  options: harness.Options, clock: Clock, *, alone: bool = False
) -> harness.Trained:
  """Trains all seeds in one compiled program.

  Args:
    options: what the flags say.
    clock: of the run.
    alone: whether to train the control `one_worker`, with its records at as
      many updates as those of all workers.

  Returns:
    The run.
  """
  settings = options.settings
  rounds = rounds_of(settings)
  chunk = -(-rounds // settings.records)
  name = settings.env
  if alone:
    chunk *= settings.workers
    settings = one_worker(settings)
    rounds, name = rounds_of(settings), f'{name}-one_worker'
  agent, _ = make_solver(settings, jax.random.key(0))

  def measure(context, params, state):
    del context, params
    episodes = bj.outputs(state)['episodes']
    return {
      'training_return': bj.rl.mean_return(episodes, settings.window),
      'episodes': episodes.count.sum(),
    }

  return harness.train(
    lambda context: make_solver(settings, context.seed_key)[1],
    init=lambda context: agent.init(context.key),
    evaluate=measure,
    host_state={'clock': clock},
    steps=rounds,
    chunk=chunk,
    seeds=options.seeds,
    workdir=options.workdir,
    save_seconds=options.save_seconds,
    name=name,
    settings=harness.settings_of(settings, 'episodes', 'policy'),
  )


def main(options: harness.Options) -> None:
  """Trains and writes results, table, plot, policy and GIF."""
  settings = options.settings
  folder, clock = pathlib.Path(options.workdir), Clock()
  trained = train(options, clock)
  cpu, seconds = clock.get_state(), trained.seconds
  last = trained.history['training_return'][-1]
  training_return = harness.mean_interval(last)
  area = trained.history['training_return'].mean(axis=0)
  frames = rounds_of(settings) * frames_per_round(settings)
  delays = np.asarray(trained.state.delays).sum(axis=0)
  shares = delays / delays.sum()
  metrics = {
    **training_return.metrics('training_return'),
    'worst_training_return': harness.reduced(last, 'min'),
    **harness.mean_interval(area).metrics('training_area'),
    'control/random_return': random_return(settings, jax.random.key(17)),
    'frames': frames,
    'frames_per_second': frames * len(last) / max(trained.seconds, 1e-9),
    'delay/mean': float(shares @ np.arange(len(shares))),
    # All but those of the first round.
    'delay/full': float(shares[-1]),
    **{f'delay/{i}': float(share) for i, share in enumerate(shares)},
  }
  best = int(np.nanargmax(last)) if np.isfinite(last).any() else 0
  actor = jax.tree.map(lambda x: np.asarray(x[best]), trained.params.actor)
  policy = policies.Policy(
    settings.env, actor, {'training_return': float(last[best])}
  )
  policies.save(folder / 'policy.npz', policy)
  return_column = f'training return, last {settings.window} episodes'
  row = {
    'environment': settings.env,
    'workers': settings.workers,
    'frames': frames,
    return_column: training_return,
    'worst seed': metrics['worst_training_return'],
    'mean over the run': harness.mean_interval(area),
    'random actions': metrics['control/random_return'],
    'mean delay': metrics['delay/mean'],
    'frames/s, all seeds': round(metrics['frames_per_second']),
  }
  rows = [row]
  curves = {settings.env: (trained.steps, trained.history['training_return'])}
  if settings.workers > 1:
    clock = Clock()
    control = train(options, clock, alone=True)
    cpu, seconds = cpu + clock.get_state(), seconds + control.seconds
    metrics |= _compared(trained, control)
    returns = control.history['training_return']
    title = f'{settings.env}, one worker'
    curves[title] = (control.steps / settings.workers, returns)
    rows.append(
      row
      | {
        'workers': 1,
        return_column: harness.mean_interval(returns[-1]),
        'worst seed': harness.reduced(returns[-1], 'min'),
        'mean over the run': harness.mean_interval(returns.mean(axis=0)),
        'mean delay': 0.0,
        'frames/s, all seeds': round(
          frames * len(last) / max(control.seconds, 1e-9)
        ),
      }
    )
  harness.write_table(folder, rows)
  histogram = ', '.join(f'{i}: {n}' for i, n in enumerate(delays) if n)
  print(f'Delays of gradients, in updates: {histogram}')
  each = frames_per_round(settings)
  harness.plot_curves(
    folder / 'training_return.png',
    {
      title: (steps * each, values) for title, (steps, values) in curves.items()
    },
    xlabel='frames',
    ylabel=return_column,
    title=f'{settings.workers} workers in round robin',
  )
  path = harness.write_results(
    options,
    metrics=metrics,
    seconds=seconds,
    cpu_seconds=round(cpu, 1),
    curves={title: values for title, (_, values) in curves.items()},
  )
  print(f'Results: {path}')
  render(options)


def _compared(
  trained: harness.Trained, control: harness.Trained
) -> dict[str, float]:
  """Metrics of one worker, and paired differences over the shared seeds."""
  returns = [r.history['training_return'] for r in (trained, control)]
  worst = harness.reduced(returns[1][-1], 'min')
  metrics = {'one_worker/worst_training_return': worst}
  for name, (of_all, of_one) in {
    'training_return': [r[-1] for r in returns],
    'training_area': [r.mean(axis=0) for r in returns],
  }.items():
    lead = harness.mean_interval(of_all - of_one)
    metrics |= harness.mean_interval(of_one).metrics(f'one_worker/{name}')
    metrics |= lead.metrics(f'{name}_lead_over_one_worker')
  return metrics


def evaluate(options: harness.Options) -> None:
  """Plays episodes with the parameters of the newest checkpoint."""
  settings, start = options.settings, time.perf_counter()
  known = environments.make(settings.env)
  agent = networks.agent(known.shape, known.environment.actions)
  like = jax.eval_shape(agent.init, jax.random.key(0))
  loaded = harness.load(options.workdir, name=settings.env, like=like)
  count = len(jax.tree.leaves(loaded.params)[0])
  seeds = tuple(loaded.settings.get('train.seeds', range(count)))
  act = evaluation.make_act(agent, known.environment.actions, settings.policy)

  @jax.jit
  @jax.vmap
  def play(actor, seed):
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b'evaluation'))
    return evaluation.play(
      known.environment,
      act,
      actor,
      key,
      episodes=settings.episodes,
      limit=known.limit,
    )

  evaluation.write(
    options._replace(seeds=seeds),
    play(loaded.params.actor, jnp.asarray(seeds, jnp.uint32)),
    about={'environment': settings.env},
    updates=loaded.step * loaded.settings.get('workers', settings.workers),
    start=start,
  )


def render(options: harness.Options) -> None:
  """Draws an episode of the policy that was kept."""
  policies.show(pathlib.Path(options.workdir) / 'policy.npz')


STUDY = harness.Study(
  main,
  PRESETS,
  paper='a3c',
  binary='gymnax',
  check=check,
  modes={'evaluate': evaluate, 'render': render},
)


if __name__ == '__main__':
  harness.run(STUDY)
