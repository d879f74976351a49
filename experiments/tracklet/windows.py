"""Windows to train on: one person over some steps, in all that is detected.

A window starts at a detection of somebody. A step is the next frame, or, now
and then, one up to `longest` frames later, as if nobody had been seen between:
so gaps of all lengths are learnt, and not only those of real occlusions.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from experiments.tracking import detections


class Window(NamedTuple):
  """What happens at the steps of a window, the first detection before them.

  Attributes:
    places: of all detections of the step's frame, (1 + steps, most, 4).
    sure: confidences, (1 + steps, most).
    looks: (1 + steps, most, numbers).
    there: which are detections at all, bool (1 + steps, most).
    same: which are of the window's person, likewise.
    frames: since the step before, (1 + steps,); the first is 0.
    inside: whether the sequence has not ended, bool (1 + steps,).
  """

  places: chex.Array
  sure: chex.Array
  looks: chex.Array
  there: chex.Array
  same: chex.Array
  frames: chex.Array
  inside: chex.Array


def draw(
  key: chex.PRNGKey,
  data: detections.Frames,
  *,
  steps: int,
  jumps: float,
  longest: int,
) -> Window:
  """Draws a window; every sequence is as likely.

  Args:
    key: of the draw.
    data: padded detections.
    steps: behind the first detection.
    jumps: the probability that a step is not the next frame.
    longest: frames of a jump, at most; their logarithm is uniform.

  Returns:
    A `Window`.
  """
  keys = jax.random.split(key, 4)
  sequence = jax.random.randint(keys[0], (), 0, len(data.edges) - 1)
  low, high = data.edges[sequence], data.edges[sequence + 1]
  frame, place = data.starts[jax.random.randint(keys[1], (), low, high)]
  length = jnp.exp(jax.random.uniform(keys[2], (steps,)) * jnp.log(longest))
  far = jax.random.uniform(keys[3], (steps,)) < jumps
  frames = jnp.where(far, jnp.floor(length), 1).astype(jnp.int32)
  at = jnp.concatenate([frame[None], frame + jnp.cumsum(frames)])
  inside = at <= data.last[frame]
  at = jnp.minimum(at, data.last[frame])
  ids = data.ids[at]
  same = ids == data.ids[frame, place]
  # Of the first frame, nothing but the start counts.
  start = jnp.arange(ids.shape[1]) == place
  same = same.at[0].set(start)
  return Window(
    places=data.places[at],
    sure=data.sure[at],
    looks=data.looks[at],
    there=ids > -2,
    same=same,
    frames=jnp.concatenate([jnp.zeros(1), frames.astype(jnp.float32)]),
    inside=inside,
  )


def batch(
  key: chex.PRNGKey, data: detections.Frames, count: int, **drawn
) -> Window:
  """So many windows, leaves (count, ...); see `draw`."""
  keys = jax.random.split(key, count)
  return jax.vmap(lambda k: draw(k, data, **drawn))(keys)
