"""Asynchronous actor-critic on compiled environments of gymnax.

Paper: Shen, Zhang, Hong and Chen, Towards Understanding Asynchronous Advantage
Actor-critic: Convergence and Linear Speedup, 2023.

    python -m experiments.a3c.gymnax --env=CartPole-v1 --preset=quick
    python -m experiments.a3c.gymnax evaluate --env=CartPole-v1 --preset=quick
    python -m experiments.a3c.gymnax render --env=CartPole-v1 --preset=quick

Expected: a training return of 490 to 500 of 500 on CartPole-v1 for each seed,
-84 on Acrobot-v1.
Time: 1 minute on a core, compilation included; MinAtar 0.1 ms/frame.

Sixteen workers in round robin, with their own environments and a delay of 15
updates: see `workers`. `training_return` is the mean return of the last
training episodes, with sampled actions and changing parameters. `evaluate`
plays whole episodes with the fixed parameters of the newest checkpoint.
Training ends with a GIF of the best seed's policy; `render` draws another one.
`workers_sweep` compares numbers of workers.
"""

import dataclasses
import pathlib
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.a3c import workers as workers_lib
from experiments.rl import environments, networks, policies
from experiments.rl import evaluation as evaluation_lib


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    env: an environment of gymnax.
    workers: number of workers; 16 in the paper.
    environments: environments per worker.
    rollout: steps per environment and gradient.
    frames: total number of environment steps.
    records: number of records of the run; the last one is at its end.
    actor_rate: initial step size of the actor's Adam; decays linearly to 0.
    critic_rate: initial step size of the critic's Adam; decays linearly to 0.
    losses: losses of actor and critic.
    window: number of last training episodes in `training_return`.
    evaluation: settings of `evaluate`.
    devices: number of devices to split workers over.
    seeds: number of seeds, for weights, environments and actions.
  """

  env: str = 'CartPole-v1'
  workers: int = 16
  environments: int = 8
  rollout: int = 20
  frames: Annotated[int, harness.Allowed(high=2**31 - 1)] = 3_000_000
  records: int = 30
  actor_rate: float = 1e-3
  critic_rate: float = 3e-3
  losses: workers_lib.Losses = dataclasses.field(
    default_factory=lambda: workers_lib.Losses(reward_scale=0.1, normalise=True)
  )
  window: int = 100
  evaluation: evaluation_lib.Settings = dataclasses.field(
    default_factory=evaluation_lib.Settings
  )
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
    evaluation=evaluation_lib.Settings(episodes=20),
    seeds=2,
  ),
  'paper': Settings(frames=10_000_000, records=100, seeds=10),
}


def frames_per_round(settings: Settings) -> int:
  """Frames of a round, with one rollout and one update per worker."""
  return settings.workers * settings.environments * settings.rollout


def count_rounds(settings: Settings) -> int:
  """Number of rounds in a run."""
  return max(1, settings.frames // frames_per_round(settings))


def check(settings: Settings) -> None:
  """Raises SettingsError for an unknown environment."""
  environments.make(settings.env)


def make_agent(settings: Any, window: int):
  """Makes the agent, and a function from a key to the oracle of a worker.

  Args:
    settings: `Settings`, or others with the same names of the environment,
      rollouts and losses.
    window: number of last training episodes in the oracle's outputs.
  """
  known, losses = environments.make(settings.env), settings.losses
  agent = networks.agent(known.shape, known.environment.actions)
  return agent, lambda key: bj.rl.actor_critic(
    agent.policy,
    agent.value,
    known.environment,
    collection=bj.rl.Collection(
      settings.environments, settings.rollout, window
    ),
    advantages=bj.rl.Advantages(
      losses.discount, losses.decay, losses.reward_scale, losses.normalise
    ),
    entropy_bonus=losses.entropy,
    key=key,
  )


def make_solver(settings: Settings, key: jax.Array):
  """Makes the agent, and round-robin workers with Adam."""
  agent, make_oracle = make_agent(settings, settings.window)
  updates = count_rounds(settings) * settings.workers
  adam = lambda rate: workers_lib.adam(
    optax.linear_schedule(rate, 0.0, updates), eps=1e-5
  )
  return agent, workers_lib.round_robin(
    make_oracle,
    workers_lib.mover(
      actor=adam(settings.actor_rate), critic=adam(settings.critic_rate)
    ),
    workers=settings.workers,
    key=key,
    devices=settings.devices,
  )


def random_return(settings: Any, key: jax.Array) -> float:
  """The control: mean return of uniformly random actions."""
  environment = environments.make(settings.env).environment
  family = bj.rl.action_distribution(environment.actions)

  def act(params, key, observations):
    del params
    count = len(observations)
    if isinstance(environment.actions, int):
      return family.sample(key, jnp.zeros([count, environment.actions]))
    return jax.random.uniform(key, (count, *environment.actions), None, -1, 1)

  collector = bj.rl.rollouts(environment, act, environments=32, steps=1_000)
  _, state = jax.jit(lambda k: collector.collect(None, collector.init(k)))(key)
  return float(bj.rl.mean_return(collector.episodes(state)))


def train(options: harness.Options) -> harness.Trained:
  """Trains all seeds in one compiled program."""
  settings = options.settings
  rounds = count_rounds(settings)
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
    harness.Task(lambda context: agent.init(context.key)),
    harness.Training.from_options(
      options,
      steps=rounds,
      chunk=-(-rounds // settings.records),
      name=settings.env,
      settings=harness.run_settings(settings, 'evaluation'),
    ),
    harness.Measure(measure),
  )


def main(options: harness.Options) -> harness.Report:
  """Trains, then saves the best seed's policy and draws an episode."""
  settings, at = options.settings, {'method': 'round_robin'}
  trained = train(options)
  returns = trained.history['training_return']
  each = frames_per_round(settings)
  frames = count_rounds(settings) * each
  random = random_return(settings, jax.random.key(17))
  delays = np.asarray(trained.state.delays).sum(axis=0)
  shares = delays / delays.sum()
  rate = frames * returns.shape[1] / max(trained.seconds, 1e-9)
  results = harness.Results()
  results.add(frames=frames, random_return=random)
  results.note(
    at,
    {
      'environment': settings.env,
      'workers': settings.workers,
      'frames': frames,
      'random': random,
    },
  )
  results.add(
    at,
    training_return=returns[-1],
    # Mean over the whole run.
    training_area=returns.mean(axis=0),
    worst_training_return=harness.reduced(returns[-1], 'min'),
    mean_delay=shares @ np.arange(len(shares)),
    # All gradients after the first round.
    full_delay_share=shares[-1],
    frames_per_second=round(rate),
  )
  for delay, share in enumerate(shares):
    results.add(at | {'delay': delay}, delay_share=share)
  policies.save_best(
    pathlib.Path(options.workdir) / 'policy.npz',
    settings.env,
    trained.params.actor,
    returns[-1],
  )
  render(options)
  label = f'training return, last {settings.window} episodes'
  figure = harness.draw_curves(
    {'round robin': (trained.steps * each, returns)},
    xlabel='frames',
    ylabel=label,
    title=f'{settings.env}, {settings.workers} workers in round robin',
  )
  return harness.Report(
    results,
    columns=(
      *('environment', 'workers', 'frames'),
      harness.Column('training_return', label),
      harness.Column('worst_training_return', 'worst seed'),
      harness.Column('training_area', 'mean over the run'),
      harness.Column('random', 'random actions'),
      harness.Column('mean_delay', 'mean delay'),
      harness.Column('frames_per_second', 'frames/s, all seeds'),
    ),
    curves={'round_robin': returns},
    plots={'training_return.png': figure},
  )


def evaluate(options: harness.Options) -> harness.Report:
  """Evaluates the newest checkpoint."""
  settings, config = options.settings, options.settings.evaluation
  known = environments.make(settings.env)
  agent = networks.agent(known.shape, known.environment.actions)
  act = evaluation_lib.make_act(agent, known.environment.actions, config.policy)
  episodes, seeds, loaded = evaluation_lib.play_checkpoint(
    options.workdir,
    settings.env,
    agent.init,
    lambda params, key: evaluation_lib.play(
      known.environment,
      act,
      params.actor,
      key,
      episodes=config.episodes,
      limit=known.limit,
    ),
  )
  return evaluation_lib.report(
    options,
    config,
    episodes,
    seeds=seeds,
    updates=loaded.step * loaded.settings.get('workers', settings.workers),
    about={'environment': settings.env},
  )


def render(options: harness.Options) -> None:
  """Draws an episode of the saved policy."""
  policies.show(pathlib.Path(options.workdir) / 'policy.npz')


STUDY = harness.Study(
  main, PRESETS, check=check, modes={'evaluate': evaluate, 'render': render}
)


if __name__ == '__main__':
  harness.run(STUDY)
