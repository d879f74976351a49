"""The filter of `motion` for all tracklets of a frame, in few calls of numpy.

For the few boxes of a frame, the time is the number of calls. So the tracklets
are one array, (`ROWS`, tracklets, 4), whose rows are named below: a prediction
is a product with a constant matrix, and a selection of tracklets one call. The
results are those of `motion` up to rounding.
"""

import functools
from typing import NamedTuple

import numpy as np

from experiments.tracking import motion

# Rows of a state, each for the four coordinates: position, last measurement,
# velocity, variances; factors of the differences to the first two; variances of
# the acceleration and of a measurement.
CENTRE, LAST, SPEED, P11, P12, P22 = range(6)
PER_DEVIATION, PER_UNIT, DRIFT, MEASURED = range(6, 10)
# 1 + the frames since the last measurement, and 1 + the measurements.
COUNTS = 10
ROWS = 11
# A further row of measurements: right, bottom, -left, -top.
_EDGES = ROWS
_LOW, _HIGH = np.float32(-3), np.float32(12)  # Of logarithms of sizes.
_MAX_COUNTS = np.array([np.inf, 1 + motion.MAX_MEASUREMENTS], np.float32)


class Frame(NamedTuple):
  """The detections of a frame; see `detections.Frames`."""

  boxes: np.ndarray
  confidence: np.ndarray
  embedding: np.ndarray


class Measured(NamedTuple):
  """The detections of a frame, prepared.

  Attributes:
    frame: the detections.
    states: states of tracklets that begin with them, (detections, 12, 4), with
      the row of edges.
    areas: in pixels, (detections,).
  """

  frame: Frame
  states: np.ndarray
  areas: np.ndarray

  def begin(self, detections: np.ndarray) -> np.ndarray:
    """States of tracklets that begin, (`ROWS`, tracklets, 4)."""
    return self.states.take(detections, axis=0).transpose(1, 0, 2)[:ROWS]


class Predicted(NamedTuple):
  """Tracklets at a frame, before its detections.

  Attributes:
    state: (`ROWS`, tracklets, 4).
    sizes: predicted width and height, (tracklets, 2).
    deviation: expected deviation of a measurement, (tracklets, 4).
    embedding_sum: sum of the embeddings, (tracklets, embedding_size).
  """

  state: np.ndarray
  sizes: np.ndarray
  deviation: np.ndarray
  embedding_sum: np.ndarray


class Filter:
  """The Kalman filter of `motion` with the constants of its noise."""

  def __init__(self, noise: motion.Noise):
    """Makes the matrices of `measure` and `predict`."""
    # Inputs: box, squared size, 8 / size, size, 1.
    matrix = np.zeros((11, ROWS + 1, 4))
    every = np.arange(4)
    matrix[every, CENTRE, every] = matrix[every, LAST, every] = 1
    for row, position, size in (
      (P11, noise.measured, noise.measured),
      (P22, noise.speed, noise.growth),
    ):
      matrix[(4, 5), row, (0, 1)] = position**2
      matrix[10, row, 2:] = size**2
    matrix[(6, 7), PER_UNIT, (0, 1)] = 1
    matrix[10, PER_UNIT, 2:] = 8
    matrix[10, DRIFT, 2:] = noise.size**2
    matrix[10, MEASURED, 2:] = noise.measured**2
    matrix[10, COUNTS, :2] = 1, 2
    for axis in (0, 1):
      matrix[axis, _EDGES, (axis, 2 + axis)] = 1, -1
      matrix[8 + axis, _EDGES, (axis, 2 + axis)] = 0.5
    self._measure = matrix.reshape(11, -1).astype(np.float32)
    step = np.eye(ROWS)
    step[CENTRE, SPEED] = 1
    step[P11, (P12, P22, DRIFT)] = 2, 1, 1 / 3
    step[P12, (P22, DRIFT)] = 1, 1 / 2
    step[P22, DRIFT] = 1
    self._step = step.astype(np.float32)
    variances = np.array([noise.position, noise.measured]) ** 2
    self._variances = variances.astype(np.float32)[:, None, None]

  def measure(self, frame: Frame) -> Measured:
    """Prepares the detections of a frame."""
    boxes = frame.boxes
    inputs = np.empty((len(boxes), 11), np.float32)
    inputs[:, :4] = boxes
    inputs[:, 10] = 1
    sizes = np.maximum(boxes[:, 2:], _LOW)
    np.minimum(sizes, _HIGH, out=sizes)
    np.exp(sizes, out=sizes)
    inputs[:, 8:10] = sizes
    np.multiply(sizes, sizes, out=inputs[:, 4:6])
    np.divide(8, sizes, out=inputs[:, 6:8])
    states = (inputs @ self._measure).reshape(len(boxes), ROWS + 1, 4)
    return Measured(frame, states, sizes[:, 0] * sizes[:, 1])

  def predict(self, state: np.ndarray, embedding_sum: np.ndarray) -> Predicted:
    """Predicts tracklets one frame ahead; rewrites the rows from `DRIFT`."""
    count = state.shape[1]
    # Before and after the step.
    sizes = np.empty((2, count, 2), np.float32)
    sizes[0] = state[CENTRE, :, 2:]
    np.add(sizes[0], state[SPEED, :, 2:], out=sizes[1])
    np.maximum(sizes, _LOW, out=sizes)
    np.minimum(sizes, _HIGH, out=sizes)
    np.exp(sizes, out=sizes)
    squares = state[DRIFT : MEASURED + 1, :, :2]
    np.multiply(sizes * sizes, self._variances, out=squares)
    after = (self._step @ state.reshape(ROWS, 4 * count)).reshape(state.shape)
    after[COUNTS, :, 0] += 1
    deviation = after[P11] + after[MEASURED]
    np.sqrt(deviation, out=deviation)
    np.divide(1, deviation, out=after[PER_DEVIATION])
    return Predicted(after, sizes[1], deviation, embedding_sum)

  def update(
    self, candidates: 'Candidates', tracks: list[int], detections: list[int]
  ) -> np.ndarray:
    """Updates tracklets, and begins others.

    Args:
      candidates: all tracklets and detections.
      tracks: tracklets with a detection.
      detections: their detections, then the first ones of new tracklets.

    Returns:
      States of the updated and the new tracklets, (`ROWS`, tracklets, 4).
    """
    states = candidates.measured.begin(np.array(detections))
    if tracks:
      own = states[:, : len(tracks)]
      before = candidates.before.state.take(tracks, axis=1)
      total = before[P11] + before[MEASURED]
      gains = before[P11 : P12 + 1] / total
      change = gains * (own[LAST] - before[CENTRE])
      moving = slice(CENTRE, SPEED + 1, SPEED - CENTRE)
      np.add(before[moving], change, out=own[moving])
      # Equals 1 - p11 / total, which would cancel after a long gap.
      shrink = before[MEASURED] / total
      np.multiply(before[P11 : P12 + 1], shrink, out=own[P11 : P12 + 1])
      np.subtract(before[P22], gains[1] * before[P12], out=own[P22])
      np.add(before[COUNTS, :, 1], 1, out=own[COUNTS, :, 1])
    return states


@functools.lru_cache(16)
def make(noise: motion.Noise) -> Filter:
  """Makes the filter of a noise, once."""
  return Filter(noise)


def as_motion(state: np.ndarray, embedding_sum: np.ndarray) -> motion.Motion:
  """Converts a state, (`ROWS`, tracklets, 4), to `Motion`."""
  return motion.Motion(
    mean=state[CENTRE : SPEED + 1 : SPEED - CENTRE].transpose(1, 2, 0),
    variance=state[P11 : P22 + 1].transpose(1, 2, 0),
    last_box=state[LAST],
    gap=state[COUNTS, :, 0] - 1,
    measurements=state[COUNTS, :, 1] - 1,
    embedding_sum=embedding_sum,
  )


class Candidates:
  """Pairs of a tracklet and a detection within its gate.

  Attributes:
    before: tracklets at the frame.
    measured: detections of the frame, prepared.
    frame: detections of the frame.
    shape: numbers of tracklets and detections.
    flat: index of each pair in a table of this shape, int (pairs,), sorted.
    track: tracklet of each pair, int (pairs,).
    detection: detection of each pair, int (pairs,).
  """

  def __init__(self, before: Predicted, measured: Measured, gate: float):
    """Finds the pairs with a squared Mahalanobis distance up to `gate`."""
    state, boxes = before.state, measured.frame.boxes
    self.before, self.measured, self.frame = before, measured, measured.frame
    self.shape = state.shape[1], len(boxes)
    # From the prediction in deviations, and from the last box in its units.
    moves = boxes - state[CENTRE : LAST + 1, :, None]
    moves *= state[PER_DEVIATION : PER_UNIT + 1, :, None]
    # Squared distance, overlap, confidence.
    self._tables = np.empty((3, *self.shape), np.float32)
    np.vecdot(moves[0], moves[0], out=self._tables[0])
    self.flat = (self._tables[0] <= gate).ravel().nonzero()[0]
    self.track, self.detection = np.divmod(self.flat, max(self.shape[1], 1))
    self._moves = moves.reshape(2, -1, 4).take(self.flat, axis=1)

  @functools.cached_property
  def predicted(self) -> motion.Motion:
    """Motion of all tracklets at the frame."""
    return as_motion(self.before.state, self.before.embedding_sum)

  @property
  def innovation(self) -> np.ndarray:
    """Normalised innovation of each pair, (pairs, 4)."""
    return self._moves[0]

  @functools.cached_property
  def deviation(self) -> np.ndarray:
    """Expected deviations of all tracklets, in sizes, (tracklets, 4)."""
    deviation = self.before.deviation.copy()
    deviation[:, :2] /= self.before.sizes
    return deviation

  @functools.cached_property
  def overlaps(self) -> np.ndarray:
    """Overlap of all tracklets and detections, (tracklets, detections)."""
    sizes = self.before.sizes
    centre, half = self.before.state[CENTRE, :, :2], 0.5 * sizes
    edges = np.empty((len(sizes), 1, 4), np.float32)
    np.add(half, centre, out=edges[:, 0, :2])
    np.subtract(half, centre, out=edges[:, 0, 2:])
    edges = np.minimum(edges, self.measured.states[:, _EDGES])
    sides = edges[..., :2] + edges[..., 2:]
    np.maximum(sides, 0, out=sides)
    common = sides[..., 0] * sides[..., 1]
    total = (sizes[:, 0] * sizes[:, 1])[:, None] + self.measured.areas
    total -= common
    return np.divide(common, total, out=common)

  def overlap(self) -> np.ndarray:
    """Overlap of each detection with the prediction, (pairs,)."""
    return self.overlaps.take(self.flat)

  def gaps(self) -> list[float]:
    """Frames since the last detection, of all tracklets."""
    return (self.before.state[COUNTS, :, 0] - 1).tolist()

  def features(self) -> np.ndarray:
    """Features of the pairs, as `motion.features`.

    Returns:
      (pairs, `motion.FEATURES`), with embeddings more.
    """
    track, before, tables = self.track, self.before, self._tables
    embedding = self.frame.embedding
    size = embedding.shape[1]
    count = motion.FEATURES + (size + 1 if size else 0)
    features = np.empty((len(track), count), np.float32)
    moves = features[:, :8].reshape(len(track), 2, 4)
    np.arcsinh(self._moves.transpose(1, 0, 2), out=moves)
    tables[1], tables[2] = self.overlaps, self.frame.confidence
    features[:, 8:11] = tables.reshape(3, -1).take(self.flat, axis=1).T
    square = features[:, 8]
    np.minimum(square, 100, out=square)
    square *= np.float32(0.1)
    # Of the tracklets: deviations of y and the width in sizes, and counts.
    rows = np.empty((self.shape[0], 4), np.float32)
    np.divide(before.deviation[:, 1], before.sizes[:, 1], out=rows[:, 0])
    rows[:, 1] = before.deviation[:, 2]
    np.minimum(before.state[COUNTS, :, :2], _MAX_COUNTS, out=rows[:, 2:])
    features[:, 11:15] = np.log(rows, out=rows).take(track, axis=0)
    if size:
      total = before.embedding_sum
      total = total / np.sqrt(np.sum(total**2, -1, keepdims=True) + 1e-6)
      own = embedding.take(self.detection, axis=0)
      features[:, 15] = np.vecdot(own, total.take(track, axis=0))
      features[:, 16:] = own
    return features
