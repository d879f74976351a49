"""Trains score networks on histories that the tracker makes with them.

Every `redraw` updates, the tracker runs on parts of the training sequences with
the current networks; a share of each batch are windows of these histories, with
the full weight of the cross entropy. Their length grows in training, from short
parts to whole windows. The optimiser's state and its schedule continue over the
redraws. A part of the run between two redraws is a run of the harness, so the
same command resumes.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import harness
from experiments.tracking import detections, tracker
from experiments.tracklet import learning, rollouts, windows


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """Histories of the tracker to train on.

  Attributes:
    share: share of a batch's windows that are such histories.
    redraw: updates between two runs of the tracker.
    frames: frames of each run.
    rows: windows of each run.
    mixed_share: share of windows with more than one person.
    min_length: steps of the first histories; the last have all of a window.
  """

  share: Annotated[float, harness.Allowed(0, 1)] = 0.5
  redraw: int = 100
  frames: int = 400
  rows: int = 256
  mixed_share: Annotated[float, harness.Allowed(0, 1)] = 0.5
  min_length: int = 4


def draw(
  weights: Any,
  task: learning.Task,
  sequences: list[detections.Detected],
  settings: Rollouts,
  *,
  progress: float,
  rng: np.random.Generator,
) -> rollouts.Windows:
  """Runs the tracker on a part of a random sequence, and cuts windows.

  Args:
    weights: of one network.
    task: training data; `task.data` are the padded sequences.
    sequences: the same detections, in order.
    settings: of the histories.
    progress: share of the training that is done; sets the length.
    rng: of the part and the windows.

  Returns:
    Windows, in frames of `task.data`.
  """
  which = int(rng.integers(len(sequences)))
  detected = sequences[which]
  offset = sum(one.info.length for one in sequences[:which])
  count = min(settings.frames, detected.info.length)
  start = int(rng.integers(detected.info.length - count + 1))
  frames = detected.boxes.frames
  mask = (frames > start) & (frames <= start + count)
  boxes = detected.boxes.where(mask)
  part = detections.Detected(
    boxes._replace(frames=boxes.frames - start),
    detected.ids[mask],
    detected.embedding[mask],
    detected.info._replace(length=count),
  )
  model = tracker.make_model(weights, task.noise)
  recording = rollouts.record(model, part)
  steps = task.window['steps']
  short = min(settings.min_length, steps)
  return rollouts.cut(
    part,
    recording.histories,
    rows=settings.rows,
    steps=steps,
    length=round(short + progress * (steps - short)),
    offset=offset + start,
    mixed_share=settings.mixed_share,
    rng=rng,
  )


def stack(trees: list[Any]) -> Any:
  """Stacks trees of equal shapes along a new first axis."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def make_batch(
  task: learning.Task, settings: Rollouts
) -> Callable[[Any], windows.Window]:
  """Makes a function of a context to windows of true and of own histories."""
  own = round(settings.share * task.batch)

  def batch(context):
    keys = jax.random.split(context.key)
    true = windows.batch(
      keys[0], context.data, max(task.batch - own, 0), **task.window
    )
    rows = jax.random.randint(keys[1], (own,), 0, settings.rows)
    chosen = jax.tree.map(lambda x: x[rows], context.own['windows'])
    drawn = windows.from_histories(context.data, chosen)
    return jax.tree.map(lambda *x: jnp.concatenate(x), true, drawn)

  return batch


def train(
  task: learning.Task,
  run: learning.Run,
  sequences: list[detections.Detected],
  settings: Rollouts,
  *,
  name: str,
  rate: float | np.ndarray,
  steps: int,
  start: Any,
  end: float = 0.01,
) -> harness.Trained:
  """Trains the networks of each seed on true and on own histories.

  Args:
    task: training data.
    run: what all networks have in common.
    sequences: the detections of `task.data`, in order.
    settings: of the histories.
    name: of the run; its parts are in folders `name_000` and so on.
    rate: first learning rate of Adam, or one per network; a cosine schedule.
    steps: updates.
    start: weights with a leading axis of networks.
    end: last learning rate, as a share of the first.

  Returns:
    The trained networks, with the losses and seconds of all parts.
  """
  make = lambda first: learning.make_solver(
    task, learning.Search(0), learning.Schedule(first, steps, end)
  )
  # The state of the part before.
  continued = lambda context: optax.GradientTransformationExtraArgs(
    lambda params: context.own['state'], make(context.hyper['rate']).update
  )
  batch = make_batch(task, settings)
  data = jax.tree.map(jnp.asarray, task.data)
  params, state = start, jax.jit(jax.vmap(make(1.0).init))(start)
  rates = jnp.broadcast_to(jnp.asarray(rate, jnp.float32), len(run.seeds()))
  seeds, parts = run.seeds(), math.ceil(steps / settings.redraw)
  trained = []
  for part in range(parts):
    weights = jax.device_get(params)
    drawn = [
      draw(
        {key: x[i] for key, x in weights.items()},
        task,
        sequences,
        settings,
        progress=part / max(parts - 1, 1),
        rng=np.random.default_rng([seed, part]),
      )
      for i, seed in enumerate(seeds)
    ]
    length = min(settings.redraw, steps - part * settings.redraw)
    one = harness.train(
      continued,
      harness.Task(
        _first_params,
        batch,
        data=data,
        shard=False,
        own={'params': params, 'state': state, 'windows': stack(drawn)},
        hyper={'rate': rates},
      ),
      harness.Training.from_options(
        run.options,
        steps=length,
        chunk=length,
        seeds=seeds,
        name=f'{name}_{part:03d}',
        settings=run.identity,
      ),
    )
    params, state = one.params, one.state
    trained.append((part * settings.redraw, one))
  return _joined(trained)


def _first_params(context):
  return context.own['params']


def _joined(trained: list[tuple[int, harness.Trained]]) -> harness.Trained:
  """The last part, with the history and seconds of all."""
  last = trained[-1][1]
  total = lambda field: sum(getattr(one, field) for _, one in trained)
  return last._replace(
    step=trained[-1][0] + last.step,
    steps=np.concatenate([before + one.steps for before, one in trained]),
    history={
      key: np.concatenate([one.history[key] for _, one in trained])
      for key in last.history
    },
    seconds=total('seconds'),
    compile_seconds=total('compile_seconds'),
  )
