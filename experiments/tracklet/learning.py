"""Trains score networks: teacher forcing first, then that or search."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.tracklet import detections, motion, network, search, windows


class Task(NamedTuple):
  """What networks are trained on, and how large they are.

  Attributes:
    data: padded detections of the training sequences.
    noise: of the filter.
    hidden: units of a layer.
    drawn: `steps`, `jumps` and `longest` of `windows.draw`.
    batch: windows of an update.
  """

  data: detections.Frames
  noise: motion.Noise
  hidden: int
  drawn: dict[str, Any]
  batch: int


class Losses(NamedTuple):
  """Weights of the losses, and the search that they are of.

  Attributes:
    beam: no hypotheses for teacher forcing.
    own: weight of the cross entropy on histories of the beam.
    pairs: weight of margin and rank.
    alpha: of the margin.
    beta: of the ranks.
  """

  beam: search.Beam
  own: float = 0.1
  pairs: float = 0.2
  alpha: float = 2.0
  beta: float = 1.0


TEACHER = Losses(search.Beam(0))


def stages(hypotheses: int, steps: int, growing: bool) -> list[tuple[int, int]]:
  """Hypotheses and updates of each stage of a search's training.

  Args:
    hypotheses: K of the last stage.
    steps: updates of all.
    growing: whether K doubles from 1 on, with as many updates in every stage
      but for what is left over, which the last one has.

  Returns:
    Pairs, the last stage at the end.
  """
  sizes = [hypotheses]
  while growing and sizes[0] > 1 and len(sizes) < steps:
    sizes.insert(0, -(-sizes[0] // 2))
  each = steps // len(sizes)
  counts = [each] * len(sizes)
  counts[-1] += steps - each * len(sizes)
  return list(zip(sizes, counts))


def loss_of(task: Task, losses: Losses) -> Callable[[Any, Any], Any]:
  """The loss of a batch of windows, a function of (weights, windows)."""

  def loss(weights, batch):
    found = jax.vmap(
      lambda window: search.search(
        weights,
        window,
        task.noise,
        losses.beam,
        alpha=losses.alpha,
        beta=losses.beta,
      )
    )(batch)
    each = found.truth_loss
    if losses.beam.hypotheses:
      each = each + losses.own * found.own_loss
      each = each + losses.pairs * (found.margin + found.rank)
    return jnp.mean(each)

  return loss


def train(
  task: Task,
  losses: Losses,
  *,
  name: str,
  rate: float,
  steps: int,
  chunk: int,
  end: float = 0.1,
  start: Any = None,
  members: int = 1,
  options: harness.Options,
  settings: Any,
) -> harness.Trained:
  """Trains networks for each seed; Adam with a rate that falls by a cosine.

  Args:
    task: what to train on.
    losses: of teacher forcing or of search.
    name: of the run in the workdir.
    rate: of Adam, at first.
    steps: updates.
    chunk: between two records.
    end: share of the rate at the end.
    start: weights with a leading axis of networks; None draws them.
    members: networks of a seed; those of one stand side by side.
    options: seeds and workdir.
    settings: on which the run depends.

  Returns:
    The run.
  """
  falling = optax.cosine_decay_schedule(rate, steps, end)
  solver = optax.chain(
    bj.gradient(loss_of(task, losses)),
    optax.clip_by_global_norm(1.0),
    optax.adam(falling),
  )
  numbers = task.data.looks.shape[-1]

  def init(context):
    if start is not None:
      return context.own
    return network.init(context.key, hidden=task.hidden, looks=numbers)

  return harness.train(
    solver,
    init,
    batch=lambda context: windows.batch(
      context.key, context.data, task.batch, **task.drawn
    ),
    data=jax.tree.map(jnp.asarray, task.data),
    shard=False,
    own=() if start is None else start,
    steps=steps,
    chunk=min(chunk, steps),
    seeds=[
      seed * members + i for seed in options.seeds for i in range(members)
    ],
    workdir=options.workdir,
    name=name,
    save_seconds=options.save_seconds,
    settings=settings,
  )


@functools.lru_cache(maxsize=4)
def _purity(noise, beam):
  """The mean purity of windows, compiled once for networks of one size."""

  def found(weights, held):
    one = lambda window: search.search(weights, window, noise, beam).purity
    return jax.vmap(one)(held).mean()

  return jax.jit(found)


def purities(
  weights: Any,
  task: Task,
  data: detections.Frames,
  *,
  hypotheses: int,
  count: int,
  key: int = 0,
  normalised: bool = False,
) -> np.ndarray:
  """Purity of the best hypothesis on windows, the truth never put in.

  Args:
    weights: leaves (seeds, ...).
    task: as it was trained on.
    data: of the windows.
    hypotheses: of the beam.
    count: windows.
    key: of their draw.
    normalised: whether tracklets are compared by log-probabilities.

  Returns:
    Means over the windows, (seeds,).
  """
  held = windows.batch(
    jax.random.key(key), jax.tree.map(jnp.asarray, data), count, **task.drawn
  )

  beam = search.Beam(hypotheses, reset=False, normalised=normalised)
  found = _purity(task.noise, beam)
  alone = lambda i: jax.tree.map(lambda x: x[i], weights)
  seeds = len(jax.tree.leaves(weights)[0])
  return np.array([float(found(alone(i), held)) for i in range(seeds)])


def fit_noise(
  several: list[detections.Detected],
  *,
  steps: int = 60,
  most: int = 30,
  rng: np.random.Generator,
) -> motion.Noise:
  """Noise of a filter by maximum likelihood on matched detections.

  Args:
    several: detections with identities.
    steps: of a trajectory, at most.
    most: trajectories of a sequence, at most.
    rng: of the choice.

  Returns:
    `motion.Noise`.
  """
  places, gaps = [], []
  for found in several:
    known = np.unique(found.ids[found.ids >= 0])
    for identity in rng.permutation(known)[:most]:
      at = np.flatnonzero(found.ids == identity)[:steps]
      if len(at) < 10:
        continue
      pad = (0, steps - len(at))
      frames = found.boxes.frames[at]
      where = detections.places_of(found.boxes.boxes[at])
      places.append(np.pad(where, (pad, (0, 0)), mode='edge'))
      gaps.append(np.pad(np.diff(frames, prepend=frames[0]), pad))
  if not places:
    return motion.Noise()
  return motion.fit(np.array(places), np.array(gaps))
