"""Frames as they come: the same identities as of a whole sequence."""

import numpy as np
import pytest

from experiments import harness
from experiments.tracking import baselines, live, motion, tracker
from tests.experiments.tracking.walks import MODEL, walks

CROSSING = ((1, 1, 40, 100, 4), (2, 1, 40, 260, -4), (3, 5, 30, 10, 2))


def frames(detected):
  rows = detected.boxes.by_frame(detected.info.length)
  return [
    (detected.boxes.boxes[r], detected.boxes.confidences[r]) for r in rows
  ]


def test_frames_give_the_identities_of_the_sequence():
  detected = walks(*CROSSING)
  model = baselines.likelihood(motion.NOISE, match_score=25.0)
  expected = tracker.online(model, detected)
  track = live.Tracker(model)
  shown = [track.update(*frame) for frame in frames(detected)]
  ids = np.concatenate([one.ids for one in shown])
  boxes = np.concatenate([one.boxes for one in shown])
  order = np.lexsort((expected.ids, expected.frames))
  at = np.repeat(np.arange(len(shown)), [len(one.ids) for one in shown])
  own = np.lexsort((ids, at))
  np.testing.assert_array_equal(ids[own], expected.ids[order])
  np.testing.assert_array_equal(boxes[own], expected.boxes[order])


def test_classes_do_not_exchange_identities():
  """A car and a person at the same place are two tracklets."""
  track, seen = live.Tracker(MODEL), set()
  for frame in range(12):
    kind = 'car' if frame % 2 else 'person'
    boxes = [[100.0, 100, 30, 60], [400.0, 100, 30, 60]]
    shown = track.update(boxes, classes=[kind, 'person'])
    seen |= set(zip(shown.classes.tolist(), shown.ids.tolist()))
    np.testing.assert_array_equal(
      shown.boxes, np.array(boxes)[shown.detections]
    )
  kinds = {kind for kind, _ in seen}
  assert kinds <= {'car', 'person'}
  # An identity belongs to one class.
  assert len({identity for _, identity in seen}) == len(seen)


def test_empty_frames_end_tracklets():
  track = live.Tracker(MODEL, tracker.Rules(birth=1, death=3))
  first = track.update([[0.0, 0, 10, 10]])
  for _ in range(5):
    assert not len(track.update([]).ids)
  again = track.update([[0.0, 0, 10, 10]])
  assert (first.ids.tolist(), again.ids.tolist()) == ([1], [2])


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (([[0, 0, 0, 5]],), 'no area'),
    (([[0, 0, np.nan, 5]],), 'no area'),
    (([[0, 0, 5, 5]], [80.0]), 'within 0 and 1'),
    (([[0, 0, 5, 5]], [0.5, 0.5]), '1 boxes with 2'),
    (([[0, 0, 5, 5]], None, ['a', 'b']), '1 boxes with 2'),
  ],
)
def test_refuses_invalid_detections(arguments, message):
  with pytest.raises(harness.UserError, match=message):
    live.Tracker(MODEL).update(*arguments)
