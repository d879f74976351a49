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

from experiments.tracking import (
  detections,
  filtering,
  inference,
  mot_files,
  motion,
  network,
)

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


Frame, Candidates = filtering.Frame, filtering.Candidates


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


def make_model(weights: network.Weights, noise: motion.Noise) -> Model:
  """A model from a network, or from the mean score of several, in numpy.

  Args:
    weights: of one network, or of several with a leading axis.
    noise: of the filter.

  Returns:
    A model; its memory is one array, see `inference`.
  """
  networks = inference.Networks(weights, noise)

  def begin(initial, confidence, embedding):
    del initial
    memory, x = networks.begin(confidence, embedding)
    return (memory,), x

  def affinity(candidates, memory):
    return networks.score(memory[0], candidates.track, candidates.features())

  def remember(memory, updates):
    return (networks.remember(memory[0], updates),)

  return Model(noise, affinity, begin, remember)


class Tracks(NamedTuple):
  """Current tracklets; an array's first axis is theirs, except in `state`.

  Attributes:
    state: of the filter, (`filtering.ROWS`, tracklets, 4).
    embedding_sum: sum of the embeddings, (tracklets, embedding_size).
    memory: of the model.
    hits: number of detections.
    ids: from 1; 0 before a tracklet is reported.
    detection: index of the tracklet's detection in this frame, -1 for a miss.
    next_id: the smallest unused identity.
  """

  state: np.ndarray
  embedding_sum: np.ndarray
  memory: tuple[np.ndarray, ...]
  hits: np.ndarray
  ids: np.ndarray
  detection: np.ndarray
  next_id: int = 1

  @property
  def motion(self) -> motion.Motion:
    """The filter's state as `Motion`."""
    return filtering.as_motion(self.state, self.embedding_sum)


class Pairs(NamedTuple):
  """Affinities of predicted tracklets and detections.

  Attributes:
    candidates: the pairs within the gate.
    affinity: (tracklets, detections); `FORBIDDEN` outside the gate.
    updates: memory updates of the pairs within the gate.
  """

  candidates: Candidates
  affinity: np.ndarray
  updates: Any

  @property
  def predicted(self) -> motion.Motion:
    """Motion of the tracklets at the frame."""
    return self.candidates.predicted

  def select(self, tracks: Any, detections: Any) -> Any:
    """Memory updates of some pairs within the gate."""
    flat = np.array(tracks) * self.affinity.shape[1] + detections
    return self.updates[self.candidates.flat.searchsorted(flat)]


def begin(model: Model, frame: Frame) -> Tracks:
  """Starts a tracklet from each detection of a frame."""
  count = len(frame.confidence)
  state = filtering.make(model.noise).measure(frame).begin(np.arange(count))
  initial = filtering.as_motion(state, frame.embedding)
  first = model.begin(initial, frame.confidence, frame.embedding)
  return Tracks(
    state,
    frame.embedding,
    model.remember(*first),
    np.ones(count, np.int64),
    np.zeros(count, np.int64),
    np.arange(count),
  )


def pair(model: Model, tracks: Tracks, frame: Frame, rules: Rules) -> Pairs:
  """Scores all pairs within the gate."""
  kalman = filtering.make(model.noise)
  predicted = kalman.predict(tracks.state, tracks.embedding_sum)
  candidates = Candidates(predicted, kalman.measure(frame), rules.gate)
  affinity = np.empty(candidates.shape)
  affinity.fill(FORBIDDEN)
  if not len(candidates.flat):
    return Pairs(candidates, affinity, None)
  scores, updates = model.affinity(candidates, tracks.memory)
  affinity.put(candidates.flat, scores - rules.min_score)
  return Pairs(candidates, affinity, updates)


def assign(affinity: np.ndarray) -> np.ndarray:
  """The assignment of the largest sum above 0.

  Args:
    affinity: (tracklets, detections).

  Returns:
    The detection of each tracklet, -1 for a miss.
  """
  chosen = np.empty(len(affinity), np.int64)
  chosen.fill(-1)
  one, two = (affinity > 0).nonzero()
  # Without competition, there are no sums to compare.
  if len({*one.tolist()}) < len(one) or len({*two.tolist()}) < len(two):
    one, two = scipy.optimize.linear_sum_assignment(-np.maximum(affinity, 0))
    matched = affinity[one, two] > 0
    one, two = one[matched], two[matched]
  chosen[one] = two
  return chosen


def _unmatched(chosen, count):
  """Indices below `count` that are not chosen."""
  return sorted({*range(count)}.difference(chosen))


def second_pass(
  pairs: Pairs, chosen: np.ndarray, frame: Frame, rules: Rules
) -> np.ndarray:
  """Matches the unmatched within the gate by overlap."""
  if rules.second_overlap > 1:
    return chosen
  free = np.array(_unmatched(chosen.tolist(), len(frame.confidence)), int)
  lost = (chosen < 0).nonzero()[0]
  if not (len(free) and len(lost)):
    return chosen
  at = np.ix_(lost, free)
  gated = pairs.affinity[at] > FORBIDDEN
  overlaps = np.where(gated, pairs.candidates.overlaps[at], 0)
  second = assign(overlaps - rules.second_overlap)
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
  # Lists, which are faster than arrays for the tracklets of a frame.
  every, gaps = chosen.tolist(), pairs.candidates.gaps()
  matched = [i for i, at in enumerate(every) if at >= 0]
  new = _unmatched(every, len(frame.confidence))
  if rules.min_confidence > 0:
    new = [at for at in new if frame.confidence[at] >= rules.min_confidence]
  # Rows: all tracklets before the frame, then the matched, then the new ones.
  order, hits, ids, detection = [], [], [], []
  row = len(every)
  for i, at, hit, name in zip(
    range(row), every, tracks.hits.tolist(), tracks.ids.tolist()
  ):
    if at >= 0:
      order.append(row)
      row, hit = row + 1, hit + 1
    elif hit >= rules.birth and gaps[i] < rules.death:
      order.append(i)
    else:
      continue
    hits.append(hit)
    ids.append(name)
    detection.append(at)
  order += range(row, row + len(new))
  hits += [1] * len(new)
  ids += [0] * len(new)
  detection += new
  next_id = tracks.next_id
  for i, hit in enumerate(hits):
    if not ids[i] and hit >= rules.birth:
      ids[i], next_id = next_id, next_id + 1
  used = [every[i] for i in matched]
  state, embedding_sum, memory = _extend(
    model, tracks, pairs, matched, used, new
  )
  rows = np.array(order, np.int64)
  return Tracks(
    state.take(rows, axis=1),
    embedding_sum.take(rows, axis=0),
    tuple(x.take(rows, axis=0) for x in memory),
    np.array(hits, np.int64),
    np.array(ids, np.int64),
    np.array(detection, np.int64),
    next_id,
  )


def _join(*parts):
  return np.concatenate(parts)


def _extend(model, tracks, pairs, matched, used, new):
  """Appends the matched tracklets, updated, and new ones to all.

  Args:
    model, tracks, pairs: see `advance`.
    matched: tracklets with a detection.
    used: their detections.
    new: detections that start a tracklet.

  Returns:
    State, sum of embeddings and memory; see `Tracks`.
  """
  candidates = pairs.candidates
  before, frame = candidates.before, candidates.frame
  if not (matched or new):
    return before.state, before.embedding_sum, tracks.memory
  states = filtering.make(model.noise).update(candidates, matched, used + new)
  if frame.embedding.shape[1]:
    embedding = frame.embedding[used + new]
    embedding[: len(used)] += before.embedding_sum[matched]
    embedding = _join(before.embedding_sum, embedding)
  else:
    embedding = np.empty((states.shape[1] + len(tracks.hits), 0), np.float32)
  parts = []
  if matched:
    memory = tuple(x.take(matched, axis=0) for x in tracks.memory)
    parts.append((*memory, pairs.select(matched, used)))
  if new:
    first = frame.embedding[new]
    initial = filtering.as_motion(states[:, len(used) :], first)
    memory, updates = model.begin(initial, frame.confidence[new], first)
    parts.append((*memory, updates))
  # One call for matched and new tracklets, since most of its time is overhead.
  *memory, updates = parts[0] if len(parts) == 1 else map(_join, *parts)
  memory = model.remember(tuple(memory), updates)
  return (
    np.concatenate((before.state, states), axis=1),
    embedding,
    tuple(map(_join, tracks.memory, memory)),
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


@inference.OneThread()
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
