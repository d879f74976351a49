"""Trains score networks: teacher forcing first, then that or search."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.tracking import detections, motion, network
from experiments.tracklet import search, windows


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


@dataclasses.dataclass(frozen=True)
class Network:
  """Networks of a tracker.

  Attributes:
    hidden: units of the LSTM and of the perceptron.
    members: networks whose scores are averaged; all of them are trained alike.
  """

  hidden: int = 64
  members: int = 2


@dataclasses.dataclass(frozen=True)
class Windows:
  """Windows to train on.

  Attributes:
    window: steps of a window.
    jumps: probability that a step of a window is not the next frame.
    max_gap: frames of such a step, at most.
    batch: windows of an update.
    measured: windows that purities are measured on.
  """

  window: Annotated[int, harness.Allowed(2)] = 16
  jumps: Annotated[float, harness.Allowed(0, 1)] = 0.35
  max_gap: int = 90
  batch: int = 32
  measured: int = 512


@dataclasses.dataclass(frozen=True)
class Search:
  """Search in training, and its losses.

  Attributes:
    hypotheses: K of the search in training.
    candidates: detections that extend a hypothesis, beside null.
    rollout_loss: weight of the cross entropy on the search's histories, those
      that are mostly of the target.
    rank_loss: weight of margin and rank.
    alpha: margin of a tracklet without a right choice.
    beta: margin by the difference of purities.
  """

  hypotheses: int = 4
  candidates: int = 8
  rollout_loss: Annotated[float, harness.Allowed(0)] = 0.1
  rank_loss: Annotated[float, harness.Allowed(0)] = 0.2
  alpha: float = 2.0
  beta: float = 1.0

  def losses(self) -> Losses:
    """Weights of the losses, and the search that they are of."""
    beam = search.Beam(self.hypotheses, self.candidates)
    weights = self.rollout_loss, self.rank_loss, self.alpha, self.beta
    return Losses(beam, *weights)


@dataclasses.dataclass(frozen=True)
class Training:
  """Updates of the networks.

  Attributes:
    pretrain_steps: of teacher forcing, that both ways begin with.
    search_steps: of search then.
    forcing_steps: of teacher forcing in its place; one of search takes as long
      as some five.
    rate: Adam's, at first; falls to a tenth. From there half of it, down to a
      hundredth.
    chunk: between two records.
  """

  pretrain_steps: int = 2_000
  search_steps: int = 400
  forcing_steps: int = 1_500
  rate: float = 2e-3
  chunk: int = 100


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


class Run(NamedTuple):
  """What all networks of a study have in common.

  Attributes:
    options: seeds and workdir.
    identity: settings on which a run depends.
    chunk: updates between two records.
    members: networks of a seed; those of one stand side by side.
  """

  options: harness.Options
  identity: Any
  chunk: int
  members: int = 1

  def seeds(self) -> list[int]:
    """Of all networks."""
    return [
      seed * self.members + i
      for seed in self.options.seeds
      for i in range(self.members)
    ]


def train(
  task: Task,
  run: Run,
  losses: Losses,
  *,
  name: str,
  rate: float,
  steps: int,
  end: float = 0.1,
  start: Any = None,
) -> harness.Trained:
  """Trains networks for each seed; Adam with a rate that falls by a cosine.

  Args:
    task: what to train on.
    run: what all networks have in common.
    losses: of teacher forcing or of search.
    name: of the run in the workdir.
    rate: of Adam, at first.
    steps: updates.
    end: share of the rate at the end.
    start: weights with a leading axis of networks; None draws them.

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
    harness.Task(
      init,
      batch=lambda context: windows.batch(
        context.key, context.data, task.batch, **task.drawn
      ),
      data=jax.tree.map(jnp.asarray, task.data),
      shard=False,
      own=() if start is None else start,
    ),
    harness.Training.from_options(
      run.options,
      steps=steps,
      chunk=min(run.chunk, steps),
      seeds=run.seeds(),
      name=name,
      settings=run.identity,
    ),
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
