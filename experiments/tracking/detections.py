r"""Detections: simulated from true trajectories, matched to them, padded.

The simulated detector finds a person of visibility v with probability
`detection_prob * clip((v - 0.1) / 0.4, 0, 1)`. Box centres and log sizes get
normal noise, in shares of the box size. False detections are Poisson in number,
in proportion to the people of the frame, uniform in the picture, and of the
size of one of those people. Numbers from these detections are always labelled
*simulated*.

An embedding stands for the output of an appearance network: a unit vector per
identity, plus normal noise whose norm is about `noise`, normalised again. Three
errors of real detectors and networks are optional: the mean embedding of a
person walks, jitter and noise are correlated in time, and a hidden person's
embedding is partly that of the person in front:

    m_t = (m_{t-1} + walk n_t) / |.|,   e_t = c e_{t-1} + sqrt(1 - c^2) n_t,
    m = (1 - w) m_own + w m_front,      w = mixing (1 - visibility).
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize

from experiments.tracking import evaluation, mot_files


class Detector(NamedTuple):
  """Error rates of a simulated detector.

  Attributes:
    detection_prob: probability to detect a fully visible person.
    jitter: deviation of a box, in shares of its size.
    false_positives: false detections per person and frame.
    embedding_size: numbers in an embedding; 0 for no embeddings.
    noise: of the embeddings, about its norm.
    walk: norm of the steps of a person's mean embedding, per frame.
    mixing: share of the person in front in the embedding of a fully hidden one.
    correlation: shared by jitter and noise of two frames of a person.
  """

  detection_prob: float = 0.95
  jitter: float = 0.04
  false_positives: float = 0.10
  embedding_size: int = 0
  noise: float = 1.0
  walk: float = 0.0
  mixing: float = 0.0
  correlation: float = 0.0


STANDARD = Detector()
HARD = Detector(detection_prob=0.75, jitter=0.08, false_positives=0.3)


class Detected(NamedTuple):
  """Detections of a sequence.

  Attributes:
    boxes: `mot_files.Boxes`, without identities.
    ids: true identities, int (boxes,); -1 for a false detection.
    embedding: float32 (boxes, embedding_size).
    info: of the sequence.
  """

  boxes: mot_files.Boxes
  ids: np.ndarray
  embedding: np.ndarray
  info: mot_files.Info


def pedestrians(truth: mot_files.Boxes) -> mot_files.Boxes:
  """The true boxes that count: pedestrians whose confidence is not 0."""
  return truth.where(
    (truth.confidences != 0) & (truth.classes == mot_files.PEDESTRIAN)
  )


def simulate(
  truth: mot_files.Boxes,
  info: mot_files.Info,
  rng: np.random.Generator,
  detector: Detector = STANDARD,
) -> Detected:
  """Simulates detections of true trajectories.

  Args:
    truth: boxes with identities and visibilities.
    info: of the sequence: length and picture size.
    rng: of all noise.
    detector: its error rates.

  Returns:
    `Detected`.
  """
  true = pedestrians(truth)
  prob = detector.detection_prob * np.clip(
    (true.visibilities - 0.1) / 0.4, 0, 1
  )
  hits = true.where(rng.random(len(prob)) < prob)
  noise = rng.normal(size=(len(hits.ids), 4))
  noise = detector.jitter * _correlated(hits, noise, detector.correlation)
  size = hits.boxes[:, 2:]
  centre = hits.boxes[:, :2] + size / 2 + noise[:, :2] * size
  size = size * np.exp(noise[:, 2:])
  confidence = 0.5 + 0.4 * hits.visibilities
  confidence = confidence + 0.1 * rng.normal(size=len(size))

  people = np.bincount(true.frames, minlength=info.length + 1)
  count = rng.poisson(detector.false_positives * people)
  false_frames = np.repeat(np.arange(len(count)), count)
  first = np.searchsorted(true.frames, false_frames)
  model = first + rng.integers(0, np.maximum(people[false_frames], 1))
  false_size = true.boxes[model, 2:] if len(model) else np.zeros((0, 2))
  room = np.array([info.width, info.height]) - false_size
  corner = rng.random((len(model), 2)) * room
  false_confidence = 0.4 + 0.15 * rng.normal(size=len(model))

  ids = np.concatenate([hits.ids, np.full(len(model), -1)])
  front, hidden = np.full(len(ids), -1), np.zeros(len(ids))
  if detector.mixing:
    front[: len(hits.ids)] = _persons_in_front(hits, true, info.length)
    hidden[: len(hits.ids)] = 1 - hits.visibilities
  embedding = _simulate_embeddings(ids, hits, front, hidden, rng, detector)
  frames = np.concatenate([hits.frames, false_frames])
  order = np.argsort(frames, kind='stable')
  boxes = np.concatenate(
    [np.c_[centre - size / 2, size], np.c_[corner, false_size]]
  )
  confidence = np.concatenate([confidence, false_confidence])
  boxes = mot_files.make(
    frames[order],
    boxes[order],
    confidences=np.clip(confidence, 0.05, 1)[order],
  )
  return Detected(boxes, ids[order], embedding[order], info)


def _by_person(hits: mot_files.Boxes) -> list[np.ndarray]:
  """Indices of the detections of each person, in order of the frames."""
  order = np.argsort(hits.ids, kind='stable')
  edges = np.flatnonzero(np.diff(hits.ids[order])) + 1
  return np.split(order, edges)


def _correlated(hits, noise, correlation):
  """Makes independent noise (hits, n) an autoregression per person."""
  if not correlation:
    return noise
  noise = noise.copy()
  for rows in _by_person(hits):
    for before, after in itertools.pairwise(rows):
      # Over a gap, the correlation of the frames between is multiplied.
      share = correlation ** (hits.frames[after] - hits.frames[before])
      noise[after] *= (1 - share**2) ** 0.5
      noise[after] += share * noise[before]
  return noise


def _persons_in_front(hits, true, length):
  """The person whose true box covers most of each detected person's, or -1."""
  front = np.full(len(hits.ids), -1)
  for rows, own in zip(true.by_frame(length), hits.by_frame(length)):
    if not (len(rows) and len(own)):
      continue
    overlaps = evaluation.overlaps(hits.boxes[own], true.boxes[rows])
    same = hits.ids[own][:, None] == true.ids[rows]
    feet = true.boxes[rows][:, 1] + true.boxes[rows][:, 3]
    own_feet = hits.boxes[own][:, 1] + hits.boxes[own][:, 3]
    behind = feet <= own_feet[:, None]
    overlaps = np.where(same | behind, 0, overlaps)
    best = overlaps.argmax(axis=1)
    covered = overlaps[np.arange(len(own)), best] > 0
    front[own] = np.where(covered, true.ids[rows][best], -1)
  return front


def _simulate_embeddings(ids, hits, front, hidden, rng, detector):
  count = detector.embedding_size
  if not count:
    return np.zeros((len(ids), 0), np.float32)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  identities, index = np.unique(ids, return_inverse=True)
  means = unit(rng.normal(size=(len(identities), count)))
  exact = means[index.reshape(-1)]
  # False detections get random embeddings.
  exact[ids < 0] = unit(rng.normal(size=(np.sum(ids < 0), count)))
  noise = rng.normal(size=exact.shape)
  if detector.walk:
    steps = rng.normal(size=exact.shape) * detector.walk / np.sqrt(count)
    for rows in _by_person(hits):
      for before, after in itertools.pairwise(rows):
        gap = hits.frames[after] - hits.frames[before]
        exact[after] = unit(exact[before] + steps[after] * gap**0.5)
  if detector.mixing:
    known = (front >= 0) & np.isin(front, identities)
    share = detector.mixing * hidden[known, None]
    other = means[np.searchsorted(identities, front[known])]
    exact[known] = (1 - share) * exact[known] + share * other
  noise[: len(hits.ids)] = _correlated(
    hits, noise[: len(hits.ids)], detector.correlation
  )
  noise = noise * detector.noise / np.sqrt(count)
  return unit(exact + noise).astype(np.float32)


def match(
  truth: mot_files.Boxes, boxes: mot_files.Boxes, length: int
) -> np.ndarray:
  """Assigns true identities to detections that overlap a true box by 0.5.

  Args:
    truth: boxes with identities.
    boxes: detections.
    length: frames.

  Returns:
    int (boxes,); -1 for an unmatched detection.
  """
  true = pedestrians(truth)
  ids = np.full(len(boxes.frames), -1, np.int64)
  for true_rows, rows in zip(true.by_frame(length), boxes.by_frame(length)):
    if not (len(true_rows) and len(rows)):
      continue
    overlaps = evaluation.overlaps(true.boxes[true_rows], boxes.boxes[rows])
    overlaps = np.where(overlaps < 0.5, 0, overlaps)
    one, two = scipy.optimize.linear_sum_assignment(-overlaps)
    matched = overlaps[one, two] > 0
    ids[rows[two[matched]]] = true.ids[true_rows[one[matched]]]
  return ids


def auc(
  detected: Detected, rng: np.random.Generator, pairs: int = 20_000
) -> float:
  """Measures how well embeddings identify people, by the ROC area.

  Compares the cosines of pairs of one person with those of pairs of two.

  Args:
    detected: detections with embeddings.
    rng: of the pairs.
    pairs: of each kind.

  Returns:
    The area under the curve; 0.5 for embeddings without information.
  """
  true = np.flatnonzero(detected.ids >= 0)
  order = true[np.argsort(detected.ids[true], kind='stable')]
  ids = detected.ids[order]
  one = rng.integers(0, len(order), pairs)
  low, high = (
    np.searchsorted(ids, ids[one], side=s) for s in ('left', 'right')
  )
  twin = rng.integers(low, high)
  other = rng.integers(0, len(order), pairs)
  cosine = lambda a, b: np.sum(
    detected.embedding[order[a]] * detected.embedding[order[b]], axis=1
  )
  same = cosine(one, twin)[twin != one]
  different = np.sort(cosine(one, other)[ids[one] != ids[other]])
  return float(np.mean(np.searchsorted(different, same)) / len(different))


class Frames(NamedTuple):
  """Detections of several sequences, one after the other, padded by frame.

  Attributes:
    boxes: see `encode_boxes`, (frames, max_detections, 4).
    confidence: (frames, max_detections).
    ids: identities, unique over all sequences; -1 for a false detection, -2 for
      padding; int32 (frames, max_detections).
    embedding: (frames, max_detections, embedding_size).
    last: the last frame of each frame's sequence, int32 (frames,).
    starts: allowed first detections of windows, as frame and index in it,
      int32 (starts, 2).
    edges: starts of sequence i are edges[i] to edges[i + 1], int32.
  """

  boxes: np.ndarray
  confidence: np.ndarray
  ids: np.ndarray
  embedding: np.ndarray
  last: np.ndarray
  starts: np.ndarray
  edges: np.ndarray


def encode_boxes(boxes: np.ndarray) -> np.ndarray:
  """Converts left, top, width, height to centre x, y, log width, log height."""
  size = boxes[..., 2:]
  return np.concatenate(
    [boxes[..., :2] + size / 2, np.log(np.maximum(size, 1e-3))], axis=-1
  )


def pad(sequences: Sequence[Detected], *, min_later: int = 4) -> Frames:
  """Concatenates sequences and pads all frames to one number of detections.

  Args:
    sequences: detections of each.
    min_later: detections of a person after the first one of a window.

  Returns:
    `Frames`, of numpy arrays.
  """
  total = sum(detected.info.length for detected in sequences)
  width = max(
    int(np.bincount(detected.boxes.frames, minlength=1).max(initial=1))
    for detected in sequences
  )
  frames = Frames(
    boxes=np.zeros((total, width, 4), np.float32),
    confidence=np.zeros((total, width), np.float32),
    ids=np.full((total, width), -2, np.int32),
    embedding=np.zeros(
      (total, width, sequences[0].embedding.shape[1]), np.float32
    ),
    last=np.zeros(total, np.int32),
    starts=np.zeros((0, 2), np.int32),
    edges=np.zeros(0, np.int32),
  )
  offset = first_id = 0
  starts, edges = [], [0]
  for detected in sequences:
    length = detected.info.length
    frame = detected.boxes.frames - 1
    index = np.arange(len(frame)) - np.searchsorted(frame, frame)
    at = (offset + frame, index)
    ids = np.where(detected.ids < 0, -1, detected.ids + first_id)
    frames.boxes[at] = encode_boxes(detected.boxes.boxes)
    frames.confidence[at] = detected.boxes.confidences
    frames.ids[at] = ids
    frames.embedding[at] = detected.embedding
    frames.last[offset : offset + length] = offset + length - 1
    order = np.argsort(ids, kind='stable')
    later = np.searchsorted(ids[order], ids[order], side='right')
    later -= np.arange(len(order)) + 1
    allowed = np.sort(order[(later >= min_later) & (ids[order] >= 0)])
    starts.append(np.stack(at, axis=1)[allowed])
    if len(allowed):
      edges.append(edges[-1] + len(allowed))
    offset += length
    first_id += int(detected.ids.max(initial=0)) + 1
  return frames._replace(
    starts=np.concatenate(starts).astype(np.int32),
    edges=np.array(edges, np.int32),
  )
