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
    env: a game of the Atari, or CartPole.
    workers: threads, each with a game of its own; 16 in the paper.
    rollout: actions for a gradient.
    frames: of all games; an action of the Atari takes 4.
    rate: of Adam, constant; 1.5e-4 in the paper.
    losses: of actor and critic.
    record: updates between two records.
    compared: gradients by which the throughput of one worker, and of all, is
      measured at first; 0 for no comparison.
    conventions: of games of the Atari.
    evaluation: what `evaluate` plays.
    seeds: of weights, games and actions.
  """

  env: str = 'Seaquest'
  workers: int = 16
  rollout: int = 20
  frames: int = 50_000
  rate: float = 1.5e-4
  losses: workers_lib.Losses = dataclasses.field(
    default_factory=workers_lib.Losses
  )
  record: int = 50
  compared: Annotated[int, harness.Allowed(0)] = 32
  conventions: games.Conventions = games.DEFAULT
  evaluation: evaluation_lib.Settings = dataclasses.field(
    default_factory=lambda: evaluation_lib.Settings(episodes=30)
  )
  seeds: int = 1


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(env='CartPole', workers=4, frames=8_000, compared=8),
  'paper': Settings(frames=40_000_000, record=1_000, seeds=3),
}


class Saved(NamedTuple):
  """What a checkpoint holds."""

  params: Any
  state: Any


class Run:
  """One seed: what is compiled, and what is kept; see `train`."""

  def __init__(self, options: harness.Options, seed: int, make_game: Any):
    """Compiles nothing yet."""
    self._options, self._seed, self._make = options, seed, make_game
    settings, losses = options.settings, options.settings.losses
    game = self._game(0, 0)
    self.frames_a_step = game.frames
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

  @property
  def tree(self) -> Saved:
    """What a checkpoint holds."""
    return Saved(self.params, self.state)

  def save(self, session: stepped.Session) -> None:
    """Keeps all but the episodes under way."""
    extra = {
      'progress': self.progress._asdict(),
      'throughputs': self.throughputs,
    }
    session.save(self.version, self.tree, extra)

  def restore(self, restored: harness.Restored) -> None:
    """Goes on from a checkpoint."""
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
  with stepped.opened(
    pathlib.Path(options.workdir) / f'seed_{seed}',
    harness.settings_of(settings, 'frames', 'compared', 'evaluation'),
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
        f'{error}. The run stopped at update {run.version}, and what it had '
        'learnt is saved: the same command goes on from there.'
      ) from error
    save()
    if run.frames < settings.frames:
      stepped.say_terminated(f'seed {seed}', f'update {run.version}')
  return run


def _learn(run, session, settings, save):
  """Applies gradients of the workers until the run ends."""
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
            f'the losses became non-finite before update {run.version}; the '
            'likely mend is a smaller --rate.'
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


def counts_of(delays: Iterable[Mapping[str, int]]) -> np.ndarray:
  """Numbers of gradients by delay, from those of several runs."""
  total: collections.Counter[int] = collections.Counter()
  for each in delays:
    total.update({int(delay): count for delay, count in each.items()})
  return np.array([total[i] for i in range(max(total, default=0) + 1)])


def main(
  options: harness.Options, make_game: Any = games.make
) -> harness.Report:
  """Trains each seed."""
  settings = options.settings
  runs = [train(options, seed, make_game) for seed in options.seeds]
  counts = counts_of(run.progress.delays for run in runs)
  shares = counts / max(counts.sum(), 1)
  mean_delay = shares @ np.arange(len(shares))
  scores = [run.progress.scores for run in runs]
  seconds = max(sum(run.progress.seconds for run in runs), 1e-9)
  frames = sum(run.frames for run in runs)
  results = harness.Results()
  results.note({}, {'game': settings.env, 'workers': settings.workers})
  results.add(
    training_return=[np.mean(of_run or np.nan) for of_run in scores],
    episodes=sum(run.progress.episodes for run in runs),
    frames=frames,
    updates=sum(run.version for run in runs),
    frames_per_second=round(frames / seconds),
    mean_delay=mean_delay,
    # Every other worker updates about once while one works.
    delay_per_other_worker=mean_delay / (settings.workers - 1 or np.nan),
    largest_delay=len(shares) - 1,
  )
  for delay, share in enumerate(shares):
    if share:
      results.add({'delay': delay}, delay_share=share)
  if settings.compared:
    one, every = (
      harness.reduced([run.throughputs.get(n) for run in runs], 'mean')
      for n in ('one', 'all')
    )
    results.add({'workers': 'one'}, throughput=one)
    results.add({'workers': 'all'}, throughput=every)
    results.add(speedup=every / one)
  figure = harness.draw_curves(
    {f'{settings.workers} threads': (np.arange(len(shares)), shares)},
    xlabel='delay, updates',
    ylabel='share of gradients',
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
  """Plays games with the parameters of each seed's newest checkpoint."""
  settings, asked = options.settings, options.settings.evaluation
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
    act = evaluation_lib.make_act(agent, game.actions, asked.policy)
    choose = evaluation_lib.chooser(
      act, checkpoint.params.actor, jax.random.key(seed)
    )
    updates.append(checkpoint.step)
    played.append(
      [evaluation_lib.play_game(game, choose) for _ in range(asked.episodes)]
    )
  returns, lengths = np.moveaxis(np.array(played), -1, 0)
  return evaluation_lib.report(
    options,
    asked,
    evaluation_lib.Episodes(returns, lengths.astype(int)),
    seeds=options.seeds,
    updates=min(updates),
    about={'game': settings.env, **dataclasses.asdict(settings.conventions)},
  )


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
