"""A plain tracker: as `tracker`, by the functions that training compiles."""

from typing import Any, NamedTuple

import numpy as np
import scipy.optimize

from experiments.tracking import motion, network, tracker

FORBIDDEN = tracker.FORBIDDEN


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
  frame: tracker.Frame
  track: np.ndarray
  detection: np.ndarray
  innovation: np.ndarray
  deviation: np.ndarray

  def overlap(self) -> np.ndarray:
    """Overlap of each detection with the prediction, (pairs,)."""
    centre = self.predicted.mean[self.track, :, 0]
    return motion.overlap(centre, self.frame.boxes[self.detection])


def make_model(weights: network.Weights, noise: motion.Noise) -> tracker.Model:
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

  return tracker.Model(noise, affinity, begin, remember)


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


def begin(model: tracker.Model, frame: tracker.Frame) -> Tracks:
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


def pair(
  model: tracker.Model,
  tracks: Tracks,
  frame: tracker.Frame,
  rules: tracker.Rules,
) -> Pairs:
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


def second_pass(
  pairs: Pairs, chosen: np.ndarray, frame: tracker.Frame, rules: tracker.Rules
) -> np.ndarray:
  """Matches the unmatched within the gate by overlap."""
  if rules.second_overlap > 1:
    return chosen
  free = np.setdiff1d(np.arange(len(frame.confidence)), chosen)
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
  model: tracker.Model,
  tracks: Tracks,
  pairs: Pairs,
  chosen: np.ndarray,
  frame: tracker.Frame,
  rules: tracker.Rules,
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
  new = np.setdiff1d(np.arange(len(frame.confidence)), detection)
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


def online(model, detected, rules):
  """Tracks a sequence; returns boxes with identities."""
  frames = tracker.split_frames(detected)
  tracks = begin(model, tracker.Frame(*(x[:0] for x in frames[0])))
  reports = []
  for frame in frames:
    pairs = pair(model, tracks, frame, rules)
    chosen = second_pass(pairs, assign(pairs.affinity), frame, rules)
    tracks = advance(model, tracks, pairs, chosen, frame, rules)
    reports.append(tracker.report(tracks))
  return tracker.as_boxes(detected, reports)
