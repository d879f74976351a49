"""PPO and the actor-critic on compiled environments.

    python -m experiments.rl.train --preset=quick
    python -m experiments.rl.train --algorithm=ppo --env=Acrobot-v1
    python -m experiments.rl.train --preset=minatar --env=Breakout-MinAtar
    python -m experiments.rl.train evaluate --evaluation.policy=sampled

Expected: PPO returns 475 or more of 500 on CartPole-v1 after at most 300,000
frames, with each of 5 seeds.
Time: 2 minutes on a core, compilation included.

Each record plays whole episodes with fixed parameters and a key of their own,
with the likeliest actions (greedy) and with drawn ones (sampled). All seeds
train in one compiled program; the same command resumes a run after a kill.
`--env=module:Name` takes your own `bj.rl.Environment`, or one of gymnax; see
docs/recipes/reinforcement_learning.md.
`minatar` has the sizes of purejaxrl for MinAtar, `published` its settings for
CartPole and Acrobot.
"""

import dataclasses
import functools
import time
from typing import Annotated

import jax
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.rl import evaluation as evaluation_lib
from experiments.rl import on_policy, ppo

ALGORITHMS = {
  'ppo': 'proximal policy optimisation: several epochs on clipped ratios.',
  'actor_critic': 'one step per rollout by generalised advantages.',
}
POLICIES = ('greedy', 'sampled')
# Returns that count as solved.
SOLVED = {'CartPole-v1': 475.0, 'Acrobot-v1': -100.0}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    env: an environment of gymnax, or `module:Name` for your own.
    algorithm: ppo, actor_critic, or both, to compare them.
    frames: total number of environment steps.
    records: number of records; the last one is at the end.
    record_episodes: whole episodes per seed, policy and record.
    learning: how the policy learns.
    actor_critic_rollout: steps of each environment per update of the
      actor-critic.
    evaluation: evaluation at the end, and of `evaluate`.
    window: number of last training episodes in `training_return`.
    seeds: number of seeds, for weights, environments and actions.
  """

  env: str = 'CartPole-v1'
  algorithm: Annotated[
    tuple[str, ...], harness.Among(tuple(ALGORITHMS), ALGORITHMS)
  ] = (*ALGORITHMS,)
  frames: Annotated[int, harness.Allowed(1, 2**31 - 1)] = 300_000
  records: Annotated[int, harness.Allowed(1)] = 30
  record_episodes: Annotated[int, harness.Allowed(1)] = 20
  learning: on_policy.Learning = dataclasses.field(
    default_factory=on_policy.Learning
  )
  actor_critic_rollout: Annotated[int, harness.Allowed(1)] = 20
  evaluation: evaluation_lib.Settings = dataclasses.field(
    default_factory=evaluation_lib.Settings
  )
  window: Annotated[int, harness.Allowed(1)] = 100
  seeds: int = 5


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    frames=8_192,
    records=2,
    record_episodes=4,
    evaluation=evaluation_lib.Settings(episodes=8),
    seeds=2,
  ),
  'published': Settings(
    algorithm=('ppo',),
    frames=500_000,
    learning=on_policy.Learning(
      environments=4, rollout=128, rate=2.5e-4, reward_scale=1.0
    ),
  ),
  'minatar': Settings(
    env='Breakout-MinAtar',
    algorithm=('ppo',),
    frames=10_000_000,
    learning=on_policy.Learning(
      environments=64,
      rollout=128,
      rate=5e-3,
      reward_scale=1.0,
      ppo=ppo.Settings(minibatches=8),
    ),
  ),
}


def learning_for(settings: Settings, algorithm: str) -> on_policy.Learning:
  """Settings of an algorithm."""
  if algorithm == 'ppo':
    return settings.learning
  return dataclasses.replace(
    settings.learning, rollout=settings.actor_critic_rollout
  )


def count_updates(settings: Settings, algorithm: str) -> int:
  """Number of updates of a run."""
  return settings.frames // learning_for(settings, algorithm).frames


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that do not fit together."""
  for algorithm in settings.algorithm:
    learning = learning_for(settings, algorithm)
    on_policy.check(settings.env, algorithm, learning)
    if settings.frames < learning.frames:
      raise harness.SettingsError(
        f'frames={settings.frames} is less than one update of {algorithm}, '
        f'which takes {learning.environments} environments x '
        f'{learning.rollout} steps = {learning.frames} frames: increase frames '
        'or decrease learning.environments.'
      )


def play(parts, params, key, *, episodes, policy):
  """Plays whole episodes with fixed parameters."""
  return evaluation_lib.play(
    parts.environment,
    lambda params, key, inputs: parts.act(params, key, inputs, policy),
    params,
    key,
    episodes=episodes,
    limit=parts.known.limit,
  )


def evaluated(settings, algorithm, policy):
  """Makes the evaluation of a seed: (params, key) -> episodes."""
  learning = learning_for(settings, algorithm)
  return functools.partial(
    play,
    on_policy.make_parts(settings.env, learning),
    episodes=settings.evaluation.episodes,
    policy=policy,
  )


def train(options: harness.Options, algorithm: str) -> harness.Trained:
  """Trains all seeds of an algorithm in one compiled program."""
  settings = options.settings
  learning = learning_for(settings, algorithm)
  parts = on_policy.make_parts(settings.env, learning)
  updates = count_updates(settings, algorithm)

  def measure(context, params, state):
    key = evaluation_lib.separate_key(
      jax.random.fold_in(context.seed_key, context.step)
    )
    measures = {
      'training_return': bj.rl.mean_return(
        state.worlds.episodes, settings.window
      )
    }
    for policy in POLICIES:
      episodes = play(
        parts, params, key, episodes=settings.record_episodes, policy=policy
      )
      measures[f'{policy}_return'] = episodes.returns.mean()
    return measures

  return harness.train(
    lambda context: on_policy.make_solver(
      parts,
      algorithm,
      learning,
      updates=updates,
      key=context.seed_key,
      window=settings.window,
    ),
    harness.Task(lambda context: parts.agent.init(context.key)),
    harness.Training.from_options(
      options,
      steps=updates,
      chunk=-(-updates // settings.records),
      name=algorithm,
      settings=harness.run_settings(settings, 'evaluation', 'algorithm'),
    ),
    harness.Measure(measure),
  )


def frames_per_second(settings: Settings, algorithm: str) -> float:
  """Speed of one seed without records, the best of three runs."""
  learning = learning_for(settings, algorithm)
  parts = on_policy.make_parts(settings.env, learning)
  solver = on_policy.make_solver(
    parts, algorithm, learning, updates=1_000, key=jax.random.key(0)
  )
  count = max(1, min(50_000, settings.frames) // learning.frames)

  @jax.jit
  def run(carry):
    def step(carry, _):
      params, state = carry
      updates, state = solver.update(None, state, params)
      return (bj.apply_updates(params, updates), state), None

    return jax.lax.scan(step, carry, length=count)[0]

  params = parts.agent.init(jax.random.key(1))
  carry = jax.block_until_ready(run((params, solver.init(params))))
  seconds = []
  for _ in range(3):
    start = time.perf_counter()
    carry = jax.block_until_ready(run(carry))
    seconds.append(time.perf_counter() - start)
  return count * learning.frames / min(seconds)


def frames_to_solve(
  frames: np.ndarray, returns: np.ndarray, solved: float
) -> np.ndarray:
  """Frames at the first record with a return; NaN for a seed without one.

  Args:
    frames: at each record, (records,).
    returns: (records, seeds).
    solved: the return.
  """
  reached = np.asarray(returns) >= solved
  first = np.asarray(frames, np.float64)[reached.argmax(axis=0)]
  return np.where(reached.any(axis=0), first, np.nan)


def main(options: harness.Options) -> harness.Report:
  """Trains, evaluates with fixed parameters, and reports."""
  settings = options.settings
  results, curves, lines = harness.Results(), {}, {}
  solved = SOLVED.get(settings.env)
  for algorithm in settings.algorithm:
    trained = train(options, algorithm)
    frames = trained.steps * learning_for(settings, algorithm).frames
    at = {'algorithm': algorithm}
    results.note(at, {'environment': settings.env})
    results.add(at, frames=int(frames[-1]))
    for policy in POLICIES:
      episodes = evaluation_lib.play_seeds(
        trained.params,
        options.seeds,
        evaluated(settings, algorithm, policy),
      )
      returns = np.asarray(episodes.returns, np.float64).mean(axis=1)
      results.put(
        at,
        {
          f'{policy}_return': returns,
          f'worst_{policy}_return': harness.reduced(returns, 'min'),
        },
      )
    history = trained.history
    results.add(
      at,
      training_return=history['training_return'][-1],
      greedy_area=history['greedy_return'].mean(axis=0),
    )
    if solved is not None:
      first = frames_to_solve(frames, history['greedy_return'], solved)
      results.add(
        at,
        frames_to_solve=first,
        most_frames_to_solve=harness.reduced(first, 'max'),
        solved_share=np.isfinite(first).mean(),
      )
    results.add(
      at, frames_per_second=round(frames_per_second(settings, algorithm))
    )
    curves[algorithm] = history['greedy_return']
    for policy in POLICIES:
      lines[f'{algorithm}, {policy}'] = (frames, history[f'{policy}_return'])
  column = harness.Column
  return harness.Report(
    results,
    rows='algorithm',
    columns=(
      *('environment', 'frames'),
      column('greedy_return', 'return, greedy'),
      column('worst_greedy_return', 'worst seed'),
      column('sampled_return', 'return, sampled'),
      column('frames_to_solve', f'frames to {solved:g}' if solved else ''),
      column('most_frames_to_solve', 'slowest seed'),
      column('frames_per_second', 'frames/s, one seed'),
    ),
    curves=curves,
    plots={
      'return.png': harness.draw_curves(
        lines,
        xlabel='frames',
        ylabel=f'return of {settings.record_episodes} episodes',
        title=settings.env,
      )
    },
  )


def evaluate(options: harness.Options) -> harness.Report:
  """Evaluates the newest checkpoint of the first algorithm."""
  settings, algorithm = options.settings, options.settings.algorithm[0]
  learning = learning_for(settings, algorithm)
  episodes, seeds, loaded = evaluation_lib.play_checkpoint(
    options.workdir,
    algorithm,
    on_policy.make_parts(settings.env, learning).agent.init,
    evaluated(settings, algorithm, settings.evaluation.policy),
  )
  return evaluation_lib.report(
    options,
    settings.evaluation,
    episodes,
    seeds=seeds,
    updates=loaded.step,
    about={'environment': settings.env, 'algorithm': algorithm},
  )


STUDY = harness.Study(main, PRESETS, check=check, modes={'evaluate': evaluate})


if __name__ == '__main__':
  harness.run(STUDY)
