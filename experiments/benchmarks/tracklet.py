"""A step of search in training, and the online tracker against other packages.

- A search carries K hypotheses and the truth: does its step cost more than
  1.5 (K + 1) times one of teacher forcing, which carries the truth alone?
- The online tracker, in numpy, against trackers of other packages on the same
  detections: the time of a frame. It is the one that `experiments.tracklet`
  trains: the mean of `members` networks. They are trained for seconds on other
  people: with random weights a tracker keeps three times as many tracklets,
  since none continues for long. The scenes are a crowd and a sparse scene of
  made-up walks, and simulated detections of a sequence of MOT17 where the data
  folder has it. The peers' seconds are those of their `update` only; the two
  are timed in two processes, one after the other.
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
    hidden: units of the network.
    window: steps of a window.
    batch: windows of an update.
    people: in a picture of the crowd.
    sparse_people: in a picture of the sparse scene.
    sequence: of MOT17, in the data folder.
    length: frames of a made-up sequence.
    members: networks of the tracker, as `train` has them.
    updates: of each of them, by teacher forcing.
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
  """Simulated detections of a scene."""
  rng = np.random.default_rng(seed)
  return detections.simulate(scene.truth, scene.info, rng)


def crowd(sizes: Sizes, seed: int = 0) -> detections.Detected:
  """Simulated detections of the crowd."""
  return simulated(
    scenes.make_up(seed, length=sizes.length, people=sizes.people), seed
  )


def scene(name: str, sizes: Sizes, data_dir: str | None) -> detections.Detected:
  """The detections that trackers are timed on."""
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
  """A step of training; of 0 hypotheses, of teacher forcing.

  Args:
    sizes: of the network.
    hypotheses: K.
    seed: of the people.
    member: which of the networks; each begins with other weights.

  Returns:
    A function of weights with their optimiser's state and of a batch to the
    former; what it begins with; a function of a key to a batch.
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
  """A step on one batch of windows."""
  update, start, batch = step(sizes, hypotheses)
  return measure.Program(update, start, batch(jax.random.key(0)))


@functools.cache
def trained(sizes: Sizes) -> network.Weights:
  """Networks after some updates on other people, leading axis members."""

  def member(i):
    update, start, batch = step(sizes, 0, seed=1, member=i)
    body = lambda carry, key: (update(carry, batch(key)), None)
    keys = jax.random.split(jax.random.key(2), sizes.updates)
    (weights, _), _ = jax.jit(lambda: jax.lax.scan(body, start, keys))()
    return weights

  members = [member(i) for i in range(sizes.members)]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *members)


def seconds_of(
  detected: detections.Detected, weights: network.Weights
) -> np.ndarray:
  """Of the online tracker, by the clock and by processor time, (2,)."""
  model = tracker.make_model(weights, motion.NOISE)
  begin = peer_trackers.clocks()
  tracker.online(model, detected)
  return peer_trackers.clocks() - begin


def _search(hypotheses, sizes, context):
  return measure.compare(program(sizes, hypotheses), program(sizes, 0), context)


def _tracker(name, scene_name, sizes, context):
  """Our tracker against that of another package, on the same detections."""
  context.peers.require('trackers', 'norfair')
  # The trackers' own script finds its environment by this name.
  os.environ[peers.PYTHON_VARIABLE] = context.peers.python
  detected = scene(scene_name, sizes, context.data_dir)
  weights = trained(sizes)
  folder = pathlib.Path(context.workdir) / 'trackers' / scene_name / name

  def measured(times):
    return sum(seconds_of(detected, weights) for _ in range(times))

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
  """The comparisons."""
  small = preset == 'smoke'
  sizes = Sizes()
  if small:
    sizes = Sizes(hidden=8, window=3, batch=2, people=4, length=40, updates=2)
  comparisons = [
    measure.Row(
      f'trackers/search/{k}',
      f'a step of search, {k} hypotheses / teacher forcing',
      functools.partial(_search, k, sizes),
      {'wall': BOUND_STEP * (k + 1)},
    )
    for k in ((1,) if small else (2, 4, 8))
  ]
  for place in ('crowd', 'sparse', 'mot17'):
    comparisons += [
      measure.Row(
        f'trackers/online/{place}/{name}',
        f'a frame, {place} / {name}',
        functools.partial(_tracker, name, place, sizes),
        {'wall': BOUND_TIME} if name == 'bytetrack' else {},
      )
      for name in PEERS
    ]
  return comparisons
