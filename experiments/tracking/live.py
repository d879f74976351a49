"""A tracker for frames as they come, for instance from a camera.

model, rules = models.load('runs/tracklet/train/quick')
track = live.Tracker(model, rules)
for picture in pictures:
  boxes, confidences, classes = detect(picture)
  for box, identity in zip(*track.update(boxes, confidences, classes)[:2]):
    ...
"""

from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.tracking import detections, inference, tracker

_ONE_CLASS = 1  # Name of the class of boxes without one.


class Tracked(NamedTuple):
  """The tracked boxes of a frame, in the order of the detections.

  Attributes:
    boxes: left, top, width, height in pixels, float (boxes, 4).
    ids: identities, from 1, unique over all classes, int (boxes,).
    confidences: float (boxes,).
    classes: (boxes,).
    detections: index of each box among the detections, int (boxes,).
  """

  boxes: np.ndarray
  ids: np.ndarray
  confidences: np.ndarray
  classes: np.ndarray
  detections: np.ndarray


class Tracker:
  """Tracks detections frame by frame; classes are tracked separately.

  Args:
    model: of the affinities, from `models.load` or of `baselines`.
    rules: of births, matches and deaths.

  Example:
    >>> from experiments.tracking import baselines, motion
    >>> track = Tracker(baselines.overlap(motion.NOISE))
    >>> for frame in range(3):  # A tracklet is reported from the third frame.
    ...   shown = track.update([[10.0 + frame, 20, 30, 60]])
    >>> shown.ids.tolist(), shown.boxes.tolist()
    ([1], [[12.0, 20.0, 30.0, 60.0]])
  """

  def __init__(
    self, model: tracker.Model, rules: tracker.Rules = tracker.RULES
  ):
    self._model, self._rules = model, rules
    self._tracks: dict[Any, tracker.Tracks] = {}
    self._next_id = 1

  def update(
    self,
    boxes: Any,
    confidences: Any = None,
    classes: Any = None,
    embeddings: Any = None,
  ) -> Tracked:
    """Tracks the detections of the next frame.

    Args:
      boxes: left, top, width, height in pixels, (boxes, 4); may be empty.
      confidences: within 0 and 1, (boxes,); None for 1.
      classes: numbers or names, (boxes,); None for a single class.
      embeddings: (boxes, numbers), for a model with embeddings.

    Returns:
      The boxes of reported tracklets.

    Raises:
      UserError: if a box is not finite or has no area, a confidence is not
        within 0 and 1, or the arrays have other lengths.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    count = len(boxes)
    names = [_ONE_CLASS]
    if classes is None:
      classes = np.ones(count, np.int64)
    else:
      classes = np.asarray(classes)
      names = classes.tolist()
    if confidences is None:
      confidences = np.ones(count)
    confidences = np.asarray(confidences)
    if embeddings is None:
      embeddings = np.zeros((count, 0), np.float32)
    embeddings = np.asarray(embeddings, np.float32)
    lengths = {len(confidences), len(classes), len(embeddings)} - {count}
    if lengths:
      raise harness.UserError(
        f'{count} boxes with {lengths.pop()} confidences, classes or '
        'embeddings: give one of each per box.'
      )
    _check(boxes, confidences)
    every = tracker.Frame(
      detections.encode_boxes(boxes).astype(np.float32),
      confidences.astype(np.float32),
      embeddings,
    )
    ids = np.zeros(count, np.int64)
    names = dict.fromkeys([*self._tracks, *names])
    with inference.OneThread():
      for name in names:
        if len(names) == 1:
          ids[:] = self._update(name, every)
          continue
        at = np.flatnonzero(classes == name)
        ids[at] = self._update(name, tracker.Frame(*(x[at] for x in every)))
    rows = ids.nonzero()[0]
    return Tracked(
      boxes[rows], ids[rows], confidences[rows], classes[rows], rows
    )

  def _update(self, name, frame):
    """Tracks the detections of a class; returns their identities, or 0."""
    tracks = self._tracks.get(name)
    if tracks is not None:
      tracks = tracks._replace(next_id=self._next_id)
    tracks = tracker.step(self._model, tracks, frame, self._rules)
    self._tracks[name] = tracks
    self._next_id = max(self._next_id, tracks.next_id)
    ids = np.zeros(len(frame.confidence), np.int64)
    shown, detection = tracker.report(tracks)
    ids[detection] = shown
    return ids


def _check(boxes, confidences):
  """Checks that boxes are finite with an area, and confidences in 0 to 1."""
  if not (np.isfinite(boxes).all() and boxes[:, 2:].min(initial=1) > 0):
    raise harness.UserError(
      'a box is not finite or has no area: boxes are left, top, width and '
      'height in pixels.'
    )
  if not (confidences.min(initial=0) >= 0 and confidences.max(initial=1) <= 1):
    raise harness.UserError(
      'a confidence is not within 0 and 1: rescale the confidences.'
    )
