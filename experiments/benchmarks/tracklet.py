"""What a step of search in training costs, and frames a second of the tracker.

    python -m experiments.benchmarks.tracklet
    BILEVEL_JAX_PEERS=PEERS/bin/python python -m experiments.benchmarks.tracklet

Expected: a step of search below 1.5 (K + 1) steps of teacher forcing; a little
more frames a second than `trackers`' ByteTrack, and more than twice those of
norfair-enough. Time: 5 minutes on 2 cores.

Two questions, of people who walk, made up:

1. A search carries K hypotheses and the truth: does its step cost more than
   1.5 (K + 1) times one of teacher forcing, which carries the truth alone?
2. Is the online tracker, in numpy, as fast as trackers of other packages on the
   same detections? It asks a network that was trained for seconds on other
   people: one with random weights keeps three times as many tracklets, since
   none goes on for long. Their seconds are those of their `update` alone, in an
   environment that BILEVEL_JAX_PEERS names, see `experiments.tracklet.peers`;
   without it these rows are not measured.

Times are medians of paired ratios with their range, see `measure`; a pair of
trackers is timed in two processes, one after the other.
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
    updates: of the network that tracks, by teacher forcing.
    rounds: pairs of timings of each comparison.
  """

  hidden: int = 64
  hypotheses: tuple[int, ...] = (2, 4, 8)
  window: int = 16
  batch: int = 32
  people: int = 16
  length: int = 600
  updates: int = 300
  rounds: int = 5


PRESETS = {'paper': Settings()}


def found(settings: Settings, seed: int = 0) -> detections.Detected:
  """Simulated detections of people who walk."""
  scene = scenes.make_up(seed, length=settings.length, people=settings.people)
  rng = np.random.default_rng(seed)
  return detections.simulate(scene.truth, scene.info, rng)


def step(
  settings: Settings, hypotheses: int, seed: int = 0
) -> tuple[Callable[[Any, Any], Any], Any, Callable[[Any], windows.Window]]:
  """A step of training; of 0 hypotheses, of teacher forcing.

  Args:
    settings: of the run.
    hypotheses: K.
    seed: of the people.

  Returns:
    A function of weights with their optimiser's state and of a batch to the
    former; what it begins with; a function of a key to a batch.
  """
  drawn = {'steps': settings.window, 'jumps': 0.35, 'longest': 60}
  data = jax.tree.map(jnp.asarray, detections.padded([found(settings, seed)]))
  task = learning.Task(
    data, motion.NOISE, settings.hidden, drawn, settings.batch
  )
  loss = learning.loss_of(task, learning.Losses(search.Beam(hypotheses)))
  weights = network.init(jax.random.key(1), hidden=settings.hidden)
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
  """A network after some updates on other people."""
  update, start, batch = step(settings, 0, seed=1)
  body = lambda carry, key: (update(carry, batch(key)), None)
  keys = jax.random.split(jax.random.key(2), settings.updates)
  (weights, _), _ = jax.jit(lambda: jax.lax.scan(body, start, keys))()
  return jax.device_get(weights)


def frames_a_second(
  given: detections.Detected, weights: network.Weights
) -> float:
  """Of the online tracker."""
  model = tracker.learned(weights, motion.NOISE)
  begin = time.perf_counter()
  tracker.online(model, given)
  return given.info.length / (time.perf_counter() - begin)


def speeds(settings: Settings, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Frames a second of each round, by tracker; ours beside each peer's."""
  peers.python()  # Or else there is nothing to time.
  given = found(settings)
  weights = trained(settings)
  frames_a_second(given, weights)  # Warm.
  times: dict[str, list[float]] = {}
  jobs = [{'tracker': name, 'options': {}} for name in PEERS]
  for _ in range(settings.rounds):
    for name, job in zip(PEERS, jobs):
      (_,), (spent,) = peers.run_jobs([job], [given], folder / name)
      times.setdefault(name, []).append(spent['frames'] / spent['seconds'])
      own = frames_a_second(given, weights)
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
