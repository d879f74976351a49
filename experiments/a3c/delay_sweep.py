"""Return of actor-critic by the delay of its gradients, for several steps.

Paper: Shen, Zhang, Hong and Chen, Towards Understanding Asynchronous Advantage
Actor-critic: Convergence and Linear Speedup, 2023.

    python -m experiments.a3c.delay_sweep --preset=quick

Expected: with the step that is best without delay, the return falls from a
delay of 4 updates and is that of chance at 64. Divided by 1 + delay, the step
returns 500 up to a delay of 16, and is too small for 6,000 updates at 64.
Time: 20 minutes on 2 shared cores.

One stream of environments, whose rollouts and gradients are at the parameters
of some updates ago: a delay of N - 1 is that of N workers in round robin. Step
sizes are constant. The step `fixed` is the best one without delay,
`square_root` and `divided` divide it by the root of 1 + delay and by 1 + delay,
and `tuned` is the best one at each delay, all on seeds that are not reported.
All delays, steps and seeds are one compiled program.
"""

import dataclasses
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.a3c import gymnax, synthetic_runs
from experiments.a3c import workers as workers_lib


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    env: an environment of gymnax.
    delays: updates between the parameters of a gradient and those that it
      changes, starting with 0.
    updates: total number of updates.
    block: updates between two records.
    environments: number of environments.
    rollout: steps per environment and gradient.
    critic_factor: step size of the critic over that of the actor.
    losses: losses of actor and critic.
    window: number of last training episodes in a record.
    tuning: grid of the tuning.
    seeds: number of seeds, for weights, environments and actions.
  """

  env: str = 'CartPole-v1'
  delays: Annotated[tuple[int, ...], harness.Allowed(0, 10_000)] = (
    0,
    1,
    4,
    16,
    64,
  )
  updates: int = 6_000
  block: int = 100
  environments: int = 8
  rollout: int = 20
  critic_factor: float = 3.0
  losses: workers_lib.Losses = dataclasses.field(
    default_factory=lambda: workers_lib.Losses(reward_scale=0.1, normalise=True)
  )
  window: int = 100
  tuning: workers_lib.Tuning = dataclasses.field(
    default_factory=workers_lib.Tuning
  )
  seeds: int = 5


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    delays=(0, 4),
    updates=40,
    block=10,
    environments=4,
    window=20,
    tuning=workers_lib.Tuning(rates=(1e-3,), seeds=1),
    seeds=2,
  ),
  'paper': Settings(updates=20_000, block=200, seeds=10),
}

# Step size at a delay over that without delay.
STEPS = {
  'fixed': lambda delay: 1.0,
  'square_root': lambda delay: (1 + delay) ** -0.5,
  'divided': lambda delay: 1 / (1 + delay),
}


class Cell(NamedTuple):
  """A delay with a step size.

  Attributes:
    delay: updates of delay.
    rate: step size of the actor.
  """

  delay: int
  rate: float


class Curves(NamedTuple):
  """Records of all cells.

  Attributes:
    updates: updates at each record, (records,).
    returns: mean return of the last training episodes, (records, cells, seeds).
    delay_error: largest deviation of a measured delay from that of its cell,
      after as many updates.
  """

  updates: np.ndarray
  returns: np.ndarray
  delay_error: float


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  gymnax.check(settings)
  if settings.updates % settings.block:
    raise harness.SettingsError(
      f'--updates={settings.updates} must be a multiple of '
      f'--block={settings.block}.'
    )
  if settings.delays[0] or len(set(settings.delays)) < len(settings.delays):
    raise harness.SettingsError(
      f'--delays={settings.delays} must start with 0, the baseline, and have '
      'no number twice.'
    )


def make_solver(settings: Settings, key: jax.Array, delay: Any, rate: Any):
  """Makes the agent and its delayed actor-critic.

  Args:
    settings: settings of the run.
    key: PRNG key of environments and actions.
    delay: updates of delay, at most the largest of the settings; an array.
    rate: step size of the actor.
  """
  agent, make_oracle = gymnax.make_agent(settings, settings.window)
  late = bj.evaluation.delayed(
    make_oracle(key), delay + 1, bound=max(settings.delays)
  )
  return agent, bj.descend(
    late, **workers_lib.adams(rate, settings.critic_factor)
  )


def run(
  options: harness.Options, name: str, cells: list[Cell], seeds: Any
) -> Curves:
  """Trains all cells and seeds as one program."""
  settings = options.settings
  agent, _ = gymnax.make_agent(settings, settings.window)
  each = lambda values: jnp.repeat(jnp.asarray(values), len(seeds))
  hyper = {
    'delay': each([cell.delay for cell in cells]),
    'rate': each([cell.rate for cell in cells]),
  }

  def solver(context):
    _, one = make_solver(settings, context.seed_key, **context.hyper)
    return synthetic_runs.blocks(one, settings.block, mean='entropy')

  def measure(context, params, state):
    del context, params
    episodes = bj.outputs(state.inner)['episodes']
    return {'training_return': bj.rl.mean_return(episodes, settings.window)}

  trained = harness.train(
    solver,
    harness.Task(lambda context: agent.init(context.key), hyper=hyper),
    harness.Training.from_options(
      options,
      steps=settings.updates // settings.block,
      chunk=1,
      seeds=tuple(seeds) * len(cells),
      name=name,
      settings=harness.run_settings(settings, 'delays', 'tuning'),
    ),
    harness.Measure(measure),
  )
  updates = settings.block * trained.steps
  delay = np.asarray(hyper['delay'])
  errors = [
    np.abs(trained.history[f'loss/{end}_delay'] - delay)
    for end in ('min', 'max')
  ]
  full = updates[:, None] - settings.block >= delay
  return Curves(
    updates,
    trained.history['training_return'].reshape(-1, len(cells), len(seeds)),
    float(np.where(full, errors, 0).max()),
  )


def tune(options: harness.Options) -> tuple[dict[int, float], list[dict]]:
  """Tunes the step at each delay; returns the steps by delay and all trials.

  The best step has the largest mean return over the run.
  """
  settings, tuning = options.settings, options.settings.tuning
  cells = [Cell(d, r) for d in settings.delays for r in tuning.rates]
  # Weights, environments and actions differ from the reported ones.
  seeds = range(10_000, 10_000 + tuning.seeds)
  area = run(options, 'tuning', cells, seeds).returns.mean(axis=(0, 2))
  trials = [
    cell._asdict() | {'training_area': float(x)}
    for cell, x in zip(cells, area, strict=True)
  ]
  best = area.reshape(len(settings.delays), -1).argmax(axis=1)
  rates = [tuning.rates[i] for i in best]
  return dict(zip(settings.delays, rates, strict=True)), trials


def main(options: harness.Options) -> harness.Report:
  """Tunes the step without delay, then runs all delays and steps."""
  settings = options.settings
  tuned, trials = tune(options)
  rates = {
    name: {d: tuned[0] * scale(d) for d in settings.delays}
    for name, scale in STEPS.items()
  } | {'tuned': tuned}
  # Without delay, all steps are the same.
  cells = list(
    dict.fromkeys(Cell(d, r) for by in rates.values() for d, r in by.items())
  )
  curves = run(options, 'sweep', cells, options.seeds)
  quarter = -(-len(curves.updates) // 4)
  results = harness.Results()
  results.add(
    random_return=gymnax.random_return(settings, jax.random.key(17)),
    largest_delay_error=curves.delay_error,
    frames=settings.updates * settings.environments * settings.rollout,
  )
  lines, sparks = {}, {}
  for name, by_delay in rates.items():
    final = []
    for delay, rate in by_delay.items():
      returns = curves.returns[:, cells.index(Cell(delay, rate))]
      final.append(returns[-quarter:].mean(axis=0))
      at = {'step': name, 'delay': delay}
      results.note(at, {'rate': f'{rate:.3g}'})
      results.add(
        at, final_return=final[-1], training_area=returns.mean(axis=0)
      )
      sparks[f'{name}/{delay}'] = returns
    lines[name.replace('_', ' ')] = 1 + np.array(settings.delays), final
  figure = harness.draw_curves(
    lines,
    xlabel='1 + delay, updates',
    ylabel='training return, last quarter of the run',
    title=f'{settings.env}, steps by delay',
    logx=True,
  )
  return harness.Report(
    results,
    rows=('step', 'delay'),
    columns=(
      harness.Column('rate', 'step size'),
      harness.Column('final_return', 'return, last quarter'),
      harness.Column('training_area', 'mean over the run'),
    ),
    curves=sparks,
    plots={'delays.png': figure},
    more={'trials': trials},
  )


STUDY = harness.Study(main, PRESETS, check=check)


if __name__ == '__main__':
  harness.run(STUDY)
