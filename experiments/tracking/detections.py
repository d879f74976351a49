r"""Detections: simulated from true trajectories, matched to them, padded.

A simulated detector sees a person of visibility v with the probability
`most * clip((v - .1) / .4, 0, 1)`; its boxes are off by normal noise, in shares
of width and height and in their logarithms; false ones are Poisson in number,
in proportion to the people of the frame, anywhere in the picture and of the
size of one of them. What is found so is *simulated*, and called so wherever a
number of it stands.

A look is what an appearance network would give: a unit vector an identity, plus
normal noise whose norm is about `noise`, made a unit vector again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize

from experiments.tracking import evaluation, mot_files


class Detector(NamedTuple):
  """What a simulated detector does.

  Attributes:
    most: the probability to see somebody whom nothing hides.
    jitter: deviation of a box, in shares of its size.
    false: false boxes a person in a frame.
    looks: numbers of a look; 0 for none.
    noise: of looks.
  """

  most: float = 0.95
  jitter: float = 0.04
  false: float = 0.10
  looks: int = 0
  noise: float = 1.0


STANDARD = Detector()
HARD = Detector(most=0.75, jitter=0.08, false=0.3)


class Detected(NamedTuple):
  """Detections of a sequence.

  Attributes:
    boxes: `mot_files.Boxes`, without identities.
    ids: true identities, int (boxes,); -1 for a false one.
    looks: (boxes, numbers) float32.
    info: of the sequence.
  """

  boxes: mot_files.Boxes
  ids: np.ndarray
  looks: np.ndarray
  info: mot_files.Info


def people(truth: mot_files.Boxes) -> mot_files.Boxes:
  """The boxes of a truth that are judged: pedestrians not marked by 0."""
  return truth.where(
    (truth.confidences != 0) & (truth.classes == mot_files.PEDESTRIAN)
  )


def simulate(
  truth: mot_files.Boxes,
  info: mot_files.Info,
  rng: np.random.Generator,
  detector: Detector = STANDARD,
) -> Detected:
  """Detections of true trajectories.

  Args:
    truth: boxes with identities and visibilities.
    info: of the sequence: length and size of the picture.
    rng: of all noise.
    detector: what it does.

  Returns:
    `Detected`.
  """
  true = people(truth)
  seen = detector.most * np.clip((true.visibilities - 0.1) / 0.4, 0, 1)
  found = true.where(rng.random(len(seen)) < seen)
  noise = detector.jitter * rng.normal(size=(len(found.ids), 4))
  size = found.boxes[:, 2:]
  centre = found.boxes[:, :2] + size / 2 + noise[:, :2] * size
  size = size * np.exp(noise[:, 2:])
  sure = 0.5 + 0.4 * found.visibilities + 0.1 * rng.normal(size=len(size))

  crowd = np.bincount(true.frames, minlength=info.length + 1)
  count = rng.poisson(detector.false * crowd)
  frames = np.repeat(np.arange(len(count)), count)
  first = np.searchsorted(true.frames, frames)
  model = first + rng.integers(0, np.maximum(crowd[frames], 1))
  other = true.boxes[model, 2:] if len(frames) else np.zeros((0, 2))
  room = np.array([info.width, info.height]) - other
  corner = rng.random((len(frames), 2)) * room
  unsure = 0.4 + 0.15 * rng.normal(size=len(frames))

  ids = np.concatenate([found.ids, np.full(len(frames), -1)])
  looks = _looks(ids, rng, detector)
  all_frames = np.concatenate([found.frames, frames])
  order = np.argsort(all_frames, kind='stable')
  boxes = mot_files.make(
    all_frames[order],
    np.concatenate([np.c_[centre - size / 2, size], np.c_[corner, other]])[
      order
    ],
    confidences=np.clip(np.concatenate([sure, unsure]), 0.05, 1)[order],
  )
  return Detected(boxes, ids[order], looks[order], info)


def _looks(ids, rng, detector):
  numbers = detector.looks
  if not numbers:
    return np.zeros((len(ids), 0), np.float32)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  known, places = np.unique(ids, return_inverse=True)
  own = unit(rng.normal(size=(len(known), numbers)))[places.reshape(-1)]
  # Nobody looks like himself where nobody is.
  own[ids < 0] = unit(rng.normal(size=(np.sum(ids < 0), numbers)))
  noise = rng.normal(size=own.shape) * detector.noise / np.sqrt(numbers)
  return unit(own + noise).astype(np.float32)


def match(
  truth: mot_files.Boxes, boxes: mot_files.Boxes, length: int
) -> np.ndarray:
  """True identities of detections: a best match of overlaps of a half or more.

  Args:
    truth: boxes with identities.
    boxes: detections.
    length: frames.

  Returns:
    int (boxes,); -1 for a detection of nobody.
  """
  true = people(truth)
  ids = np.full(len(boxes.frames), -1, np.int64)
  for rows, theirs in zip(true.by_frame(length), boxes.by_frame(length)):
    if not (len(rows) and len(theirs)):
      continue
    near = evaluation.overlaps(true.boxes[rows], boxes.boxes[theirs])
    near = np.where(near < 0.5, 0, near)
    one, two = scipy.optimize.linear_sum_assignment(-near)
    fine = near[one, two] > 0
    ids[theirs[two[fine]]] = true.ids[rows[one[fine]]]
  return ids


def auc(
  found: Detected, rng: np.random.Generator, pairs: int = 20_000
) -> float:
  """How well looks tell people apart: same pairs above others, by cosine.

  Args:
    found: detections with looks.
    rng: of the pairs.
    pairs: of each kind.

  Returns:
    The area under the curve: .5 for looks that say nothing.
  """
  true = np.flatnonzero(found.ids >= 0)
  order = true[np.argsort(found.ids[true], kind='stable')]
  ids = found.ids[order]
  one = rng.integers(0, len(order), pairs)
  low, high = (
    np.searchsorted(ids, ids[one], side=s) for s in ('left', 'right')
  )
  twin = rng.integers(low, high)
  other = rng.integers(0, len(order), pairs)
  cosine = lambda a, b: np.sum(
    found.looks[order[a]] * found.looks[order[b]], axis=1
  )
  same = cosine(one, twin)[twin != one]
  others = np.sort(cosine(one, other)[ids[one] != ids[other]])
  return float(np.mean(np.searchsorted(others, same)) / len(others))


class Frames(NamedTuple):
  """Detections of several sequences in one row of frames, padded.

  Attributes:
    places: centre x, y in pixels, log width, log height, (frames, most, 4).
    sure: confidences, (frames, most).
    ids: identities, no two sequences have a common one; -1 for a false
      detection, -2 where there is none; int32 (frames, most).
    looks: (frames, most, numbers).
    last: the last frame of a frame's sequence, int32 (frames,).
    starts: where a window may start: frame and place in it, int32 (starts, 2).
    edges: starts of sequence i are edges[i] to edges[i + 1], int32.
  """

  places: np.ndarray
  sure: np.ndarray
  ids: np.ndarray
  looks: np.ndarray
  last: np.ndarray
  starts: np.ndarray
  edges: np.ndarray


def places_of(boxes: np.ndarray) -> np.ndarray:
  """Centres and log sizes of boxes (..., 4)."""
  size = boxes[..., 2:]
  return np.concatenate(
    [boxes[..., :2] + size / 2, np.log(np.maximum(size, 1e-3))], axis=-1
  )


def padded(several: Sequence[Detected], *, later: int = 4) -> Frames:
  """Puts sequences one behind the other, with as many places in every frame.

  Args:
    several: detections of each.
    later: how often somebody is seen again behind the start of a window.

  Returns:
    `Frames`, of numpy arrays.
  """
  total = sum(found.info.length for found in several)
  most = max(
    int(np.bincount(found.boxes.frames, minlength=1).max(initial=1))
    for found in several
  )
  numbers = several[0].looks.shape[1]
  frames = Frames(
    places=np.zeros((total, most, 4), np.float32),
    sure=np.zeros((total, most), np.float32),
    ids=np.full((total, most), -2, np.int32),
    looks=np.zeros((total, most, numbers), np.float32),
    last=np.zeros(total, np.int32),
    starts=np.zeros((0, 2), np.int32),
    edges=np.zeros(0, np.int32),
  )
  begin = above = 0
  starts, edges = [], [0]
  for found in several:
    length = found.info.length
    of = found.boxes.frames - 1
    place = np.arange(len(of)) - np.searchsorted(of, of)
    at = (begin + of, place)
    ids = np.where(found.ids < 0, -1, found.ids + above)
    frames.places[at] = places_of(found.boxes.boxes)
    frames.sure[at] = found.boxes.confidences
    frames.ids[at] = ids
    frames.looks[at] = found.looks
    frames.last[begin : begin + length] = begin + length - 1
    order = np.argsort(ids, kind='stable')
    left = np.searchsorted(ids[order], ids[order], side='right')
    left -= np.arange(len(order)) + 1
    good = np.sort(order[(left >= later) & (ids[order] >= 0)])
    starts.append(np.c_[begin + of, place][good])
    if len(good):
      edges.append(edges[-1] + len(good))
    begin, above = begin + length, above + int(found.ids.max(initial=0)) + 1
  return frames._replace(
    starts=np.concatenate(starts).astype(np.int32),
    edges=np.array(edges, np.int32),
  )
