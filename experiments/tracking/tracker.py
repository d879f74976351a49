"""An online tracker; `near_online` builds on its steps.

Per frame: predict all tracklets; score the pairs of a tracklet and a detection
within a gate; take the assignment of the largest sum, without pairs below 0;
match the rest within the gate by overlap; start a tracklet from each detection
that is left; end tracklets without a detection for too long. A tracklet is
reported after `birth` consecutive detections.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize

from experiments.tracking import detections, mot_files, motion, network

FORBIDDEN = -1e6  # Affinity of a pair outside the gate.


class Rules(NamedTuple):
  """Thresholds of matches, births and deaths.

  Attributes:
    gate: largest squared Mahalanobis distance of a pair.
    min_score: smallest affinity of a match.
    second_overlap: smallest overlap of the second pass; above 1 for no second
      pass, which was best on the training sequences of MOT17.
    birth: consecutive detections before a tracklet is reported.
    death: frames without a detection that end a tracklet.
    min_confidence: smallest confidence of a detection that starts a tracklet.
  """

  gate: float = 100.0
  min_score: float = 0.0
  second_overlap: float = 2.0
  birth: int = 3
  death: int = 90
  min_confidence: float = 0.0


RULES = Rules()


class Frame(NamedTuple):
  """The detections of a frame; see `detections.Frames`."""

  boxes: np.ndarray
  confidence: np.ndarray
  embedding: np.ndarray


class Model(NamedTuple):
  """Scores how well detections continue tracklets.

  Attributes:
    noise: of the filter.
    affinity: (`Candidates`, memory of the tracklets) to affinities (pairs,), 0
      for indifference, and the memory updates of the pairs.
    begin: (motion, confidence, embedding) of first detections to an empty
      memory, leading axis tracklets, and its updates.
    remember: (memory, updates) to memory.
  """

  noise: motion.Noise
  affinity: Callable[..., tuple[np.ndarray, Any]]
  begin: Callable[..., tuple[tuple[np.ndarray, ...], Any]]
  remember: Callable[..., tuple[np.ndarray, ...]]


class Candidates(NamedTuple):
  """Pairs of a tracklet and a detection within its gate.

  Attributes:
    predicted: motion of all tracklets at the frame.
    frame: all detections.
    track: tracklet of each pair, int (pairs,).
    detection: detection of each pair, int (pairs,).
    innovation: normalised innovation of each pair, (pairs, 4).
    deviation: expected deviations of all tracklets, in sizes, (tracklets, 4).
  """

  predicted: motion.Motion
  frame: Frame
  track: np.ndarray
  detection: np.ndarray
  innovation: np.ndarray
  deviation: np.ndarray

  def overlap(self) -> np.ndarray:
    """Overlap of each detection with the prediction, (pairs,)."""
    centre = self.predicted.mean[self.track, :, 0]
    return motion.overlap(centre, self.frame.boxes[self.detection])


def make_model(weights: network.Weights, noise: motion.Noise) -> Model:
  """A model from a network, or from the mean score of several, in numpy.

  Args:
    weights: of one network, or of several with a leading axis.
    noise: of the filter.

  Returns:
    A model; its memory has the axis of the networks after the tracklets'.
  """
  weights = {name: np.asarray(x) for name, x in weights.items()}
  if weights['embed'].ndim == 2:
    weights = {name: x[None] for name, x in weights.items()}
  # Networks first, then tracklets: one product for all networks.
  weights = {
    name: x[:, None] if x.ndim == 2 else x for name, x in weights.items()
  }
  swap = lambda arrays: tuple(np.swapaxes(x, 0, 1) for x in arrays)

  def begin(initial, confidence, embedding):
    del initial
    features = motion.first_features(confidence, embedding, noise)
    (x,) = swap([network.embed(weights, features)])
    zero = np.zeros_like(x)
    return (zero, zero), x

  def affinity(candidates, memory):
    track, detection = candidates.track, candidates.detection
    predicted, frame = candidates.predicted, candidates.frame
    rows = motion.tracklet_features(predicted, candidates.deviation)
    last = predicted.last_box, motion.units(predicted.last_box)
    features = motion.pair_features(
      rows[track],
      candidates.innovation,
      tuple(x[track] for x in last),
      candidates.overlap(),
      frame.boxes[detection],
      frame.confidence[detection],
      predicted.embedding_sum[track],
      frame.embedding[detection],
    )
    # Once per tracklet, not per pair.
    expected, part = network.tracklet_terms(weights, swap(memory)[0])
    scores, x = network.score_pairs(
      weights, expected[:, track], part[:, track], features
    )
    return scores.mean(axis=0), swap([x])[0]

  def remember(memory, updates):
    return swap(network.remember(weights, *swap([*memory, updates])))

  return Model(noise, affinity, begin, remember)


class Tracks(NamedTuple):
  """Current tracklets; every array has a leading axis of them.

  Attributes:
    motion: filter state.
    memory: of the model.
    hits: number of detections.
    ids: from 1; 0 before a tracklet is reported.
    detection: index of the tracklet's detection in this frame, -1 for a miss.
    next_id: the smallest unused identity.
  """

  motion: motion.Motion
  memory: tuple[np.ndarray, ...]
  hits: np.ndarray
  ids: np.ndarray
  detection: np.ndarray
  next_id: int = 1


class Pairs(NamedTuple):
  """Affinities of predicted tracklets and detections.

  Attributes:
    predicted: motion of the tracklets at the frame.
    affinity: (tracklets, detections); `FORBIDDEN` outside the gate.
    updates: memory updates of the pairs within the gate.
    row: of a pair in `updates`, int (tracklets, detections).
  """

  predicted: motion.Motion
  affinity: np.ndarray
  updates: Any
  row: np.ndarray


def begin(model: Model, frame: Frame) -> Tracks:
  """Starts a tracklet from each detection of a frame."""
  initial = motion.begin(frame.boxes, frame.embedding, model.noise)
  count = len(frame.confidence)
  first = model.begin(initial, frame.confidence, frame.embedding)
  return Tracks(
    initial,
    model.remember(*first),
    np.ones(count, np.int64),
    np.zeros(count, np.int64),
    np.arange(count),
  )


def _join(*parts):
  return np.concatenate(parts)


def pair(model: Model, tracks: Tracks, frame: Frame, rules: Rules) -> Pairs:
  """Scores all pairs within the gate."""
  predicted = motion.predict(tracks.motion, np.float32(1), model.noise)
  innovation, deviation = motion.innovations(
    predicted, frame.boxes[None], model.noise
  )
  distance = np.einsum('ijk,ijk->ij', innovation, innovation)
  at = (distance <= rules.gate).nonzero()
  candidates = Candidates(predicted, frame, *at, innovation[at], deviation)
  scores, updates = model.affinity(candidates, tracks.memory)
  affinity = np.full(distance.shape, FORBIDDEN)
  affinity[at] = scores - rules.min_score
  row = np.zeros(distance.shape, np.int64)
  row[at] = np.arange(len(at[0]))
  return Pairs(predicted, affinity, updates, row)


def assign(affinity: np.ndarray) -> np.ndarray:
  """The assignment of the largest sum above 0.

  Args:
    affinity: (tracklets, detections).

  Returns:
    The detection of each tracklet, -1 for a miss.
  """
  chosen = np.full(len(affinity), -1)
  one, two = scipy.optimize.linear_sum_assignment(-np.maximum(affinity, 0))
  matched = affinity[one, two] > 0
  chosen[one[matched]] = two[matched]
  return chosen


def _unmatched(chosen, count):
  """Indices below `count` that are not chosen."""
  free = np.ones(count, bool)
  free[chosen[chosen >= 0]] = False
  return free.nonzero()[0]


def second_pass(
  pairs: Pairs, chosen: np.ndarray, frame: Frame, rules: Rules
) -> np.ndarray:
  """Matches the unmatched within the gate by overlap."""
  if rules.second_overlap > 1:
    return chosen
  free = _unmatched(chosen, len(frame.confidence))
  lost = (chosen < 0).nonzero()[0]
  if not (len(free) and len(lost)):
    return chosen
  centre = pairs.predicted.mean[lost, :, 0]
  overlaps = motion.overlap(centre[:, None], frame.boxes[free][None])
  gated = pairs.affinity[np.ix_(lost, free)] > FORBIDDEN
  second = assign(np.where(gated, overlaps, 0) - rules.second_overlap)
  chosen = chosen.copy()
  chosen[lost] = np.where(second >= 0, free[second], -1)
  return chosen


def advance(
  model: Model,
  tracks: Tracks,
  pairs: Pairs,
  chosen: np.ndarray,
  frame: Frame,
  rules: Rules,
) -> Tracks:
  """Updates tracklets by their detections, with births and deaths."""
  count, hit = len(chosen), chosen >= 0
  matched = hit.nonzero()[0]
  detection = chosen[matched]
  moved = motion.Motion(*(x[matched] for x in pairs.predicted))
  updated = [
    motion.update(
      moved, frame.boxes[detection], frame.embedding[detection], model.noise
    )
  ]
  memories = [tuple(x[matched] for x in tracks.memory)]
  updates = [pairs.updates[pairs.row[matched, detection]]]
  new = _unmatched(detection, len(frame.confidence))
  new = new[frame.confidence[new] >= rules.min_confidence]
  if len(new):
    boxes, confidence, embedding = (x[new] for x in frame)
    updated.append(motion.begin(boxes, embedding, model.noise))
    memory, first = model.begin(updated[1], confidence, embedding)
    memories.append(memory)
    updates.append(first)
  # One call for matched and new tracklets, since most of its time is overhead.
  memory = model.remember(tuple(map(_join, *memories)), _join(*updates))

  hits = tracks.hits + hit
  born = hits >= rules.birth
  late = pairs.predicted.gap >= rules.death
  alive = (hit | (born & ~late)).nonzero()[0]
  # Rows: all tracklets before the frame, then the matched, then the new ones.
  order = np.arange(count + len(matched) + len(new))
  order[matched] = order[count : count + len(matched)]
  order = _join(order[alive], order[count + len(matched) :])
  hits = _join(hits[alive], np.ones_like(new))
  ids = _join(tracks.ids[alive], np.zeros_like(new))
  named = np.flatnonzero((ids == 0) & (hits >= rules.birth))
  ids[named] = tracks.next_id + np.arange(len(named))
  return Tracks(
    motion.Motion(*(_join(*x)[order] for x in zip(pairs.predicted, *updated))),
    tuple(_join(*x)[order] for x in zip(tracks.memory, memory)),
    hits,
    ids,
    _join(chosen[alive], new),
    tracks.next_id + len(named),
  )


def step(
  model: Model, tracks: Tracks | None, frame: Frame, rules: Rules = RULES
) -> Tracks:
  """Tracks the detections of the next frame; `tracks` is None before the first.

  Args:
    model: of the affinities.
    tracks: after the previous frame.
    frame: detections.
    rules: of births, matches and deaths.

  Returns:
    The tracklets after the frame, for `report`.
  """
  if tracks is None:
    tracks = begin(model, Frame(*(x[:0] for x in frame)))
  pairs = pair(model, tracks, frame, rules)
  chosen = second_pass(pairs, assign(pairs.affinity), frame, rules)
  return advance(model, tracks, pairs, chosen, frame, rules)


def split_frames(detected: detections.Detected) -> list[Frame]:
  """Splits detections by frame, as float32."""
  boxes = detections.encode_boxes(detected.boxes.boxes).astype(np.float32)
  confidence = detected.boxes.confidences.astype(np.float32)
  return [
    Frame(boxes[rows], confidence[rows], detected.embedding[rows])
    for rows in detected.boxes.by_frame(detected.info.length)
  ]


def report(tracks: Tracks) -> tuple[np.ndarray, np.ndarray]:
  """Identities and detections of the reported tracklets of a frame."""
  shown = (tracks.ids > 0) & (tracks.detection >= 0)
  return tracks.ids[shown], tracks.detection[shown]


def as_boxes(
  detected: detections.Detected, reports: list[tuple[np.ndarray, np.ndarray]]
) -> mot_files.Boxes:
  """Converts the reports of all frames to boxes with identities.

  Args:
    detected: detections.
    reports: output of `report` for each frame.

  Returns:
    Boxes.
  """
  rows = detected.boxes.by_frame(detected.info.length)
  index = [row[detection] for row, (_, detection) in zip(rows, reports)]
  none = np.zeros(0, np.int64)
  ids = _join(none, *(ids for ids, _ in reports))
  return detected.boxes.where(_join(none, *index))._replace(ids=ids)


def online(
  model: Model, detected: detections.Detected, rules: Rules = RULES
) -> mot_files.Boxes:
  """Tracks a sequence frame by frame.

  Args:
    model: of the affinities.
    detected: detections.
    rules: of births, matches and deaths.

  Returns:
    Boxes with identities; each frame is reported at once.
  """
  reports, tracks = [], None
  for frame in split_frames(detected):
    tracks = step(model, tracks, frame, rules)
    reports.append(report(tracks))
  return as_boxes(detected, reports)
