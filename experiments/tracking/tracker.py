"""A tracker: online, and near-online with some hypotheses of everything.

A frame: all tracklets are moved on; pairs of a tracklet and a detection within
a gate get an affinity; an assignment of the largest sum is taken, pairs below 0
left alone; what is left over within the gate may be matched by overlap; those
still left begin a tracklet; tracklets that have not been seen for too long end.
A tracklet is told from its third detection on, of which none may lack.

Near-online, K states of everything go on side by side. Each is extended by its
best assignment and by those without one of its most doubtful pairs; the K
likeliest stay. A frame is told after a delay, by the best state then, and
states that tell otherwise of that frame are dropped.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize

from experiments.tracking import detections, mot_files, motion, network

NEVER = -1e6  # The affinity of a pair that may not be.


class Rules(NamedTuple):
  """How tracklets begin, go on and end.

  Attributes:
    gate: squared innovations, summed, that a pair may have at most.
    least: affinity of a pair, at least.
    second: overlap of the second pass, more than this; above 1 for none, which
      came out best on the training sequences of MOT17.
    birth: detections in a row until a tracklet is told.
    death: frames without a detection after which it ends.
    sure: confidence of a detection that begins one, at least.
  """

  gate: float = 100.0
  least: float = 0.0
  second: float = 2.0
  birth: int = 3
  death: int = 90
  sure: float = 0.0


RULES = Rules()


class Frame(NamedTuple):
  """The detections of a frame; see `detections.Frames`."""

  places: np.ndarray
  sure: np.ndarray
  looks: np.ndarray


class Model(NamedTuple):
  """What tells how well a detection goes on with a tracklet.

  Attributes:
    noise: of the filter.
    affinity: a function of `Near` and the tracklets' memory to affinities
      (pairs,), 0 for indifference, and what `remember` may want of each pair.
    begin: (motion, sure, looks) of first detections to a memory of nothing,
      leading axis tracklets, and what `remember` wants of them.
    remember: (memory, what `affinity` gave) to memory.
  """

  noise: motion.Noise
  affinity: Callable[..., tuple[np.ndarray, Any]]
  begin: Callable[..., tuple[tuple[np.ndarray, ...], Any]]
  remember: Callable[..., tuple[np.ndarray, ...]]


class Near(NamedTuple):
  """Pairs of a tracklet and a detection within its gate.

  Attributes:
    moved: motion of all tracklets at the frame.
    frame: all detections.
    one: tracklets of the pairs, int (pairs,).
    two: their detections, likewise.
    off: innovations of the pairs over their deviations, (pairs, 4).
    deviation: those of all tracklets, in sizes, (tracklets, 4).
  """

  moved: motion.Motion
  frame: Frame
  one: np.ndarray
  two: np.ndarray
  off: np.ndarray
  deviation: np.ndarray

  def overlap(self) -> np.ndarray:
    """That of the detections with the predictions, (pairs,)."""
    middle = self.moved.mean[self.one, :, 0]
    return motion.overlap(middle, self.frame.places[self.two])


def learned(weights: network.Weights, noise: motion.Noise) -> Model:
  """A network's scores, or the mean of several networks' ones, in numpy.

  Args:
    weights: of a network; of several, with a leading axis of them.
    noise: of the filter.

  Returns:
    A model; what it remembers has that axis behind the tracklets'.
  """
  weights = {name: np.asarray(x) for name, x in weights.items()}
  if weights['embed'].ndim == 2:
    weights = {name: x[None] for name, x in weights.items()}
  # Networks first, then tracklets, so that one product is of all networks.
  weights = {
    name: x[:, None] if x.ndim == 2 else x for name, x in weights.items()
  }
  turned = lambda several: tuple(np.swapaxes(x, 0, 1) for x in several)

  def begin(begun, sure, looks):
    del begun
    seen = motion.at_first(sure, looks, noise)
    (given,) = turned([network.embed(weights, seen)])
    none = np.zeros_like(given)
    return (none, none), given

  def affinity(near, memory):
    one, two, moved, frame = near.one, near.two, near.moved, near.frame
    rows = motion.of_rows(moved, near.deviation)
    last = moved.place, motion.units(moved.place)
    seen = motion.of_pairs(
      rows[one],
      near.off,
      tuple(x[one] for x in last),
      near.overlap(),
      frame.places[two],
      frame.sure[two],
      moved.look[one],
      frame.looks[two],
    )
    # Once for each tracklet, not for each pair.
    expected, part = network.known(weights, turned(memory)[0])
    scores, found = network.of_pairs(
      weights, expected[:, one], part[:, one], seen
    )
    return scores.mean(axis=0), turned([found])[0]

  def remember(memory, given):
    state, cell, found = turned([*memory, given])
    return turned(network.remember(weights, state, cell, found))

  return Model(noise, affinity, begin, remember)


class Tracks(NamedTuple):
  """Tracklets under way; every array has a leading axis of them.

  Attributes:
    motion: where they are.
    memory: what the model remembers.
    hits: detections so far.
    ids: from 1; 0 for those that are not told yet.
    place: of the tracklet's detection in this frame, -1 for none.
    next: identity that is free.
  """

  motion: motion.Motion
  memory: tuple[np.ndarray, ...]
  hits: np.ndarray
  ids: np.ndarray
  place: np.ndarray
  next: int = 1


class Pairs(NamedTuple):
  """Pairs of moved tracklets and detections.

  Attributes:
    moved: motion of the tracklets at the frame.
    affinity: (tracklets, detections); below any for pairs out of the gate.
    given: what the model wants to remember of a pair, by its place there.
    place: of a pair in `given`, int (tracklets, detections).
  """

  moved: motion.Motion
  affinity: np.ndarray
  given: Any
  place: np.ndarray


def begin(model: Model, frame: Frame) -> Tracks:
  """A tracklet for each detection of a frame."""
  begun = motion.begin(frame.places, frame.looks, model.noise)
  count = len(frame.sure)
  return Tracks(
    begun,
    model.remember(*model.begin(begun, frame.sure, frame.looks)),
    np.ones(count, np.int64),
    np.zeros(count, np.int64),
    np.arange(count),
  )


def _join(*parts):
  return np.concatenate(parts)


def _take(motions, which):
  return motion.Motion(*(x[which] for x in motions))


def pair(model: Model, tracks: Tracks, frame: Frame, rules: Rules) -> Pairs:
  """Affinities of all pairs within the gate."""
  moved = motion.predict(tracks.motion, np.float32(1), model.noise)
  off, deviation = motion.innovations(moved, frame.places[None], model.noise)
  far = np.einsum('ijk,ijk->ij', off, off)
  one, two = (far <= rules.gate).nonzero()
  near = Near(moved, frame, one, two, off[one, two], deviation)
  found, given = model.affinity(near, tracks.memory)
  affinity = np.full(far.shape, NEVER)
  affinity[one, two] = found - rules.least
  place = np.zeros(far.shape, np.int64)
  place[one, two] = np.arange(len(one))
  return Pairs(moved, affinity, given, place)


def assign(affinity: np.ndarray) -> np.ndarray:
  """Detections of tracklets, -1 for none: the largest sum above 0."""
  chosen = np.full(len(affinity), -1)
  one, two = scipy.optimize.linear_sum_assignment(-np.maximum(affinity, 0))
  fine = affinity[one, two] > 0
  chosen[one[fine]] = two[fine]
  return chosen


def _left_over(chosen, count):
  """Those of so many that are not among the chosen."""
  free = np.ones(count, bool)
  free[chosen[chosen >= 0]] = False
  return free.nonzero()[0]


def second_pass(
  pairs: Pairs, chosen: np.ndarray, frame: Frame, rules: Rules
) -> np.ndarray:
  """Matches what is left over, the largest sum of overlaps above `second`."""
  if rules.second > 1:
    return chosen
  free = _left_over(chosen, len(frame.sure))
  left = (chosen < 0).nonzero()[0]
  if not (len(free) and len(left)):
    return chosen
  middle = pairs.moved.mean[left, :, 0]
  near = motion.overlap(middle[:, None], frame.places[free][None])
  near = np.where(pairs.affinity[np.ix_(left, free)] > NEVER, near, 0)
  chosen = chosen.copy()
  also = assign(near - rules.second)
  chosen[left] = np.where(also >= 0, free[also], -1)
  return chosen


def advance(
  model: Model,
  tracks: Tracks,
  pairs: Pairs,
  chosen: np.ndarray,
  frame: Frame,
  rules: Rules,
) -> Tracks:
  """Tracklets after a frame, with births and deaths."""
  count, matched = len(chosen), chosen >= 0
  seen = matched.nonzero()[0]
  theirs = chosen[seen]
  fresh = [
    motion.update(
      _take(pairs.moved, seen),
      frame.places[theirs],
      frame.looks[theirs],
      model.noise,
    )
  ]
  known = [tuple(x[seen] for x in tracks.memory)]
  given = [pairs.given[pairs.place[seen, theirs]]]
  rest = _left_over(theirs, len(frame.sure))
  rest = rest[frame.sure[rest] >= rules.sure]
  if len(rest):  # Often nobody is born.
    places, sure, looks = (x[rest] for x in frame)
    fresh.append(motion.begin(places, looks, model.noise))
    none, first = model.begin(fresh[1], sure, looks)
    known.append(none)
    given.append(first)
  # What is born is remembered in the same call: most of its time is overhead.
  memory = model.remember(tuple(map(_join, *known)), _join(*given))

  hits = tracks.hits + matched
  told = hits >= rules.birth
  ids, free = tracks.ids.copy(), tracks.next
  new = (told & (ids == 0)).nonzero()[0]
  ids[new] = free + np.arange(len(new))
  late = pairs.moved.gap >= rules.death
  alive = (matched | (told & ~late)).nonzero()[0]
  # Rows of those before, then of those seen, then of those born.
  order = np.arange(count + len(seen) + len(rest))
  order[seen] = order[count : count + len(seen)]
  order = _join(order[alive], order[count + len(seen) :])
  tracks = Tracks(
    motion.Motion(*(_join(*x)[order] for x in zip(pairs.moved, *fresh))),
    tuple(_join(*x)[order] for x in zip(tracks.memory, memory)),
    _join(hits[alive], np.ones_like(rest)),
    _join(ids[alive], np.zeros_like(rest)),
    _join(chosen[alive], rest),
    free + len(new),
  )
  if rules.birth > 1:
    return tracks
  ids = tracks.ids.copy()
  new = np.flatnonzero(ids == 0)
  ids[new] = tracks.next + np.arange(len(new))
  return tracks._replace(ids=ids, next=tracks.next + len(new))


def frames_of(found: detections.Detected) -> list[Frame]:
  """The detections of each frame, as float32."""
  places = detections.places_of(found.boxes.boxes).astype(np.float32)
  sure = found.boxes.confidences.astype(np.float32)
  return [
    Frame(places[rows], sure[rows], found.looks[rows])
    for rows in found.boxes.by_frame(found.info.length)
  ]


def result(
  found: detections.Detected, told: list[tuple[np.ndarray, np.ndarray]]
) -> mot_files.Boxes:
  """Boxes with identities, from identities and places of every frame.

  Args:
    found: detections.
    told: identities, and which detections of the frame they are, by frame.

  Returns:
    Boxes.
  """
  rows = found.boxes.by_frame(found.info.length)
  at = [row[place] for row, (_, place) in zip(rows, told)]
  at = np.concatenate([np.zeros(0, np.int64), *at])
  ids = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in told)])
  return found.boxes.where(at)._replace(ids=ids)


def told_of(tracks: Tracks) -> tuple[np.ndarray, np.ndarray]:
  """Identities and detections of a frame, of the tracklets that are told."""
  shown = (tracks.ids > 0) & (tracks.place >= 0)
  return tracks.ids[shown], tracks.place[shown]


def online(
  model: Model,
  found: detections.Detected,
  rules: Rules = RULES,
) -> mot_files.Boxes:
  """Tracks a sequence frame by frame.

  Args:
    model: of the affinities.
    found: detections.
    rules: of births, matches and deaths.

  Returns:
    Boxes with identities: of every frame what was known in it.
  """
  told, tracks = [], None
  for frame in frames_of(found):
    if tracks is None:
      empty = Frame(*(x[:0] for x in frame))
      tracks = begin(model, empty)
    pairs = pair(model, tracks, frame, rules)
    chosen = assign(pairs.affinity)
    chosen = second_pass(pairs, chosen, frame, rules)
    tracks = advance(model, tracks, pairs, chosen, frame, rules)
    told.append(told_of(tracks))
  return result(found, told)
