"""Speedup of N workers with stale parameters on a random MDP.

Paper: Shen, Zhang, Hong and Chen, Towards Understanding Asynchronous Advantage
Actor-Critic: Convergence and Linear Speedup, 2023.

    python -m experiments.a3c.synthetic --preset=quick

Expected: 64 workers have a speedup of 61 in samples per worker; with large
constant steps they never reach the target. Time: 2 to 4 minutes on 2 free
cores.

Workers are simulated: gradients are evaluated at parameters with the delay of
N workers, in one deterministic program. The speedup counts samples, not
seconds: it is N by construction if the delay does no harm. Runs and numbers of
workers are mapped by `vmap`. Step sizes are tuned for one worker, on a problem
and seeds that are not reported.
"""

import dataclasses
from typing import Annotated

import matplotlib.figure
import numpy as np

from experiments import harness
from experiments.a3c import speedup, synthetic_runs

CRITIC_FALL = 5.0  # Required reduction of the critic's error in the tuning.
# Constant step sizes of the control's actor and critic.
CONSTANT = (0.2, 1.0)
CONTROL = 'control/large_step'


@dataclasses.dataclass(frozen=True)
class Tuning:
  """Grid of the tuning with one worker.

  Attributes:
    actor_scales: c1 of the actor's step sizes c1 / (1 + k)^(3/5).
    critic_scales: c2 of the critic's step sizes c2 / (1 + k)^(2/5).
    seeds: number of seeds of the tuning runs.
  """

  actor_scales: tuple[float, ...] = (5.0, 10.0, 20.0, 40.0, 80.0)
  critic_scales: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
  seeds: int = 4


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper is Shen et al., 2023, section 5.1.

  Attributes:
    process: sizes of the problem.
    workers: numbers of workers, starting with 1; up to 16 in the paper.
    steps: total number of updates of all workers.
    block: updates between two records.
    window: updates in the running average of rewards.
    share: target, as a fraction of the gap between uniform and optimal policy.
    tuning: grid of the tuning.
    seeds: number of seeds of the samples; all share one process, as published.
  """

  process: synthetic_runs.Process = dataclasses.field(
    default_factory=synthetic_runs.Process
  )
  workers: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
  steps: int = 20_000
  block: int = 50
  window: int = 4_000
  share: Annotated[float, harness.Allowed(0, 1)] = 0.4
  tuning: Tuning = Tuning()
  seeds: int = 10


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    workers=(1, 8, 64),
    steps=8_000,
    tuning=Tuning(actor_scales=(40.0,), critic_scales=(0.3,), seeds=1),
    seeds=3,
  ),
  # The published sizes are the defaults; this one is longer, with more runs.
  'paper': Settings(steps=60_000, seeds=30),
}


def choose(options: harness.Options) -> tuple[float, float, list[dict]]:
  """Tunes the step sizes of one worker; returns them and all trials.

  Among step sizes that reduce the critic's error by `CRITIC_FALL` (all, if none
  does), chooses those that reach the target first.
  """
  settings, tuning = options.settings, options.settings.tuning
  grid = synthetic_runs.Grid((1,), tuning.actor_scales, tuning.critic_scales)
  # Problem and samples differ from the reported ones.
  seeds = tuple(range(10_000, 10_000 + tuning.seeds))
  problem = synthetic_runs.make_problem(settings.process, 1)
  curves = synthetic_runs.run(options, 'tuning', problem, grid, 'iid', seeds)
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
          'critic': float(synthetic_runs.fall(curves.critic)[0, i, j].mean()),
        }
      )
  close = [r for r in rows if r['critic'] * CRITIC_FALL <= 1] or rows
  best = min(close, key=lambda r: (r['updates'], -r['reached']))
  return best['c1'], best['c2'], rows


COLUMNS = (
  'updates',
  harness.Column('samples', 'samples each'),
  'speedup',
  harness.Column('policy_speedup', 'speedup of the policy'),
  harness.Column('reward', 'reward at the end'),
  harness.Column('policy_share', 'policy at the end'),
  harness.Column('critic_error', 'critic error'),
)


def add_run(
  results: harness.Results,
  name: str,
  curves: synthetic_runs.Curves,
  target: float,
) -> None:
  """Adds the metrics of a run, per number of workers."""
  results.add({'run': name}, delay_error=curves.delay_error)
  average, policy = curves.average[:, :, 0, 0], curves.policy[:, :, 0, 0]
  for i, number in enumerate(curves.workers):
    gain = lambda shares, i=i, number=number: speedup.speedup(
      shares[:, 0], shares[:, i], number, curves.steps, target
    )
    curve = average[:, i].mean(axis=-1)
    updates = speedup.first_at(curve, curves.steps, target)
    at = {'run': name, 'workers': number}
    results.add(
      at,
      updates=updates,
      speedup=gain(average),
      policy_speedup=gain(policy),
      policy_share=policy[-1, i],
      critic_error=synthetic_runs.fall(curves.critic)[i, 0, 0],
    )
    cells = {'updates': updates, 'samples': updates / number}
    results.note(at, cells | {'reward': curve[-1]})


def draw(runs: dict[str, synthetic_runs.Curves]) -> matplotlib.figure.Figure:
  """Draws rewards and critic errors of each run."""
  return harness.draw_panels(
    [
      harness.Panel(
        {
          f'N = {number}': (curves.steps, getattr(curves, field)[:, i, 0, 0])
          for i, number in enumerate(curves.workers)
        },
        'updates of all workers together',
        label,
        title=name,
        logy=field == 'critic',
      )
      for name, curves in runs.items()
      for field, label in (
        ('average', 'running average of rewards, relative'),
        ('critic', 'relative distance of the critic to its fixed point'),
      )
    ]
  )


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  for name in ('steps', 'window'):
    if getattr(settings, name) % settings.block:
      raise harness.SettingsError(
        f'--{name}={getattr(settings, name)} must be a multiple of '
        f'--block={settings.block}.'
      )
  if settings.steps < 4 * settings.block:
    raise harness.SettingsError(
      f'--steps={settings.steps} must be at least four --block.'
    )
  if settings.workers[0] != 1 or len(settings.workers) < 2:
    raise harness.SettingsError(
      f'--workers={settings.workers} must start with 1, the baseline, and have '
      'at least one other number.'
    )


def main(options: harness.Options) -> harness.Report:
  """Tunes step sizes, then runs all numbers of workers."""
  settings, workers = options.settings, options.settings.workers
  actor, critic, choices = choose(options)
  problem = synthetic_runs.make_problem(settings.process, 0)
  falling = synthetic_runs.Grid(workers, (actor,), (critic,))
  constant = synthetic_runs.Grid(
    (workers[0], workers[-1]), *((x,) for x in CONSTANT), (0.0, 0.0)
  )
  runs = {
    name: synthetic_runs.run(
      options, name, problem, grid, sampling, options.seeds
    )
    for name, grid, sampling in (
      ('iid', falling, 'iid'),
      ('markov', falling, 'markov'),
      (CONTROL, constant, 'iid'),
    )
  }
  results = harness.Results()
  results.add(actor_scale=actor, critic_scale=critic)
  for name, step in (('uniform', problem.uniform), ('best', problem.best)):
    policy_return = step / (1 - settings.process.discount)
    results.add({'policy': name}, policy_return=policy_return)
  for name, curves in runs.items():
    add_run(results, name, curves, settings.share)
  errors = [
    synthetic_runs.fall(runs[x].critic).mean(axis=-1) for x in ('iid', 'markov')
  ]
  delays = [curves.delay_error for curves in runs.values()]
  results.add(
    worst_critic_error=harness.reduced(np.ravel(errors), 'max'),
    largest_delay_error=harness.reduced(delays, 'max'),
  )
  return harness.Report(
    results,
    rows=('run', 'workers'),
    columns=COLUMNS,
    curves={
      f'{name}/{number}': curves.average[:, i, 0, 0]
      for name, curves in runs.items()
      for i, number in enumerate(curves.workers)
    },
    plots={'curves.png': draw(runs)},
    more={'choices': choices},
  )


STUDY = harness.Study(
  main, PRESETS, check=check, renamed={'tuning_seeds': 'tuning.seeds'}
)


if __name__ == '__main__':
  harness.run(STUDY)
