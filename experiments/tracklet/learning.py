"""Trains score networks: teacher forcing, then more of it or search."""

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


@dataclasses.dataclass(frozen=True)
class Network:
  """Networks of a tracker.

  Attributes:
    hidden: units of the LSTM and of the perceptron.
    members: networks whose scores are averaged, from different first weights.
  """

  hidden: int = 64
  members: int = 2


@dataclasses.dataclass(frozen=True)
class Windows:
  """Windows to train on.

  Attributes:
    window: steps of a window.
    jumps: probability that a step of a window is longer than a frame.
    max_gap: longest step in frames.
    batch: windows of an update.
    measured: windows for the measurement of purities.
  """

  window: Annotated[int, harness.Allowed(2)] = 16
  jumps: Annotated[float, harness.Allowed(0, 1)] = 0.35
  max_gap: int = 90
  batch: int = 32
  measured: int = 512


@dataclasses.dataclass(frozen=True)
class Search:
  """The search in training, and its losses.

  Attributes:
    hypotheses: K of the search in training; 0 is teacher forcing.
    candidates: nearest detections that extend a hypothesis, without null.
    rollout_loss: weight of the cross entropy on the search's own histories with
      a purity of at least 0.5.
    rank_loss: weight of the margin and rank losses.
    alpha: margin of a tracklet without a correct choice.
    beta: margin per difference of purities.
  """

  hypotheses: int = 4
  candidates: int = 8
  rollout_loss: Annotated[float, harness.Allowed(0)] = 0.1
  rank_loss: Annotated[float, harness.Allowed(0)] = 0.2
  alpha: float = 2.0
  beta: float = 1.0


@dataclasses.dataclass(frozen=True)
class Training:
  """Updates of the networks.

  Attributes:
    pretrain_steps: updates of teacher forcing, common to both ways of training.
    search_steps: updates of search after that.
    forcing_steps: updates of teacher forcing after that; one step of search
      takes as long as about five of these.
    rate: first learning rate of Adam in pretraining, which ends at a tenth; the
      second stage starts at half and ends at a hundredth of that.
    chunk: updates between two records.
  """

  pretrain_steps: int = 2_000
  search_steps: int = 400
  forcing_steps: int = 1_500
  rate: float = 2e-3
  chunk: int = 100


class Task(NamedTuple):
  """Training data, and the size of the networks.

  Attributes:
    data: padded detections of the training sequences.
    noise: of the filter.
    hidden: units of a layer.
    window: `steps`, `jumps` and `max_gap` of `windows.draw`.
    batch: windows of an update.
  """

  data: detections.Frames
  noise: motion.Noise
  hidden: int
  window: dict[str, Any]
  batch: int


def make_loss(task: Task, settings: Search) -> Callable[[Any, Any], Any]:
  """Makes the loss of a batch, a function of (weights, windows)."""
  beam = search.Beam(settings.hypotheses, settings.candidates)

  def loss(weights, batch):
    result = jax.vmap(
      lambda window: search.search(
        weights,
        window,
        task.noise,
        beam,
        alpha=settings.alpha,
        beta=settings.beta,
      )
    )(batch)
    each = result.truth_loss
    if beam.hypotheses:
      each = each + settings.rollout_loss * result.rollout_loss
      each = each + settings.rank_loss * (result.margin + result.rank)
    return jnp.mean(each)

  return loss


class Schedule(NamedTuple):
  """A cosine schedule of Adam's learning rate.

  Attributes:
    rate: first rate.
    steps: updates.
    end: last rate, as a share of the first.
  """

  rate: float
  steps: int
  end: float = 0.1


def make_solver(
  task: Task, settings: Search, schedule: Schedule
) -> optax.GradientTransformationExtraArgs:
  """Makes Adam on the loss, with clipped gradients."""
  return optax.chain(
    bj.gradient(make_loss(task, settings)),
    optax.clip_by_global_norm(1.0),
    optax.adam(optax.cosine_decay_schedule(*schedule)),
  )


def tuned(make: Callable[[Any], Any], rate: Any) -> tuple[Any, Any]:
  """Returns a solver and hyperparameters for a rate, or one per network."""
  if np.ndim(rate) == 0:
    return make(rate), ()
  solver = lambda context: make(context.hyper['rate'])
  return solver, {'rate': jnp.asarray(rate, jnp.float32)}


class Run(NamedTuple):
  """What all networks of a study have in common.

  Attributes:
    options: seeds and workdir.
    identity: settings that a run depends on.
    chunk: updates between two records.
    members: networks per seed; those of a seed are adjacent.
  """

  options: harness.Options
  identity: Any
  chunk: int
  members: int = 1

  def seeds(self) -> list[int]:
    """Seeds of all networks."""
    return [
      seed * self.members + i
      for seed in self.options.seeds
      for i in range(self.members)
    ]


def train(
  task: Task,
  run: Run,
  settings: Search,
  *,
  name: str,
  rate: float | np.ndarray,
  steps: int,
  end: float = 0.1,
  start: Any = None,
) -> harness.Trained:
  """Trains the networks of each seed by Adam with a cosine schedule.

  Args:
    task: training data.
    run: what all networks have in common.
    settings: of the search and its losses.
    name: of the run in the workdir.
    rate: first learning rate, or one per network.
    steps: updates.
    end: last learning rate, as a share of the first.
    start: weights with a leading axis of networks; None draws them.

  Returns:
    The trained networks.
  """
  solver, hyper = tuned(
    lambda first: make_solver(task, settings, Schedule(first, steps, end)), rate
  )
  embedding_size = task.data.embedding.shape[-1]

  def init(context):
    if start is not None:
      return context.own
    return network.init(
      context.key, hidden=task.hidden, embedding_size=embedding_size
    )

  return harness.train(
    solver,
    harness.Task(
      init,
      batch=lambda context: windows.batch(
        context.key, context.data, task.batch, **task.window
      ),
      data=jax.tree.map(jnp.asarray, task.data),
      shard=False,
      own=() if start is None else start,
      hyper=hyper,
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
def _mean_purity(noise, beam):
  """Compiles the mean purity over windows, once per network size."""

  def mean(weights, batch):
    one = lambda window: search.search(weights, window, noise, beam).purity
    return jax.vmap(one)(batch).mean()

  return jax.jit(mean)


def measure_purity(
  weights: Any,
  task: Task,
  data: detections.Frames,
  *,
  hypotheses: int,
  count: int,
  key: int = 0,
  normalised: bool = False,
) -> np.ndarray:
  """Measures the purity of the best hypothesis, without resets to the truth.

  Args:
    weights: leaves (networks, ...).
    task: of the training.
    data: of the windows.
    hypotheses: of the beam.
    count: windows.
    key: of their draw.
    normalised: whether tracklets are compared by log-probability.

  Returns:
    Means over the windows, (networks,).
  """
  batch = windows.batch(
    jax.random.key(key), jax.tree.map(jnp.asarray, data), count, **task.window
  )
  beam = search.Beam(hypotheses, reset=False, normalised=normalised)
  mean = _mean_purity(task.noise, beam)
  member = lambda i: jax.tree.map(lambda x: x[i], weights)
  networks = len(jax.tree.leaves(weights)[0])
  return np.array([float(mean(member(i), batch)) for i in range(networks)])


def fit_noise(
  sequences: list[detections.Detected],
  *,
  max_steps: int = 60,
  max_tracks: int = 30,
  rng: np.random.Generator,
) -> motion.Noise:
  """Fits the noise of a filter to matched detections by maximum likelihood.

  Args:
    sequences: detections with identities.
    max_steps: of a trajectory.
    max_tracks: trajectories of a sequence.
    rng: of the choice of trajectories.

  Returns:
    `motion.Noise`.
  """
  boxes, gaps = [], []
  for detected in sequences:
    known = np.unique(detected.ids[detected.ids >= 0])
    for identity in rng.permutation(known)[:max_tracks]:
      at = np.flatnonzero(detected.ids == identity)[:max_steps]
      if len(at) < 10:
        continue
      pad = (0, max_steps - len(at))
      frames = detected.boxes.frames[at]
      encoded = detections.encode_boxes(detected.boxes.boxes[at])
      boxes.append(np.pad(encoded, (pad, (0, 0)), mode='edge'))
      gaps.append(np.pad(np.diff(frames, prepend=frames[0]), pad))
  if not boxes:
    return motion.Noise()
  return motion.fit(np.array(boxes), np.array(gaps))
