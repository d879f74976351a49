"""What a step of search in training costs, and frames a second of the tracker.

    export BILEVEL_JAX_PEERS=PEERS/bin/python
    python -m experiments.benchmarks.tracklet --data_dir=DATA

Expected: a step of search below 1.5 (K + 1) steps of teacher forcing; fewer
frames per second than `trackers`' ByteTrack, the fewer the sparser the scene;
more than norfair-enough in crowds. Time: 5 minutes on 2 cores.

1. A search carries K hypotheses and the truth: does its step cost more than
   1.5 (K + 1) times one of teacher forcing, which carries the truth alone?
2. Is the online tracker, in numpy, as fast as trackers of other packages on the
   same detections? It is the one that `experiments.tracklet.train` writes: the
   mean of `members` networks. They are trained for seconds on other people:
   with random weights a tracker keeps three times as many tracklets, since none
   continues for long. The scenes are a crowd and a sparse scene of made-up
   walks, and simulated detections of a sequence of MOT17 where --data_dir has
   it. The peers' seconds are those of their `update` only, in an environment
   that BILEVEL_JAX_PEERS names, see `experiments.tracklet.peers`; without it
   these rows are not measured.

Times are medians of paired ratios with their range, see `measure`; a pair of
trackers is timed in two processes, one after the other. Processor time counts
all threads.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import harness
from experiments.benchmarks import measure
from experiments.tracklet import (
  detections,
  learning,
  motion,
  network,
  peer_trackers,
  peers,
  scenes,
  search,
  simulation,
  tracker,
  windows,
)

STEP_BOUND, SPEED_BOUND = 1.5, 1.0
PEERS = ('bytetrack', 'norfair')


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    hidden: units of the network.
    hypotheses: K of each search.
    window: steps of a window.
    batch: windows of an update.
    people: in a picture of the crowd.
    sparse_people: in a picture of the sparse scene.
    sequence: of MOT17, in the data folder.
    length: frames of a made-up sequence.
    members: networks of the tracker, as `train` has them.
    updates: of each of them, by teacher forcing.
    rounds: pairs of timings of each comparison.
  """

  hidden: int = 64
  hypotheses: tuple[int, ...] = (2, 4, 8)
  window: int = 16
  batch: int = 32
  people: int = 16
  sparse_people: int = 3
  sequence: str = simulation.Data.held_out
  length: int = 600
  members: int = learning.Network.members
  updates: int = 300
  rounds: int = 5


PRESETS = {'paper': Settings()}


def simulated(scene: scenes.Scene, seed: int = 0) -> detections.Detected:
  """Simulated detections of a scene."""
  rng = np.random.default_rng(seed)
  return detections.simulate(scene.truth, scene.info, rng)


def crowd(settings: Settings, seed: int = 0) -> detections.Detected:
  """Simulated detections of the crowd."""
  return simulated(
    scenes.make_up(seed, length=settings.length, people=settings.people), seed
  )


def timed_scenes(
  settings: Settings, data_dir: str | None
) -> dict[str, detections.Detected]:
  """The detections that trackers are timed on, by name of the scene."""
  sparse = scenes.make_up(
    0, length=settings.length, people=settings.sparse_people
  )
  timed = {'crowd': crowd(settings), 'sparse': simulated(sparse)}
  if data_dir:
    timed['mot17'] = simulated(scenes.read(data_dir, settings.sequence))
  return timed


def step(
  settings: Settings, hypotheses: int, seed: int = 0, member: int = 0
) -> tuple[Callable[[Any, Any], Any], Any, Callable[[Any], windows.Window]]:
  """A step of training; of 0 hypotheses, of teacher forcing.

  Args:
    settings: of the run.
    hypotheses: K.
    seed: of the people.
    member: which of the networks; each begins with other weights.

  Returns:
    A function of weights with their optimiser's state and of a batch to the
    former; what it begins with; a function of a key to a batch.
  """
  drawn = {'steps': settings.window, 'jumps': 0.35, 'longest': 60}
  data = jax.tree.map(jnp.asarray, detections.padded([crowd(settings, seed)]))
  task = learning.Task(
    data, motion.NOISE, settings.hidden, drawn, settings.batch
  )
  loss = learning.loss_of(task, learning.Losses(search.Beam(hypotheses)))
  weights = network.init(jax.random.key(1 + member), hidden=settings.hidden)
  optimiser = optax.adam(2e-3)

  def update(carry, batch):
    weights, state = carry
    updates, state = optimiser.update(jax.grad(loss)(weights, batch), state)
    return optax.apply_updates(weights, updates), state

  batch = lambda key: windows.batch(key, data, settings.batch, **drawn)
  return update, (weights, optimiser.init(weights)), batch


def program(settings: Settings, hypotheses: int) -> measure.Program:
  """A step on one batch of windows."""
  update, start, batch = step(settings, hypotheses)
  return measure.Program(update, start, batch(jax.random.key(0)))


def trained(settings: Settings) -> network.Weights:
  """Networks after some updates on other people, leading axis members."""

  def member(i):
    update, start, batch = step(settings, 0, seed=1, member=i)
    body = lambda carry, key: (update(carry, batch(key)), None)
    keys = jax.random.split(jax.random.key(2), settings.updates)
    (weights, _), _ = jax.jit(lambda: jax.lax.scan(body, start, keys))()
    return weights

  members = [member(i) for i in range(settings.members)]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *members)


def frames_per_second(
  detected: detections.Detected, weights: network.Weights
) -> np.ndarray:
  """Of the online tracker, by the clock and by processor time, (2,)."""
  model = tracker.learned(weights, motion.NOISE)
  begin = peer_trackers.clocks()
  tracker.online(model, detected)
  return detected.info.length / (peer_trackers.clocks() - begin)


def speeds(
  detected: detections.Detected,
  weights: network.Weights,
  rounds: int,
  folder: pathlib.Path,
) -> dict[str, np.ndarray]:
  """Frames per second by the clock and by processor time, (rounds, 2).

  Args:
    detected: detections.
    weights: of our networks.
    rounds: pairs of timings.
    folder: of the peers' files.

  Returns:
    Speeds by peer, and ours timed in turn with each peer as `ours/PEER`.
  """
  frames_per_second(detected, weights)  # Warm.
  times: dict[str, list[Any]] = {}
  for _ in range(rounds):
    for name in PEERS:
      job = {'tracker': name, 'options': {}}
      (_,), (spent,) = peers.run_jobs([job], [detected], folder / name)
      seconds = np.array([spent['seconds'], spent['cpu_seconds']])
      times.setdefault(name, []).append(spent['frames'] / seconds)
      own = frames_per_second(detected, weights)
      times.setdefault(f'ours/{name}', []).append(own)
  return {name: np.array(values) for name, values in times.items()}


def main(options: harness.Options) -> None:
  """Runs both comparisons and writes a table and results."""
  start = time.monotonic()
  settings = options.settings
  metrics: dict[str, float] = {}
  rows: list[dict[str, Any]] = []
  base = program(settings, 0)
  for k in settings.hypotheses:
    one = program(settings, k)
    ratio = measure.time_ratio(one.run, base.run, rounds=settings.rounds)
    bound = STEP_BOUND * (k + 1)
    name = f'search_k{k}'
    metrics[f'time_ratio/{name}'] = ratio.wall
    metrics[f'time_ratio/{name}/low'] = ratio.low
    metrics[f'time_ratio/{name}/high'] = ratio.high
    metrics[f'cpu_ratio/{name}'] = ratio.cpu
    metrics[f'share_of_bound/{name}'] = ratio.wall / bound
    metrics[f'memory_ratio/{name}'] = one.memory / base.memory
    rows.append(
      {
        'what': f'a step of search, K = {k}',
        'against': 'a step of teacher forcing',
        'ratio': str(ratio),
        'processor time': ratio.cpu,
        'memory': one.memory / base.memory,
        'bound': f'at most {bound:g}',
        'verdict': measure.judge(ratio.wall, ratio.low, ratio.high, bound),
      }
    )
  try:
    peers.python()
    weights = trained(settings)
    timed = timed_scenes(settings, options.data_dir)
  except harness.SettingsError as error:
    print(f'The trackers of other packages are not timed: {error}')
    timed = {}
    rows.append(
      {'what': 'frames per second, online', 'verdict': 'not measured'}
    )
  for scene, detected in timed.items():
    folder = pathlib.Path(options.workdir) / 'peers' / scene
    of_scene = speeds(detected, weights, settings.rounds, folder)
    boxes = len(detected.boxes.frames) / detected.info.length
    metrics[f'boxes_per_frame/{scene}'] = boxes
    for name in PEERS:
      ratios = of_scene[f'ours/{name}'] / of_scene[name]
      (middle, cpu), low, high = (
        np.median(ratios, axis=0),
        ratios[:, 0].min(),
        ratios[:, 0].max(),
      )
      metrics[f'speed_ratio/{scene}/{name}'] = float(middle)
      metrics[f'speed_ratio/{scene}/{name}/low'] = float(low)
      metrics[f'speed_ratio/{scene}/{name}/high'] = float(high)
      metrics[f'cpu_speed_ratio/{scene}/{name}'] = float(cpu)
      rows.append(
        {
          'what': f'frames per second, online, {scene}, '
          f'{boxes:.1f} boxes per frame',
          'against': name,
          'ratio': f'{middle:.3f} ({low:.2f} to {high:.2f})',
          'processor time': float(cpu),
          'bound': f'at least {SPEED_BOUND:g}',
          'verdict': measure.judge(-middle, -high, -low, -SPEED_BOUND),
        }
      )
    each = np.concatenate([of_scene[f'ours/{name}'] for name in PEERS])
    metrics[f'frames_per_second/{scene}'] = float(np.median(each[:, 0]))
  harness.write_table(options.workdir, rows)
  path = harness.write_results(
    options, metrics=metrics, seconds=time.monotonic() - start
  )
  print(f'Results: {path}')


STUDY = harness.Study(main, PRESETS, paper='benchmarks', binary='tracklet')


if __name__ == '__main__':
  harness.run(STUDY)
