"""Steps of search in training, and the online tracker.

Comparisons:

- a step of search with K hypotheses and the truth / teacher forcing, with the
  truth only: at most 1.5 (K + 1);
- a frame of the online tracker in numpy / of trackers of other packages, on the
  same detections: of a whole sequence (`online`), and by `live.Tracker.update`,
  as the packages are called (`live`). Our tracker has the mean of `members`
  networks, like that of `experiments.tracklet`. They are trained for seconds on
  other people: with random weights, tracklets end early and a tracker has three
  times as many.

The scenes are a crowd and a sparse scene of synthetic walks, and simulated
detections of a sequence of MOT17 if the data folder has it. The peers' time is
that of their `update`; both sides are timed in separate processes, in turn.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import harness
from experiments.benchmarks import measure
from experiments.tracking import detections, motion, network, scenes, tracker
from experiments.tracking import live as live_tracker
from experiments.tracklet import (
  learning,
  peer_trackers,
  peers,
  simulation,
  windows,
)

BOUND_STEP, BOUND_TIME = 1.5, 1.0
PEERS = ('bytetrack', 'norfair')


class Sizes(NamedTuple):
  """Sizes of the network and the scenes.

  Attributes:
    hidden: hidden units of the network.
    window: steps of a window.
    batch: windows in an update.
    people: people in a frame of the crowd.
    sparse_people: people in a frame of the sparse scene.
    sequence: name of a sequence of MOT17.
    length: frames of a synthetic sequence.
    members: networks of the tracker.
    updates: updates of each network by teacher forcing.
  """

  hidden: int = 64
  window: int = 16
  batch: int = 32
  people: int = 16
  sparse_people: int = 3
  sequence: str = simulation.Data.held_out
  length: int = 600
  members: int = learning.Network.members
  updates: int = 300


def simulated(scene: scenes.Scene, seed: int = 0) -> detections.Detected:
  """Simulates detections of a scene."""
  rng = np.random.default_rng(seed)
  return detections.simulate(scene.truth, scene.info, rng)


def crowd(sizes: Sizes, seed: int = 0) -> detections.Detected:
  """Simulates detections of the crowd."""
  return simulated(
    scenes.make_up(seed, length=sizes.length, people=sizes.people), seed
  )


def scene(name: str, sizes: Sizes, data_dir: str | None) -> detections.Detected:
  """Returns the detections of a scene by name."""
  if name == 'mot17':
    if data_dir is None:
      raise harness.MissingDataError('MOT17 needs --data_dir.')
    return simulated(scenes.read(data_dir, sizes.sequence))
  if name == 'crowd':
    return crowd(sizes)
  return simulated(
    scenes.make_up(0, length=sizes.length, people=sizes.sparse_people)
  )


def step(
  sizes: Sizes, hypotheses: int, seed: int = 0, member: int = 0
) -> tuple[Callable[[Any, Any], Any], Any, Callable[[Any], windows.Window]]:
  """Makes a training step; 0 hypotheses stand for teacher forcing.

  Args:
    sizes: sizes of the network.
    hypotheses: K, the number of hypotheses.
    seed: seed of the scene.
    member: index of the network, which determines its initial weights.

  Returns:
    A function of (carry, batch) to the next carry, weights with the optimiser's
    state; the first carry; a function of a key to a batch.
  """
  drawn = {'steps': sizes.window, 'jumps': 0.35, 'max_gap': 60}
  data = jax.tree.map(jnp.asarray, detections.pad([crowd(sizes, seed)]))
  task = learning.Task(data, motion.NOISE, sizes.hidden, drawn, sizes.batch)
  loss = learning.make_loss(task, learning.Search(hypotheses))
  weights = network.init(jax.random.key(1 + member), hidden=sizes.hidden)
  optimiser = optax.adam(2e-3)

  def update(carry, batch):
    weights, state = carry
    updates, state = optimiser.update(jax.grad(loss)(weights, batch), state)
    return optax.apply_updates(weights, updates), state

  batch = lambda key: windows.batch(key, data, sizes.batch, **drawn)
  return update, (weights, optimiser.init(weights)), batch


def program(sizes: Sizes, hypotheses: int) -> measure.Program:
  """Compiles a step on one batch of windows."""
  update, start, batch = step(sizes, hypotheses)
  return measure.Program(update, start, batch(jax.random.key(0)))


@functools.cache
def trained(sizes: Sizes) -> network.Weights:
  """Trains networks on other people; leaves have an axis of members."""

  def member(i):
    update, start, batch = step(sizes, 0, seed=1, member=i)
    body = lambda carry, key: (update(carry, batch(key)), None)
    keys = jax.random.split(jax.random.key(2), sizes.updates)
    (weights, _), _ = jax.jit(lambda: jax.lax.scan(body, start, keys))()
    return weights

  members = [member(i) for i in range(sizes.members)]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *members)


def time_tracker(
  detected: detections.Detected, weights: network.Weights, *, live: bool = False
) -> np.ndarray:
  """Returns wall and CPU seconds of the online tracker, (2,).

  Args:
    detected: detections.
    weights: of the networks.
    live: whether frames come one by one, to `live.Tracker.update`.
  """
  model = tracker.make_model(weights, motion.NOISE)
  if not live:
    begin = peer_trackers.clocks()
    tracker.online(model, detected)
    return peer_trackers.clocks() - begin
  boxes, update = detected.boxes, live_tracker.Tracker(model).update
  rows = boxes.by_frame(detected.info.length)
  frames = [(boxes.boxes[row], boxes.confidences[row]) for row in rows]
  begin = peer_trackers.clocks()
  for frame in frames:
    update(*frame)
  return peer_trackers.clocks() - begin


def _search(hypotheses, sizes, context):
  return measure.compare(program(sizes, hypotheses), program(sizes, 0), context)


def _tracker(name, scene_name, live, sizes, context):
  """Compares our tracker with that of another package."""
  context.peers.require('trackers', 'norfair')
  # The script of the trackers reads this variable.
  os.environ[peers.PYTHON_VARIABLE] = context.peers.python
  detected = scene(scene_name, sizes, context.data_dir)
  weights = trained(sizes)
  folder = pathlib.Path(context.workdir) / 'trackers' / scene_name / name

  def measured(times):
    return sum(time_tracker(detected, weights, live=live) for _ in range(times))

  def peer(times):
    jobs = [{'tracker': name, 'options': {}}] * times
    _, spent = peers.run_jobs(jobs, [detected], folder)
    return sum(np.array([s['seconds'], s['cpu_seconds']]) for s in spent)

  numbers = measure.compare(measured, peer, context, steps=1)
  frames = detected.info.length
  return numbers | {
    'frames_per_second': frames / numbers['seconds'],
    'boxes_per_frame': len(detected.boxes.frames) / frames,
  }


def rows(preset: str) -> Sequence[measure.Row]:
  """Returns the comparisons."""
  small = preset == 'smoke'
  sizes = Sizes()
  if small:
    sizes = Sizes(hidden=8, window=3, batch=2, people=4, length=40, updates=2)
  every = measure.Rows()
  for k in (1,) if small else (2, 4, 8):
    what = f'a step of search, {k} hypotheses / teacher forcing'
    bound = BOUND_STEP * (k + 1)
    every.add(f'trackers/search/{k}', what, _search, k, sizes, wall=bound)
  for place in ('crowd', 'sparse', 'mot17'):
    for peer in PEERS:
      bounds = {'cpu': BOUND_TIME} if peer == 'bytetrack' else {}
      for way, what in (('online', 'a frame'), ('live', 'a call of update')):
        name, what = (
          f'trackers/{way}/{place}/{peer}',
          f'{what}, {place} / {peer}',
        )
        live = way == 'live'
        every.add(name, what, _tracker, peer, place, live, sizes, **bounds)
  return every
