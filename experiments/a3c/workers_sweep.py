"""Return of actor-critic by the number of asynchronous workers.

Paper: Shen, Zhang, Hong and Chen, Towards Understanding Asynchronous Advantage
Actor-critic: Convergence and Linear Speedup, 2023.

    python -m experiments.a3c.workers_sweep --preset=quick
    python -m experiments.a3c.workers_sweep --env=SpaceInvaders-MinAtar

Expected: on CartPole-v1, 16 workers return 492 of 500 at equal updates, where
one worker returns 500, and 360 more than it at equal frames. Their speedup is
5: the largest step without a loss falls with N.
Time: 5 minutes on a core for CartPole-v1, 20 to 30 for a game of MinAtar.

N workers in round robin have their own environments and parameters that are
N - 1 updates old: see `workers`. A gradient takes `environments * rollout`
frames and is one update, for any N. So two runs are compared in two ways:

- Equal updates: the same number of updates, and of frames of all workers
  together. The return differs only by the delay.
- Equal frames: the same frames per worker, those of 16 workers in the whole
  run. One worker has then made 1 / 16 of the updates. It is an equal time if
  workers run at once and the server takes no time.

Both returns average the last quarter up to this point. The speedup is the
frames of one worker over the frames per worker of N, until the return reaches
the target: N times the ratio of updates. Returns are those of whole episodes
with fixed parameters and sampled actions.

Step sizes are constant, so the beginning of a run does not depend on its
length. `tuned` is the best step for each N, by the mean return over the run of
seeds that are not reported. The control `fixed` is the step of one worker: if
the delay acts, more workers return less with it.
"""

import dataclasses
import functools
from typing import Annotated, Any, NamedTuple

import jax
import matplotlib.figure
import numpy as np

from experiments import harness
from experiments.a3c import gymnax, speedup
from experiments.a3c import workers as workers_lib
from experiments.harness.study import comparison
from experiments.rl import environments
from experiments.rl import evaluation as evaluation_lib


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    env: an environment of gymnax.
    workers: numbers of workers, starting with 1; up to 16 in the paper.
    updates: total number of updates of all workers.
    block: updates between two records.
    environments: environments per worker.
    rollout: steps per environment and gradient.
    critic_factor: step size of the critic over that of the actor.
    losses: losses of actor and critic.
    episodes: number of episodes in a record.
    target: return that the speedup refers to.
    tuning: grid of the tuning.
    seeds: number of seeds, for weights, environments and actions.
  """

  env: str = 'CartPole-v1'
  workers: Annotated[tuple[int, ...], harness.Allowed(1, 10_000)] = (1, 4, 16)
  updates: int = 2_304
  block: int = 48
  environments: int = 8
  rollout: int = 20
  critic_factor: float = 3.0
  losses: workers_lib.Losses = dataclasses.field(
    default_factory=lambda: workers_lib.Losses(reward_scale=0.1, normalise=True)
  )
  episodes: int = 20
  target: float = 400.0
  tuning: workers_lib.Tuning = dataclasses.field(
    default_factory=lambda: workers_lib.Tuning(
      rates=(1e-4, 3e-4, 1e-3, 3e-3), seeds=2
    )
  )
  seeds: int = 5


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    workers=(1, 4),
    updates=64,
    block=8,
    environments=4,
    episodes=4,
    target=30.0,
    tuning=workers_lib.Tuning(rates=(1e-3,), seeds=1),
    seeds=2,
  ),
  'paper': Settings(updates=12_288, block=96, seeds=10),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  gymnax.check(settings)
  workers = settings.workers
  if workers[0] != 1 or len(set(workers)) < max(2, len(workers)):
    raise harness.SettingsError(
      f'--workers={workers} must start with 1, the baseline, have at least one '
      'other number, and no number twice.'
    )
  if any(settings.block % number for number in workers):
    raise harness.SettingsError(
      f'--block={settings.block} must be a multiple of each of '
      f'--workers={workers}: workers update in rounds.'
    )
  if settings.updates % (settings.block * max(workers)):
    raise harness.SettingsError(
      f'--updates={settings.updates} must be a multiple of '
      f'--block={settings.block} times the largest of --workers={workers}, so '
      'that one worker has a record at equal frames.'
    )


class Functions(NamedTuple):
  """Functions of a run with one number of workers.

  Attributes:
    solver: from a context to the solver.
    init: from a context to the initial params.
    measure: metrics of a record.
  """

  solver: Any
  init: Any
  measure: Any


@functools.cache
def make_functions(settings: Settings, workers: int) -> Functions:
  """Makes the functions of a run, which share a compiled program."""
  known = environments.make(settings.env)
  agent, make_oracle = gymnax.make_agent(settings, window=1)
  act = evaluation_lib.make_act(agent, known.environment.actions, 'sampled')

  def solver(context):
    sequences = workers_lib.adams(context.hyper['rate'], settings.critic_factor)
    return workers_lib.round_robin(
      make_oracle,
      workers_lib.mover(**sequences),
      workers=workers,
      key=context.seed_key,
    )

  def measure(context, params, state):
    del state
    episodes = evaluation_lib.play(
      known.environment,
      act,
      params.actor,
      context.key,
      episodes=settings.episodes,
      limit=known.limit,
    )
    return {'evaluation_return': episodes.returns.mean()}

  return Functions(solver, lambda context: agent.init(context.key), measure)


def train(job: comparison.Job, settings: Settings, workers: int):
  """Trains a job with some workers."""
  functions = make_functions(settings, workers)
  return harness.train(
    functions.solver,
    harness.Task(functions.init, hyper=job.hyper),
    job.training(settings.updates // workers, settings.block // workers),
    harness.Measure(functions.measure, record_start=True),
  )


def count_wrong_delays(delays: np.ndarray, updates: int) -> int:
  """Counts gradients with another delay than in round robin, min(k, N - 1).

  Args:
    delays: number of gradients by measured delay, (..., N).
    updates: number of updates of a run.
  """
  workers = delays.shape[-1]
  expected = np.ones(workers, int)  # Of the first round.
  expected[-1] += updates - workers
  return int(np.abs(delays - expected).sum() // 2)


def average_before(curve: np.ndarray, updates: np.ndarray, last: int):
  """Averages the last quarter of a curve up to a number of updates.

  Args:
    curve: (records, seeds).
    updates: updates at each record.
    last: the number of updates.
  """
  return curve[(4 * updates > 3 * last) & (updates <= last)].mean(axis=0)


def add_row(
  results: harness.Results,
  at: dict[str, Any],
  curve: np.ndarray,
  baseline: np.ndarray,
  settings: Settings,
) -> None:
  """Adds the metrics of a number of workers with a step.

  Args:
    results: the results.
    at: coordinates, with the number of workers.
    curve: returns of each record, (records, seeds).
    baseline: those of one worker.
    settings: settings of the run.
  """
  workers, total = at['workers'], settings.updates
  updates = settings.block * np.arange(len(curve))
  # Between records, returns are interpolated.
  every = np.arange(total + 1)
  fine, fine_baseline = (
    np.stack([np.interp(every, updates, y) for y in each.T], axis=1)
    for each in (curve, baseline)
  )
  gain = speedup.speedup(fine_baseline, fine, workers, every, settings.target)
  equal_frames = total * workers // max(settings.workers)
  results.add(
    at,
    return_at_equal_updates=average_before(curve, updates, total),
    return_at_equal_frames=average_before(curve, updates, equal_frames),
    mean_return=curve[1:].mean(axis=0),
    updates=speedup.first_at(fine.mean(axis=1), every, settings.target),
    speedup=gain,
  )


def draw(
  curves: dict[tuple[str, int], np.ndarray], settings: Settings
) -> matplotlib.figure.Figure:
  """Draws returns against updates and against frames per worker."""
  updates = settings.block * np.arange(len(curves['tuned', 1]))[1:]
  frames = settings.environments * settings.rollout
  label = lambda step, n: (
    f'{n} worker{"s" if n > 1 else ""}'
    + (', step of one' if step == 'fixed' else '')
  )
  # The best step of several workers may be that of one.
  distinct = {
    key: curve
    for key, curve in curves.items()
    if key[0] == 'tuned' or not np.array_equal(curve, curves['tuned', key[1]])
  }
  panel = lambda xs, xlabel: harness.Panel(
    {label(*key): (xs(key[1]), curve[1:]) for key, curve in distinct.items()},
    xlabel,
    f'return, {settings.episodes} episodes',
    title=settings.env,
    logx=True,
  )
  return harness.draw_panels(
    [
      panel(lambda n: updates, 'updates of all workers'),
      panel(lambda n: updates * frames / n, 'frames per worker'),
    ]
  )


def main(options: harness.Options) -> harness.Report:
  """Tunes the step for each number of workers, then runs these and `fixed`."""
  settings, seeds = options.settings, options.settings.tuning.seeds
  rules = comparison.Rules(
    options,
    settings=harness.run_settings(settings, 'workers', 'target', 'tuning'),
    score=lambda trained: trained.history['evaluation_return'][1:].mean(axis=0),
    tuning_seeds=comparison.tuning_seeds(seeds),
  )
  method = lambda step, number: f'{step}/workers={number}'
  numbers = {
    method(step, n): n for step in ('tuned', 'fixed') for n in settings.workers
  }
  compare = lambda methods, rates: comparison.compare(
    rules,
    methods,
    lambda job: train(job, settings, numbers[job.method]),
    {'rate': rates},
  )
  baseline, *others = settings.workers
  outcomes = compare(
    [method('tuned', n) for n in settings.workers], settings.tuning.rates
  )
  best = outcomes[method('tuned', baseline)].point
  for n in others:
    same = outcomes[method('tuned', n)]
    fixed = method('fixed', n)
    outcomes |= (
      {fixed: same} if same.point == best else compare([fixed], (best['rate'],))
    )
  results = harness.Results()
  results.add(random_return=gymnax.random_return(settings, jax.random.key(17)))
  curves, wrong, trials = {}, 0, []
  for name, outcome in outcomes.items():
    step, workers = name.partition('/')[0], numbers[name]
    curve = outcome.values('evaluation_return')
    curves[step, workers] = curve
    at = {'step': step, 'workers': workers}
    results.note(at, {'rate': outcome.describe('rate')})
    add_row(results, at, curve, curves['tuned', baseline], settings)
    wrong += count_wrong_delays(
      np.asarray(outcome.trained.state.delays), settings.updates
    )
    if step == 'tuned':
      trials += [
        at | trial.point | {'score': trial.score} for trial in outcome.trials
      ]
  results.add(
    wrong_delays=wrong,
    frames=settings.updates * settings.environments * settings.rollout,
  )
  return harness.Report(
    results,
    rows=('step', 'workers'),
    columns=(
      harness.Column('rate', 'step size'),
      harness.Column('return_at_equal_updates', 'return at equal updates'),
      harness.Column('return_at_equal_frames', 'return at equal frames'),
      harness.Column('mean_return', 'mean over the run'),
      harness.Column('updates', 'updates to the target'),
      'speedup',
    ),
    curves={f'{step}/{n}': curve for (step, n), curve in curves.items()},
    plots={'workers.png': draw(curves, settings)},
    more={'trials': trials},
  )


STUDY = harness.Study(main, PRESETS, check=check)


if __name__ == '__main__':
  harness.run(STUDY)
