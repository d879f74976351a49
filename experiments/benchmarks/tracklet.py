"""What a step of search in training costs, and frames a second of the tracker.

    python -m experiments.benchmarks.tracklet
    BILEVEL_JAX_PEERS=PEERS/bin/python python -m experiments.benchmarks.tracklet

Expected: a step of search below 1.5 (K + 1) steps of teacher forcing; as many
frames a second as ByteTrack of `trackers` and as norfair-enough. Time: 5
minutes on 2 cores.

Two questions, of a network with random weights and people who walk, made up,
since cost does not depend on what was learnt:

1. A search carries K hypotheses and the truth: does its step cost more than
   1.5 (K + 1) times one of teacher forcing, which carries the truth alone?
2. Is the online tracker, in numpy, as fast as trackers of other packages on the
   same detections? Their seconds are those of their `update` alone, in an
   environment that BILEVEL_JAX_PEERS names, see `experiments.tracklet.peers`;
   without it these rows are not measured.

Times are medians of paired ratios with their range, see `measure`; a pair of
trackers is timed in two processes, one after the other.
"""

import dataclasses
import pathlib
import time
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
  peers,
  scenes,
  search,
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
    people: in a picture.
    length: frames of a sequence.
    rounds: pairs of timings of each comparison.
  """

  hidden: int = 64
  hypotheses: tuple[int, ...] = (2, 4, 8)
  window: int = 16
  batch: int = 32
  people: int = 16
  length: int = 600
  rounds: int = 5


PRESETS = {'paper': Settings()}


def found(settings: Settings) -> detections.Detected:
  """Simulated detections of people who walk."""
  scene = scenes.make_up(0, length=settings.length, people=settings.people)
  return detections.simulate(scene.truth, scene.info, np.random.default_rng(0))


def step(settings: Settings, hypotheses: int) -> measure.Program:
  """A step of training on one batch of windows; of 0, teacher forcing."""
  drawn = {'steps': settings.window, 'jumps': 0.35, 'longest': 60}
  data = jax.tree.map(jnp.asarray, detections.padded([found(settings)]))
  task = learning.Task(
    data, motion.NOISE, settings.hidden, drawn, settings.batch
  )
  loss = learning.loss_of(task, learning.Losses(search.Beam(hypotheses)))
  batch = windows.batch(jax.random.key(0), data, settings.batch, **drawn)
  weights = network.init(jax.random.key(1), hidden=settings.hidden)
  optimiser = optax.adam(1e-3)

  def update(carry, batch):
    weights, state = carry
    updates, state = optimiser.update(jax.grad(loss)(weights, batch), state)
    return optax.apply_updates(weights, updates), state

  return measure.Program(update, (weights, optimiser.init(weights)), batch)


def frames_a_second(given: detections.Detected, hidden: int) -> float:
  """Of the online tracker, with a network that does match."""
  weights = network.init(jax.random.key(1), hidden=hidden)
  model = tracker.learned(jax.device_get(weights), motion.NOISE)
  begin = time.perf_counter()
  tracker.online(model, given)
  return given.info.length / (time.perf_counter() - begin)


def speeds(settings: Settings, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Frames a second of each round, by tracker; ours beside each peer's."""
  given = found(settings)
  frames_a_second(given, settings.hidden)  # Warm.
  times: dict[str, list[float]] = {}
  jobs = [{'tracker': name, 'options': {}} for name in PEERS]
  for _ in range(settings.rounds):
    for name, job in zip(PEERS, jobs):
      (_,), (spent,) = peers.run_jobs([job], [given], folder / name)
      times.setdefault(name, []).append(spent['frames'] / spent['seconds'])
      own = frames_a_second(given, settings.hidden)
      times.setdefault(f'ours/{name}', []).append(own)
  return {name: np.array(values) for name, values in times.items()}


def main(options: harness.Options) -> None:
  """Runs both comparisons and writes a table and results."""
  start = time.monotonic()
  settings = options.settings
  metrics: dict[str, float] = {}
  rows: list[dict[str, Any]] = []
  base = step(settings, 0)
  for k in settings.hypotheses:
    one = step(settings, k)
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
    found_speeds = speeds(settings, pathlib.Path(options.workdir) / 'peers')
  except harness.SettingsError as error:
    print(f'The trackers of other packages are not timed: {error}')
    found_speeds = {}
  for name in PEERS:
    row: dict[str, Any] = {
      'what': 'frames a second, online',
      'against': name,
      'bound': f'at least {SPEED_BOUND:g}',
      'verdict': 'not measured',
    }
    if found_speeds:
      ratios = found_speeds[f'ours/{name}'] / found_speeds[name]
      middle, low, high = np.median(ratios), ratios.min(), ratios.max()
      metrics[f'speed_ratio/{name}'] = float(middle)
      metrics[f'speed_ratio/{name}/low'] = float(low)
      metrics[f'speed_ratio/{name}/high'] = float(high)
      metrics[f'frames_a_second/{name}'] = float(np.median(found_speeds[name]))
      row['ratio'] = f'{middle:.3f} ({low:.2f} to {high:.2f})'
      row['verdict'] = measure.judge(-middle, -high, -low, -SPEED_BOUND)
    rows.append(row)
  if found_speeds:
    metrics['frames_a_second/ours'] = float(
      np.median(
        np.concatenate([found_speeds[f'ours/{name}'] for name in PEERS])
      )
    )
  harness.write_table(options.workdir, rows)
  path = harness.write_results(
    options, metrics=metrics, seconds=time.monotonic() - start
  )
  print(f'Results: {path}')


if __name__ == '__main__':
  harness.run(main, PRESETS, paper='benchmarks', binary='tracklet')
