"""Really asynchronous actor-critic: threads, stale copies, one writer.

Paper: Shen, Zhang, Hong and Chen, Towards Understanding Asynchronous Advantage
Actor-critic: Convergence and Linear Speedup, 2023.

    python -m experiments.a3c.atari --preset=quick
    python -m experiments.a3c.atari evaluate --preset=quick --episodes=10

Expected: with 16 workers, gradients 14.7 updates old on average, and scores of
hardly learnt play. Time: 2 minutes on 2 cores.

Seaquest, 16 workers, Adam with the paper's step size; the extra `atari` has the
game. The networks are those of Mnih et al., 2016, one for the policy and one
for the value. A run goes on after a kill from its parameters, optimisers,
counts and scores; not bit for bit: threads race, and games under way start
again. `smoke` plays a cart-pole, which needs no extra. `training_return` is the
mean score of the last games of the training; `evaluate` reads the newest
checkpoints and plays whole games with fixed parameters.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import sys
import time
import zlib
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.a3c import threads, workers
from experiments.harness import checkpoints, files, termination
from experiments.rl import evaluation, games, networks


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    env: a game of the Atari, or CartPole.
    workers: threads, each with a game of its own; 16 in the paper.
    rollout: actions for a gradient.
    frames: of all games; an action of the Atari takes 4.
    rate: of Adam, constant; 1.5e-4 in the paper.
    clip: largest norm of a gradient.
    discount: of rewards; .99 in the paper.
    decay: of generalised advantages.
    entropy: weight of the policy's entropy; .01 in the paper.
    reward_scale: of rewards in the losses.
    record: updates between two records.
    compared: gradients by which the throughput of one worker, and of all, is
      measured at first; 0 for no comparison.
    sticky_actions: the probability that the Atari repeats the action before for
      a frame; 0.25 in Machado et al., 2018.
    end_on_life_loss: whether a lost life ends the episode that is learnt from,
      as in Mnih et al., 2015.
    fire_on_reset: whether episodes start with FIRE in games that have it.
    episodes: whole games of each seed that `evaluate` plays.
    policy: the actions in `evaluate`: the likeliest ones (greedy) or sampled.
    seeds: of weights, games and actions.
  """

  env: str = 'Seaquest'
  workers: int = 16
  rollout: int = 20
  frames: int = 50_000
  rate: float = 1.5e-4
  clip: float = 0.5
  discount: Annotated[float, harness.Allowed(0, 1)] = 0.99
  decay: Annotated[float, harness.Allowed(0, 1)] = 0.95
  entropy: Annotated[float, harness.Allowed(0)] = 0.01
  reward_scale: float = 1.0
  record: int = 50
  compared: Annotated[int, harness.Allowed(0)] = 32
  sticky_actions: Annotated[float, harness.Allowed(0, 1)] = 0.0
  end_on_life_loss: bool = False
  fire_on_reset: bool = False
  episodes: int = 30
  policy: evaluation.Policy = 'greedy'
  seeds: int = 1

  @property
  def conventions(self) -> games.Conventions:
    """Those of the settings."""
    return games.Conventions(
      self.sticky_actions, self.end_on_life_loss, self.fire_on_reset
    )


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(env='CartPole', workers=4, frames=8_000, compared=8),
  'paper': Settings(frames=40_000_000, record=1_000, seeds=3),
}


class Saved(NamedTuple):
  """What a checkpoint holds.

  Attributes:
    params: of actor and critic.
    state: of what applies the gradients.
  """

  params: Any
  state: Any


class Run:
  """One seed: what is compiled, and what is kept.

  Args:
    options: what the flags say.
    seed: of all that is random.
    make_game: (name, generator, conventions) -> game.
  """

  def __init__(self, options: harness.Options, seed: int, make_game: Any):
    """Compiles nothing yet."""
    self._options, self._seed, self._make = options, seed, make_game
    settings = options.settings
    game = self._game(0, 0)
    self.frames_a_step = game.frames
    agent = networks.agent(game.shape, game.actions)
    oracle = bj.rl.actor_critic_gradient(
      agent.policy,
      agent.value,
      distribution=bj.rl.categorical(),
      advantages=bj.rl.Advantages(
        settings.discount, settings.decay, settings.reward_scale
      ),
      entropy_bonus=settings.entropy,
    )
    adam = optax.chain(
      optax.clip_by_global_norm(settings.clip), optax.adam(settings.rate)
    )
    move = workers.mover(actor=adam, critic=adam)
    key = jax.random.key(seed)
    self.params = agent.init(key)
    self.state = move.init(self.params)
    self.version = 0
    self.progress = threads.Progress()
    self.throughputs: dict[str, float] = {}
    self.compiled = threads.functions(agent, oracle, self.params)
    self._apply, self._key = threads.apply_of(move), key

  @property
  def frames(self) -> int:
    """Of all games so far."""
    return self.progress.steps * self.frames_a_step

  def start(self, count: int) -> threads.Workers:
    """Workers that begin at the parameters of now."""
    version = self.version
    return threads.Workers(
      count,
      lambda index: self._game(index, version),
      self.compiled,
      threads.Published(self.params, version),
      rollout=self._options.settings.rollout,
      # Other actions than before a kill.
      key=jax.random.fold_in(self._key, version + 1),
    )

  def compare(self) -> None:
    """Measures the throughput of one worker and of all, unless known."""
    settings = self._options.settings
    if self.throughputs or not settings.compared:
      return
    for name, count in (('one', 1), ('all', settings.workers)):
      found = threads.throughput(
        lambda n=count: self.start(n), settings.compared
      )
      self.throughputs[name] = found * self.frames_a_step

  def apply(self, found: threads.Contribution, seconds: float) -> None:
    """One update, by the one writer."""
    self.params, self.state = self._apply(
      self.params, self.state, found.gradient
    )
    self.progress = self.progress.after(found, self.version, seconds)
    self.version += 1

  def save(self, saved: checkpoints.Checkpoints) -> None:
    """Keeps all but the episodes under way."""
    extra = {
      'progress': self.progress._asdict(),
      'throughputs': self.throughputs,
    }
    saved.save(self.version, Saved(self.params, self.state), extra)

  def restore(self, saved: checkpoints.Checkpoints) -> None:
    """Goes on from the newest checkpoint, if there is one."""
    restored = saved.restore(Saved(self.params, self.state))
    if restored is not None:
      self.params, self.state = restored.tree
      self.version = restored.step
      self.progress = threads.Progress(**restored.extra['progress'])
      self.throughputs = restored.extra['throughputs']

  def _game(self, index, version):
    rng = np.random.default_rng((self._seed, index, version))
    settings = self._options.settings
    return self._make(settings.env, rng, settings.conventions)


def train(options: harness.Options, seed: int, make_game: Any) -> Run:
  """Trains one seed, and resumes it if it was killed.

  Args:
    options: what the flags say.
    seed: the seed.
    make_game: (name, generator, conventions) -> game.

  Returns:
    The finished run.

  Raises:
    WorkerError: if a worker thread died; what was learnt is saved.
    AllStoppedError: if losses are no longer finite.
  """
  settings = options.settings
  run = Run(options, seed, make_game)
  with contextlib.ExitStack() as stack:
    terminated = stack.enter_context(termination.deferred())
    folder = files.make_folder(pathlib.Path(options.workdir) / f'seed_{seed}')
    stack.enter_context(files.locked(folder))
    identity = harness.settings_of(
      settings, 'frames', 'compared', 'episodes', 'policy'
    )
    checkpoints.check_settings(folder / 'settings.json', identity)
    saved = checkpoints.Checkpoints(folder / 'checkpoints')
    stack.callback(saved.close)
    run.restore(saved)
    records = harness.MetricsWriter(folder, step=run.version or -1)
    stack.callback(records.close)
    if run.frames >= settings.frames:
      return run
    saved_at, saved_version = time.monotonic(), run.version

    def record(losses=None):
      known = records.records
      if not known or known[-1]['step'] != run.version:
        records.write(run.version, _record(run, losses or {}))

    def save():
      if run.version != saved_version:
        record()
        run.save(saved)
        saved.wait()
      return time.monotonic(), run.version

    try:
      run.compare()
      pool = stack.enter_context(run.start(settings.workers))
      last = time.perf_counter()
      while run.frames < settings.frames and not terminated():
        found = pool.next()
        now = time.perf_counter()
        run.apply(found, now - last)
        last = now
        pool.published = threads.Published(run.params, run.version)
        found.applied.set()
        if run.version % settings.record == 0:
          losses = {n: np.asarray(x)[None] for n, x in found.losses.items()}
          if not np.isfinite(list(losses.values())).all():
            raise harness.AllStoppedError(
              f'the losses became non-finite before update {run.version}; the '
              'likely mend is a smaller --rate.'
            )
          record(losses)
        if time.monotonic() - saved_at >= options.save_seconds:
          saved_at, saved_version = save()
    except threads.WorkerError as error:
      save()
      raise threads.WorkerError(
        f'{error}. The run stopped at update {run.version}, and what it had '
        'learnt is saved: the same command goes on from there.'
      ) from error
    save()
    if run.frames < settings.frames:
      message = (
        f'terminated after update {run.version}; the same command goes on.'
      )
      print(message, file=sys.stderr, flush=True)
  return run


def _record(run, losses):
  scores, progress = run.progress.scores, run.progress
  return {
    'training_return': np.array([np.mean(scores) if scores else np.nan]),
    'frames': np.array([run.frames]),
    'frames_per_second': np.array([run.frames / progress.seconds]),
    **{f'loss/{name}': value for name, value in losses.items()},
  }


def histogram(delays: dict[str, int]) -> tuple[np.ndarray, str]:
  """Counts by delay, and the same in words."""
  counts = np.zeros(max(map(int, delays), default=0) + 1, int)
  for delay, count in delays.items():
    counts[int(delay)] = count
  shares = counts / max(counts.sum(), 1)
  lines = [
    f'{i:4} {share:6.1%} {"#" * round(60 * share)}'
    for i, share in enumerate(shares)
    if counts[i]
  ]
  return counts, '\n'.join(['Delay of gradients, in updates:', *lines])


def main(options: harness.Options, make_game: Any = games.make) -> None:
  """Trains each seed, and writes results, table and plot."""
  settings = options.settings
  start = time.process_time()
  runs = [train(options, seed, make_game) for seed in options.seeds]
  folder = pathlib.Path(options.workdir)
  delays: dict[str, int] = {}
  for run in runs:
    for delay, count in run.progress.delays.items():
      delays[delay] = delays.get(delay, 0) + count
  counts, words = histogram(delays)
  print(words)
  scores = [
    np.mean(run.progress.scores) if run.progress.scores else np.nan
    for run in runs
  ]
  training_return = harness.mean_interval(scores)
  seconds = sum(run.progress.seconds for run in runs)
  metrics = {
    **training_return.metrics('training_return'),
    'episodes': sum(run.progress.episodes for run in runs),
    'frames': sum(run.frames for run in runs),
    'updates': sum(run.version for run in runs),
    'frames_per_second': sum(run.frames for run in runs) / max(seconds, 1e-9),
    'delay/mean': _mean(counts),
    # Every other worker updates about once while one works.
    'delay/of_others': _per_other(counts, settings.workers),
    'delay/max': len(counts) - 1,
    **{f'delay/{i}': n / counts.sum() for i, n in enumerate(counts) if n},
  }
  row: dict[str, Any] = {
    'game': settings.env,
    'workers': settings.workers,
    'frames': metrics['frames'],
    'training return, last 100 games': training_return,
    'mean delay': metrics['delay/mean'],
    'largest': metrics['delay/max'],
    'frames/s': round(metrics['frames_per_second']),
  }
  if settings.compared:
    one, every = (
      harness.reduced([run.throughputs.get(n) for run in runs], 'mean')
      for n in ('one', 'all')
    )
    metrics |= {
      'throughput/one': one,
      'throughput/all': every,
      'speedup': every / one,
    }
    row |= {'frames/s of one': round(one), 'speedup': every / one}
  harness.write_table(folder, [row])
  shares = counts / max(counts.sum(), 1)
  harness.plot_curves(
    folder / 'delays.png',
    {f'{settings.workers} threads': (np.arange(len(counts)), shares)},
    xlabel='delay, updates',
    ylabel='share of gradients',
    title=f'{settings.env}, one writer',
  )
  path = harness.write_results(
    options,
    metrics=metrics,
    seconds=seconds,
    cpu_seconds=round(time.process_time() - start, 1),
  )
  print(f'Results: {path}')


def _mean(counts):
  return float(counts @ np.arange(len(counts)) / max(counts.sum(), 1))


def _per_other(counts, workers):
  return _mean(counts) / (workers - 1) if workers > 1 else np.nan


def evaluate(options: harness.Options) -> None:
  """Plays games with the parameters of each seed's newest checkpoint."""
  settings, start = options.settings, time.perf_counter()
  workdir = pathlib.Path(options.workdir)
  updates, played = [], []
  for seed in options.seeds:
    rng = np.random.default_rng((seed, zlib.crc32(b'evaluation')))
    game = games.make(settings.env, rng, settings.conventions)
    agent = networks.agent(game.shape, game.actions)
    structure = jax.eval_shape(agent.init, jax.random.key(0))
    # Numbers have no shape: the params of this run have no axis of members.
    like = jax.tree.map(lambda _: 0, structure)
    checkpoint = harness.load(workdir, name=f'seed_{seed}', like=like)
    env = checkpoint.settings.get('env', settings.env)
    if env != settings.env:
      raise harness.OtherRunError(
        f'{workdir} holds policies for {env}, not for {settings.env}: give '
        f'--env={env}, or another --workdir.'
      )
    act = evaluation.make_act(agent, game.actions, settings.policy)
    choose = _chooser(act, checkpoint.params.actor, jax.random.key(seed))
    updates.append(checkpoint.step)
    played.append(
      [evaluation.play_game(game, choose) for _ in range(settings.episodes)]
    )
  returns, lengths = np.moveaxis(np.array(played), -1, 0)
  evaluation.write(
    options,
    evaluation.Episodes(returns, lengths.astype(int)),
    about={'game': settings.env, **settings.conventions._asdict()},
    updates=min(updates),
    start=start,
  )


def _chooser(act, actor, key):
  """Observation -> action; each call draws from a key of its own."""

  @jax.jit
  def compiled(actor, step, observation):
    return act(actor, jax.random.fold_in(key, step), observation)

  steps = itertools.count()

  def choose(observation):
    return int(compiled(actor, np.int32(next(steps)), observation))

  return choose


def check(settings: Settings) -> None:
  """Raises SettingsError for a game that is not there, or not installed."""
  if settings.env != 'CartPole':
    games.rom(settings.env)
  elif settings.conventions != games.DEFAULT:
    raise harness.SettingsError(
      '--sticky_actions, --end_on_life_loss and --fire_on_reset are for games '
      'of the Atari: leave them out, or take --env=Seaquest for instance.'
    )


STUDY = harness.Study(
  main,
  PRESETS,
  paper='a3c',
  binary='atari',
  check=check,
  modes={'evaluate': evaluate},
)


if __name__ == '__main__':
  harness.run(STUDY)
