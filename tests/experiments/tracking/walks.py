"""Detections of people who walk along a line, for the tests of trackers."""

import numpy as np

from experiments.tracking import baselines, detections, mot_files, motion

MODEL = baselines.overlap(motion.NOISE, min_overlap=0.2)


def walks(*several, length=40):
  """Walks: identity, first frame, last frame, left, pixels/frame."""
  rows = [
    (frame, identity, left + speed * (frame - first), 50, 20, 40)
    for identity, first, last, left, speed in several
    for frame in range(first, last + 1)
  ]
  table = np.array(rows, float).reshape(-1, 6)
  boxes = mot_files.make(table[:, 0], table[:, 2:], ids=table[:, 1])
  info = mot_files.Info('walks', length, 640, 480, 25.0)
  none = np.zeros((len(boxes.frames), 0), np.float32)
  return detections.Detected(boxes, boxes.ids, none, info)
