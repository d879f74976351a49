"""Asynchronous actor-critic with threads, stale copies and one writer.

Paper: Shen, Zhang, Hong and Chen, Towards Understanding Asynchronous Advantage
Actor-critic: Convergence and Linear Speedup, 2023.

    python -m experiments.a3c.atari --preset=quick
    python -m experiments.a3c.atari evaluate --preset=quick --episodes=10

Expected: with 16 workers, a mean delay of 14.7 updates, and scores of a policy
that has learnt little. Time: 2 minutes on 2 cores.

Seaquest, 16 workers, Adam with the paper's step size; the game needs the extra
`atari`. Policy and value have separate networks as in Mnih et al., 2016. A
killed run resumes from its parameters, optimisers, counts and scores, but not
bit for bit: threads race, and unfinished games restart. `smoke` plays CartPole,
which needs no extra. `training_return` is the mean score of the last training
games; `evaluate` plays games with the fixed parameters of the newest
checkpoints.
"""

import collections
import dataclasses
import pathlib
import time
import zlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

import bilevel_jax as bj
from experiments import harness
from experiments.a3c import threads
from experiments.a3c import workers as workers_lib
from experiments.rl import evaluation as evaluation_lib
from experiments.rl import games, networks, stepped


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    env: an Atari game, or CartPole.
    workers: number of threads, each with its own game; 16 in the paper.
    rollout: actions per gradient.
    frames: total number of frames; an Atari action takes 4.
    rate: constant step size of Adam; 1.5e-4 in the paper.
    losses: losses of actor and critic.
    record: updates between two records.
    throughput_gradients: gradients of the initial throughput measurement, with
      one worker and with all; 0 skips it.
    conventions: conventions of Atari games.
    evaluation: settings of `evaluate`.
    seeds: number of seeds, for weights, games and actions.
  """

  env: str = 'Seaquest'
  workers: int = 16
  rollout: int = 20
  frames: Annotated[int, harness.Allowed(high=2**31 - 1)] = 50_000
  rate: float = 1.5e-4
  losses: workers_lib.Losses = dataclasses.field(
    default_factory=workers_lib.Losses
  )
  record: int = 50
  throughput_gradients: Annotated[int, harness.Allowed(0)] = 32
  conventions: games.Conventions = games.DEFAULT
  evaluation: evaluation_lib.Settings = dataclasses.field(
    default_factory=lambda: evaluation_lib.Settings(episodes=30)
  )
  seeds: int = 1


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    env='CartPole', workers=4, frames=8_000, throughput_gradients=8
  ),
  'paper': Settings(frames=40_000_000, record=1_000, seeds=3),
}


class Checkpoint(NamedTuple):
  """Arrays of a checkpoint."""

  params: Any
  state: Any


class Run:
  """Training of one seed: compiled functions and current state."""

  def __init__(self, options: harness.Options, seed: int, make_game: Any):
    """Initialises parameters, without compiling anything."""
    self._options, self._seed, self._make = options, seed, make_game
    settings, losses = options.settings, options.settings.losses
    game = self._game(0, 0)
    self.frames_per_step = game.frames
    agent = networks.agent(game.shape, game.actions)
    oracle = bj.rl.actor_critic_gradient(
      agent.policy,
      agent.value,
      distribution=bj.rl.categorical(),
      advantages=bj.rl.Advantages(
        losses.discount, losses.decay, losses.reward_scale, losses.normalise
      ),
      entropy_bonus=losses.entropy,
    )
    adam = workers_lib.adam(settings.rate)
    move = workers_lib.mover(actor=adam, critic=adam)
    key = jax.random.key(seed)
    self.params = agent.init(key)
    self.state = move.init(self.params)
    self.version = 0
    self.progress = threads.Progress()
    self.throughputs: dict[str, float] = {}
    self.compiled = threads.functions(agent, oracle, self.params)
    self._apply, self._key = threads.make_apply(move), key

  @property
  def frames(self) -> int:
    """Frames of all games so far."""
    return self.progress.steps * self.frames_per_step

  def start(self, count: int) -> threads.Workers:
    """Makes workers that start from the current parameters."""
    version = self.version
    return threads.Workers(
      count,
      lambda index: self._game(index, version),
      self.compiled,
      threads.Published(self.params, version),
      rollout=self._options.settings.rollout,
      # A resumed run draws new actions.
      key=jax.random.fold_in(self._key, version + 1),
    )

  def compare(self) -> None:
    """Measures the throughput of one worker and of all, unless restored."""
    settings = self._options.settings
    if self.throughputs or not settings.throughput_gradients:
      return
    for name, count in (('one', 1), ('all', settings.workers)):
      steps_per_second = threads.throughput(
        lambda n=count: self.start(n), settings.throughput_gradients
      )
      self.throughputs[name] = steps_per_second * self.frames_per_step

  def apply(self, sent: threads.Contribution, seconds: float) -> None:
    """Applies the gradient of a worker."""
    self.params, self.state = self._apply(
      self.params, self.state, sent.gradient
    )
    self.progress = self.progress.after(sent, self.version, seconds)
    self.version += 1

  @property
  def tree(self) -> Checkpoint:
    """Arrays of a checkpoint."""
    return Checkpoint(self.params, self.state)

  def save(self, session: stepped.Session) -> None:
    """Saves everything except unfinished episodes."""
    extra = {
      'progress': self.progress._asdict(),
      'throughputs': self.throughputs,
    }
    session.save(self.version, self.tree, extra)

  def restore(self, restored: harness.Restored) -> None:
    """Continues from a checkpoint."""
    self.params, self.state = restored.tree
    self.version = restored.step
    self.progress = threads.Progress(**restored.extra['progress'])
    self.throughputs = restored.extra['throughputs']

  def _game(self, index, version):
    rng = np.random.default_rng((self._seed, index, version))
    settings = self._options.settings
    return self._make(settings.env, rng, settings.conventions)


def train(options: harness.Options, seed: int, make_game: Any) -> Run:
  """Trains one seed, resuming from its checkpoint.

  Args:
    options: options of the run.
    seed: the seed.
    make_game: (name, generator, conventions) -> game.

  Returns:
    The finished run.

  Raises:
    WorkerError: if a worker thread failed; the run is saved before.
    AllStoppedError: if losses become non-finite.
  """
  settings = options.settings
  run = Run(options, seed, make_game)
  with stepped.opened(
    pathlib.Path(options.workdir) / f'seed_{seed}',
    harness.run_settings(
      settings, 'frames', 'throughput_gradients', 'evaluation'
    ),
    run.tree,
    options.save_seconds,
  ) as session:
    if session.restored is not None:
      run.restore(session.restored)
    if run.frames >= settings.frames:
      return run

    def save():
      if run.version != session.saved_step:
        _record(session.records, run)
      run.save(session)

    try:
      run.compare()
      _learn(run, session, settings, save)
    except threads.WorkerError as error:
      save()
      raise threads.WorkerError(
        f'{error}. The run stopped at update {run.version} and is saved: the '
        'same command resumes it.'
      ) from error
    save()
    if run.frames < settings.frames:
      stepped.say_terminated(f'seed {seed}', f'update {run.version}')
  return run


def _learn(run, session, settings, save):
  """Applies the workers' gradients until the run ends."""
  with run.start(settings.workers) as pool:
    last = time.perf_counter()
    while run.frames < settings.frames and not session.terminated():
      gradient = pool.next()
      now = time.perf_counter()
      run.apply(gradient, now - last)
      last = now
      pool.published = threads.Published(run.params, run.version)
      gradient.applied.set()
      if run.version % settings.record == 0:
        losses = {n: np.asarray(x)[None] for n, x in gradient.losses.items()}
        if not np.isfinite(list(losses.values())).all():
          raise harness.AllStoppedError(
            f'the losses became non-finite before update {run.version}: try a '
            'smaller --rate.'
          )
        _record(session.records, run, losses)
      if session.due():
        save()


def _record(records, run, losses=None):
  if records.records and records.records[-1]['step'] == run.version:
    return
  scores = run.progress.scores
  values = {
    'training_return': np.mean(scores or np.nan),
    'frames': run.frames,
    'frames_per_second': run.frames / run.progress.seconds,
  }
  named = {f'loss/{name}': value for name, value in (losses or {}).items()}
  numbers = {name: np.array([value]) for name, value in values.items()}
  records.write(run.version, numbers | named)


def count_delays(delays: Iterable[Mapping[str, int]]) -> np.ndarray:
  """Numbers of gradients by delay, summed over runs."""
  total: collections.Counter[int] = collections.Counter()
  for counts in delays:
    total.update({int(delay): count for delay, count in counts.items()})
  return np.array([total[i] for i in range(max(total, default=0) + 1)])


def main(
  options: harness.Options, make_game: Any = games.make
) -> harness.Report:
  """Trains each seed."""
  settings = options.settings
  runs = [train(options, seed, make_game) for seed in options.seeds]
  counts = count_delays(run.progress.delays for run in runs)
  shares = counts / max(counts.sum(), 1)
  mean_delay = shares @ np.arange(len(shares))
  scores = [run.progress.scores for run in runs]
  seconds = max(sum(run.progress.seconds for run in runs), 1e-9)
  frames = sum(run.frames for run in runs)
  results = harness.Results()
  results.note({}, {'game': settings.env, 'workers': settings.workers})
  results.add(
    training_return=[np.mean(run_scores or np.nan) for run_scores in scores],
    episodes=sum(run.progress.episodes for run in runs),
    frames=frames,
    updates=sum(run.version for run in runs),
    frames_per_second=round(frames / seconds),
    mean_delay=mean_delay,
    # Each other worker updates about once per gradient.
    delay_per_other_worker=mean_delay / (settings.workers - 1 or np.nan),
    largest_delay=len(shares) - 1,
  )
  for delay, share in enumerate(shares):
    if share:
      results.add({'delay': delay}, delay_share=share)
  if settings.throughput_gradients:
    one, all_workers = (
      harness.reduced([run.throughputs.get(n) for run in runs], 'mean')
      for n in ('one', 'all')
    )
    results.add({'workers': 'one'}, throughput=one)
    results.add({'workers': 'all'}, throughput=all_workers)
    results.add(speedup=all_workers / one)
  figure = harness.draw_curves(
    {f'{settings.workers} threads': (np.arange(len(shares)), shares)},
    xlabel='delay, updates',
    ylabel='fraction of gradients',
    title=f'{settings.env}, one writer',
  )
  column = harness.Column
  return harness.Report(
    results,
    rows=(),
    columns=(
      *('game', 'workers', 'frames'),
      column('training_return', 'training return, last 100 games'),
      column('mean_delay', 'mean delay'),
      column('largest_delay', 'largest'),
      column('frames_per_second', 'frames/s'),
      column('throughput', 'frames/s of one', {'workers': 'one'}),
      column('speedup'),
    ),
    plots={'delays.png': figure},
  )


def evaluate(options: harness.Options) -> harness.Report:
  """Evaluates the newest checkpoint of each seed."""
  settings, config = options.settings, options.settings.evaluation
  workdir = pathlib.Path(options.workdir)
  updates, played = [], []
  for seed in options.seeds:
    rng = np.random.default_rng((seed, zlib.crc32(b'evaluation')))
    game = games.make(settings.env, rng, settings.conventions)
    agent = networks.agent(game.shape, game.actions)
    structure = jax.eval_shape(agent.init, jax.random.key(0))
    # Scalars match any shape: these params have no axis of members.
    like = jax.tree.map(lambda _: 0, structure)
    checkpoint = harness.load(workdir, name=f'seed_{seed}', like=like)
    env = checkpoint.settings.get('env', settings.env)
    if env != settings.env:
      raise harness.OtherRunError(
        f'{workdir} has policies for {env}, not for {settings.env}: set '
        f'--env={env} or another --workdir.'
      )
    act = evaluation_lib.make_act(agent, game.actions, config.policy)
    choose = evaluation_lib.chooser(
      act, checkpoint.params.actor, jax.random.key(seed)
    )
    updates.append(checkpoint.step)
    played.append(
      [evaluation_lib.play_game(game, choose) for _ in range(config.episodes)]
    )
  returns, lengths = np.moveaxis(np.array(played), -1, 0)
  return evaluation_lib.report(
    options,
    config,
    evaluation_lib.Episodes(returns, lengths.astype(int)),
    seeds=options.seeds,
    updates=min(updates),
    about={'game': settings.env, **dataclasses.asdict(settings.conventions)},
  )


def check(settings: Settings) -> None:
  """Raises SettingsError for a game that is unknown or not installed."""
  if settings.env != 'CartPole':
    games.rom(settings.env)
  elif settings.conventions != games.DEFAULT:
    raise harness.SettingsError(
      '--sticky_actions, --end_on_life_loss and --fire_on_reset require an '
      'Atari game such as --env=Seaquest.'
    )


STUDY = harness.Study(
  main,
  PRESETS,
  check=check,
  renamed={'compared': 'throughput_gradients'},
  modes={'evaluate': evaluate},
)


if __name__ == '__main__':
  harness.run(STUDY)
