"""Training windows: one person over some steps, among all detections.

A window starts at a detection of its target. A step is the next frame or, at
random, up to `max_gap` frames later, as if the target had been missed between.
So training sees gaps of all lengths, not only those of real occlusions.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from experiments.tracking import detections


class Window(NamedTuple):
  """Detections at the steps of a window; step 0 has the first detection.

  Attributes:
    boxes: of the step's frame, (1 + steps, max_detections, 4).
    confidence: (1 + steps, max_detections).
    embedding: (1 + steps, max_detections, embedding_size).
    valid: which are detections, not padding, bool (1 + steps, max_detections).
    is_target: which are of the target, bool (1 + steps, max_detections).
    is_chosen: which the history continues with, the same shape; the target's,
      except in histories of a tracker.
    gaps: frames since the previous step, (1 + steps,); the first is 0.
    inside: whether the step is within the sequence, bool (1 + steps,).
  """

  boxes: chex.Array
  confidence: chex.Array
  embedding: chex.Array
  valid: chex.Array
  is_target: chex.Array
  is_chosen: chex.Array
  gaps: chex.Array
  inside: chex.Array


def draw(
  key: chex.PRNGKey,
  data: detections.Frames,
  *,
  steps: int,
  jumps: float,
  max_gap: int,
) -> Window:
  """Draws a window; all sequences are equally likely.

  Args:
    key: of the draw.
    data: padded detections.
    steps: after the first detection.
    jumps: probability that a step is longer than a frame.
    max_gap: longest step in frames; log-uniform.

  Returns:
    A `Window`.
  """
  keys = jax.random.split(key, 4)
  sequence = jax.random.randint(keys[0], (), 0, len(data.edges) - 1)
  low, high = data.edges[sequence], data.edges[sequence + 1]
  frame, index = data.starts[jax.random.randint(keys[1], (), low, high)]
  length = jnp.exp(jax.random.uniform(keys[2], (steps,)) * jnp.log(max_gap))
  jump = jax.random.uniform(keys[3], (steps,)) < jumps
  gaps = jnp.where(jump, jnp.floor(length), 1).astype(jnp.int32)
  at = jnp.concatenate([frame[None], frame + jnp.cumsum(gaps)])
  inside = at <= data.last[frame]
  at = jnp.minimum(at, data.last[frame])
  ids = data.ids[at]
  is_target = ids == data.ids[frame, index]
  # Step 0 has one target detection only.
  is_target = is_target.at[0].set(jnp.arange(ids.shape[1]) == index)
  return Window(
    boxes=data.boxes[at],
    confidence=data.confidence[at],
    embedding=data.embedding[at],
    valid=ids > -2,
    is_target=is_target,
    is_chosen=is_target,
    gaps=jnp.concatenate([jnp.zeros(1), gaps.astype(jnp.float32)]),
    inside=inside,
  )


def batch(
  key: chex.PRNGKey, data: detections.Frames, count: int, **options
) -> Window:
  """Draws windows, leaves (count, ...); see `draw` for the options."""
  keys = jax.random.split(key, count)
  return jax.vmap(lambda k: draw(k, data, **options))(keys)


def from_histories(data: detections.Frames, rows: Any) -> Window:
  """Makes windows from histories of a tracker.

  The target of a step is the last person of the history before it, also after a
  false detection; none in a history of false detections.

  Args:
    data: padded detections.
    rows: `rollouts.Windows`, leaves (rows, ...).

  Returns:
    A `Window`, leaves (rows, ...).
  """
  frames, index = rows.frames, rows.index
  steps = jnp.arange(frames.shape[1])
  ids = data.ids[frames]
  row = jnp.arange(len(frames))[:, None]
  own = jnp.where(index >= 0, data.ids[frames, jnp.maximum(index, 0)], -1)
  last = jax.lax.cummax(jnp.where(own >= 0, steps, -1), axis=1)
  persons = jnp.where(last >= 0, own[row, last], -1)
  # The first step's target is its detection.
  persons = jnp.concatenate([persons[:, :1], persons[:, :-1]], axis=1)
  persons = persons[..., None]
  is_chosen = jnp.arange(ids.shape[2]) == index[..., None]
  is_target = (ids == persons) & (persons >= 0)
  gaps = jnp.diff(frames, axis=1, prepend=frames[:, :1])
  return Window(
    boxes=data.boxes[frames],
    confidence=data.confidence[frames],
    embedding=data.embedding[frames],
    valid=ids > -2,
    is_target=is_target.at[:, 0].set(is_chosen[:, 0]),
    is_chosen=is_chosen,
    gaps=gaps.astype(jnp.float32),
    inside=steps <= rows.count[:, None],
  )
