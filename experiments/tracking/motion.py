r"""Motion of a tracklet: a constant-velocity Kalman filter, and match features.

Each of centre x, y, log width and log height has a position and a velocity,
driven by white acceleration, and is measured with normal noise. Over a gap of d
frames

    P <- F P F^T + a^2 [[d^3/3, d^2/2], [d^2/2, d]],  F = [[1, d], [0, 1]],

and a measurement z of variance R updates by the gain P_11, P_12 over
P_11 + R. Deviations of x and y are in units of the box width and height.

Boxes are centre x, y, log width, log height, of `detections.encode_boxes`. All
functions take numpy or jax arrays with any leading axes: numpy is faster for
the few boxes of a tracker, and training is compiled.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

FEATURES = 15
MAX_MEASUREMENTS = 12  # Cap of their number in the features.


class Noise(NamedTuple):
  """Deviations that the filter assumes; `fit` estimates them.

  Attributes:
    measured: of x, y in sizes, and of log width and height.
    position: of the acceleration of x and y, sizes/frame^1.5.
    size: of the acceleration of log width and height, 1/frame^1.5.
    speed: of the first velocity of x and y, sizes/frame.
    growth: of the first velocity of log width and height, 1/frame.
  """

  measured: float = 0.041
  position: float = 0.019
  size: float = 0.0055
  speed: float = 0.077
  growth: float = 0.005


NOISE = Noise()


class Motion(NamedTuple):
  """Filter state of tracklets, with any leading axes.

  Attributes:
    mean: positions and velocities of the four coordinates, (..., 4, 2).
    variance: P_11, P_12, P_22 of the four, (..., 4, 3).
    last_box: the last measurement, (..., 4).
    gap: frames since then, (...).
    measurements: their number, (...).
    embedding_sum: sum of the embeddings, (..., embedding_size).
  """

  mean: Any
  variance: Any
  last_box: Any
  gap: Any
  measurements: Any
  embedding_sum: Any


def namespace(x: Any) -> Any:
  """The module of an array: numpy or `jax.numpy`."""
  return np if isinstance(x, np.ndarray) else jnp


def _columns(*arrays):
  """Stacks arrays of one shape along a new last axis."""
  if not isinstance(arrays[0], np.ndarray):
    return jnp.stack(arrays, axis=-1)
  # Faster than numpy's stack for a few boxes.
  out = np.empty((*arrays[0].shape, len(arrays)), np.result_type(*arrays))
  for i, x in enumerate(arrays):
    out[..., i] = x
  return out


def _sizes(boxes):
  """Width and height, clipped to avoid overflow."""
  xp = namespace(boxes)  # Its clip is slow for a few boxes.
  return xp.exp(xp.minimum(xp.maximum(boxes[..., 2:], -3), 12))


def units(boxes: Any) -> Any:
  """Width, height, 1, 1: the units of deviations."""
  xp = namespace(boxes)
  size = _sizes(boxes)
  return xp.concatenate([size, xp.ones_like(size)], axis=-1)


def _deviations(position, size, like):
  return namespace(like).asarray((position, position, size, size), like.dtype)


def begin(boxes: Any, embedding: Any, noise: Noise) -> Motion:
  """Starts tracklets from one measurement each.

  Args:
    boxes: (..., 4).
    embedding: (..., embedding_size); the size may be 0.
    noise: of the filter.

  Returns:
    `Motion` with gaps of 0.
  """
  xp = namespace(boxes)
  scale = units(boxes)
  velocity = _deviations(noise.speed, noise.growth, boxes) * scale
  measured = (noise.measured * scale) ** 2
  return Motion(
    mean=_columns(boxes, xp.zeros_like(boxes)),
    variance=_columns(measured, xp.zeros_like(measured), velocity**2),
    last_box=boxes,
    gap=xp.zeros_like(boxes[..., 0]),
    measurements=xp.ones_like(boxes[..., 0]),
    embedding_sum=embedding,
  )


def predict(motion: Motion, frames: Any, noise: Noise) -> Motion:
  """Predicts tracklets some frames ahead.

  Args:
    motion: before.
    frames: their number, (...) or a scalar.
    noise: of the filter.

  Returns:
    `Motion` with gaps that are longer by `frames`.
  """
  xp = namespace(motion.mean)
  d = xp.asarray(frames, motion.mean.dtype)[..., None]
  position, speed = motion.mean[..., 0], motion.mean[..., 1]
  p11, p12, p22 = (motion.variance[..., i] for i in range(3))
  drift = _deviations(noise.position, noise.size, position)
  drift = (drift * units(position)) ** 2
  return motion._replace(
    mean=_columns(position + d * speed, speed + 0 * d),
    variance=_columns(
      p11 + 2 * d * p12 + d * d * p22 + drift * d**3 / 3,
      p12 + d * p22 + drift * d * d / 2,
      p22 + drift * d,
    ),
    gap=motion.gap + d[..., 0],
  )


def update(motion: Motion, boxes: Any, embedding: Any, noise: Noise) -> Motion:
  """Updates tracklets by one measurement each.

  Args:
    motion: predicted for the frame.
    boxes: measured, (..., 4).
    embedding: measured, (..., embedding_size).
    noise: of the filter.

  Returns:
    `Motion` with gaps of 0.
  """
  xp = namespace(boxes)
  p11, p12, p22 = (motion.variance[..., i] for i in range(3))
  measured = (noise.measured * units(motion.mean[..., 0])) ** 2
  total = p11 + measured
  innovation = boxes - motion.mean[..., 0]
  gains = p11 / total, p12 / total
  # Equals 1 - p11 / total, which would cancel after a long gap.
  shrink = measured / total
  return Motion(
    mean=motion.mean + _columns(*(g * innovation for g in gains)),
    variance=_columns(shrink * p11, shrink * p12, p22 - gains[1] * p12),
    last_box=boxes,
    gap=xp.zeros_like(motion.gap),
    measurements=motion.measurements + 1,
    embedding_sum=motion.embedding_sum + embedding,
  )


def innovations(motion: Motion, boxes: Any, noise: Noise) -> tuple[Any, Any]:
  """Innovations of candidates, in units of their expected deviations.

  Args:
    motion: predicted, leading axes (...).
    boxes: candidates of each tracklet, (..., candidates, 4).
    noise: of the filter.

  Returns:
    Normalised innovations, (..., candidates, 4), and expected deviations in
    sizes, (..., 4).
  """
  xp = namespace(boxes)
  centre = motion.mean[..., 0]
  scale = units(centre)
  deviation = xp.sqrt(motion.variance[..., 0] + (noise.measured * scale) ** 2)
  innovation = (boxes - centre[..., None, :]) / deviation[..., None, :]
  return innovation, deviation / scale


def distance(motion: Motion, boxes: Any, noise: Noise) -> Any:
  """Squared Mahalanobis distances of candidates, (..., candidates)."""
  return namespace(boxes).sum(innovations(motion, boxes, noise)[0] ** 2, -1)


def overlap(one: Any, two: Any) -> Any:
  """Intersection over union of boxes (..., 4), which broadcast."""
  xp = namespace(one)
  sizes = [_sizes(p) for p in (one, two)]
  halves = [0.5 * size for size in sizes]
  centres = [p[..., :2] for p in (one, two)]
  low = xp.maximum(*(c - h for c, h in zip(centres, halves)))
  high = xp.minimum(*(c + h for c, h in zip(centres, halves)))
  sides = xp.maximum(high - low, 0)
  common = sides[..., 0] * sides[..., 1]
  areas = [s[..., 0] * s[..., 1] for s in sizes]
  return common / (areas[0] + areas[1] - common)


def features(
  motion: Motion, boxes: Any, confidence: Any, embedding: Any, noise: Noise
) -> Any:
  """Network features of candidates.

  Args:
    motion: predicted, leading axes (...).
    boxes: (..., candidates, 4).
    confidence: (..., candidates).
    embedding: (..., candidates, embedding_size).
    noise: of the filter.

  Returns:
    (..., candidates, `FEATURES`). With embeddings, the embedding and its cosine
    with the tracklet's embedding sum are appended.
  """
  innovation, deviation = innovations(motion, boxes, noise)
  overlaps = overlap(motion.mean[..., 0][..., None, :], boxes)
  last = (motion.last_box[..., None, :], units(motion.last_box)[..., None, :])
  rows = tracklet_features(motion, deviation)[..., None, :]
  total = motion.embedding_sum[..., None, :]
  return pair_features(
    rows, innovation, last, overlaps, boxes, confidence, total, embedding
  )


def tracklet_features(motion: Motion, deviation: Any) -> Any:
  """Features that depend on the tracklet only, (..., 4); see `features`."""
  xp = namespace(deviation)
  # A tracklet may be longer than any training window.
  count = xp.minimum(motion.measurements, MAX_MEASUREMENTS)
  times = _columns(motion.gap, count)
  return xp.concatenate(
    [xp.log(deviation[..., 1:3]), xp.log(1 + times)], axis=-1
  )


def pair_features(
  rows: Any,
  innovation: Any,
  last: tuple[Any, Any],
  overlaps: Any,
  boxes: Any,
  confidence: Any,
  embedding_sum: Any,
  embedding: Any,
) -> Any:
  """Features of pairs of a tracklet and a detection; leading axes broadcast.

  Args:
    rows: output of `tracklet_features`.
    innovation: output of `innovations`.
    last: last boxes of the tracklets, and their `units`.
    overlaps: of detection and prediction.
    boxes: of the detections.
    confidence: of the detections.
    embedding_sum: of the tracklets.
    embedding: of the detections.

  Returns:
    (..., `FEATURES`), with embeddings more; see `features`.
  """
  xp = namespace(innovation)
  moves = 8 * (boxes - last[0]) / last[1]
  moves = xp.concatenate([innovation, moves], axis=-1)
  square = xp.sum(innovation * innovation, axis=-1)
  if rows.shape[:-1] != confidence.shape:
    rows = xp.broadcast_to(rows, confidence.shape + rows.shape[-1:])
  columns = [
    xp.arcsinh(moves),
    _columns(0.1 * xp.minimum(square, 100), overlaps, confidence),
    rows,
  ]
  if embedding.shape[-1]:
    norm = xp.sqrt(xp.sum(embedding_sum**2, -1, keepdims=True) + 1e-6)
    cosine = xp.sum(embedding * (embedding_sum / norm), -1, keepdims=True)
    columns += [cosine, embedding]
  return xp.concatenate(columns, axis=-1)


def first_features(confidence: Any, embedding: Any, noise: Noise) -> Any:
  """Features of a tracklet's first detection, matched with itself.

  Args:
    confidence: (...).
    embedding: (..., embedding_size).
    noise: of the filter; plain numbers, also in compiled code.

  Returns:
    (..., `FEATURES`), with embeddings more; see `features`.
  """
  xp = namespace(confidence)
  zero = xp.zeros_like(confidence)
  deviation = float(np.log(np.sqrt(2) * noise.measured))
  rows = [zero + deviation] * 2 + [zero, zero + float(np.log(2))]
  columns = [_columns(*[zero] * 9, zero + 1, confidence, *rows)]
  if embedding.shape[-1]:
    square = xp.sum(embedding**2, -1, keepdims=True)
    columns += [square / xp.sqrt(square + 1e-6), embedding]
  return xp.concatenate(columns, axis=-1)


def where(mask: Any, one: Motion, two: Motion) -> Motion:
  """Takes the first motion where `mask`, (...), and the second elsewhere."""
  xp = namespace(one.mean)

  def pick(a, b):
    return xp.where(
      mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, b
    )

  return Motion(*(pick(a, b) for a, b in zip(one, two)))


def log_likelihood(
  boxes: np.ndarray, gaps: np.ndarray, noise: Noise
) -> np.ndarray:
  """Log-likelihood of measured trajectories, without constants.

  Args:
    boxes: (trajectories, steps, 4).
    gaps: frames since the previous step, (trajectories, steps); 0 after the
      end.
    noise: of the filter.

  Returns:
    The sum over the steps of each trajectory, (trajectories,).
  """
  empty = np.zeros((len(boxes), 0), boxes.dtype)
  motion, total = begin(boxes[:, 0], empty, noise), np.zeros(len(boxes))
  for step in range(1, boxes.shape[1]):
    inside = gaps[:, step] > 0
    moved = predict(motion, gaps[:, step], noise)
    innovation, deviation = innovations(moved, boxes[:, step, None], noise)
    value = -0.5 * np.sum(innovation[:, 0] ** 2, -1)
    value = value - np.sum(np.log(deviation), -1)
    total += np.where(inside, value, 0)
    after = update(moved, boxes[:, step], empty, noise)
    motion = where(inside, after, motion)
  return total


def fit(boxes: np.ndarray, gaps: np.ndarray, start: Noise = NOISE) -> Noise:
  """Estimates the noise by maximum likelihood, with coordinate search.

  The steps shrink to less than a tenth of a value; trackers are not sensitive
  to finer ones.

  Args:
    boxes: see `log_likelihood`.
    gaps: see `log_likelihood`.
    start: of the search.

  Returns:
    `Noise`.
  """
  best = np.log(np.array(start))
  objective = lambda x: float(
    log_likelihood(boxes, gaps, Noise(*map(float, np.exp(x)))).sum()
  )
  best_value, step = objective(best), 0.7
  while step > 0.05:
    before = best_value
    for i in range(len(best)):
      for sign in (1, -1):
        point = best.copy()
        point[i] += sign * step
        if (value := objective(point)) > best_value:
          best, best_value = point, value
          break
    if best_value <= before:
      step /= 2
  return Noise(*(float(f'{x:.3g}') for x in np.exp(best)))
