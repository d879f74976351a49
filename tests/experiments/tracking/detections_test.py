"""Simulated detections have the statistics that they say."""

import numpy as np
import pytest

from experiments.tracking import detections, mot_files, scenes


@pytest.fixture(scope='module')
def scene():
  return scenes.make_up(0, length=150, people=10)


def test_misses_noise_and_false_boxes(scene):
  count, length = 40, 250
  # People of four visibilities, side by side.
  seen = np.tile([0.1, 0.2, 0.3, 0.9], count // 4)
  truth = mot_files.make(
    np.repeat(np.arange(1, length + 1), count),
    np.tile(
      np.c_[np.arange(count) * 40.0, np.full((count, 3), 30)], (length, 1)
    ),
    ids=np.tile(np.arange(count), length),
    visibilities=np.tile(seen, length),
  )
  info = mot_files.Info('many', length, 2000, 100, 30)
  detector = detections.Detector(most=0.8, jitter=0.05, false=0.25)
  found = detections.simulate(truth, info, np.random.default_rng(0), detector)
  true = found.ids >= 0
  share = np.bincount(found.ids[true], minlength=count) / length
  for vis, wanted in ((0.1, 0), (0.2, 0.2), (0.3, 0.4), (0.9, 0.8)):
    assert share[seen == vis].mean() == pytest.approx(wanted, abs=0.03)
  assert np.sum(~true) / (count * length) == pytest.approx(0.25, abs=0.02)
  box = found.boxes.boxes[true]
  centre = box[:, 0] + box[:, 2] / 2 - (found.ids[true] * 40 + 15)
  assert centre.std() / 30 == pytest.approx(0.05, rel=0.05)
  assert np.log(box[:, 3] / 30).std() == pytest.approx(0.05, rel=0.05)
  sure = found.boxes.confidences
  clear = true & (found.ids % 4 == 3)
  assert sure[clear].mean() == pytest.approx(0.86, abs=0.02)
  assert sure[~true].mean() == pytest.approx(0.4, abs=0.02)
  false = found.boxes.boxes[~true]
  assert (false[:, 0] >= 0).all() and (false[:, 0] + 30 <= 2000).all()
  assert abs(false[:, 0].mean() - 985) < 40
  assert np.all(np.diff(found.boxes.frames) >= 0)


def test_matching_finds_who_was_simulated(scene):
  found = detections.simulate(scene.truth, scene.info, np.random.default_rng(1))
  ids = detections.match(scene.truth, found.boxes, scene.info.length)
  assert np.mean(ids == found.ids) > 0.97
  far = found.boxes._replace(boxes=found.boxes.boxes + np.array([5e3, 0, 0, 0]))
  assert (detections.match(scene.truth, far, scene.info.length) == -1).all()


@pytest.mark.parametrize(
  ('noise', 'wanted'), [(0.5, 0.999), (1.0, 0.94), (2.0, 0.72), (4.0, 0.57)]
)
def test_looks_tell_people_apart_by_their_noise(scene, noise, wanted):
  detector = detections.Detector(looks=16, noise=noise)
  found = detections.simulate(
    scene.truth, scene.info, np.random.default_rng(2), detector
  )
  np.testing.assert_allclose(np.linalg.norm(found.looks, axis=1), 1, rtol=1e-5)
  area = detections.auc(found, np.random.default_rng(0))
  assert area == pytest.approx(wanted, abs=0.05)


def test_padded_frames_hold_all_detections_once(scene):
  several = [
    detections.simulate(scene.truth, scene.info, np.random.default_rng(i))
    for i in range(2)
  ]
  frames = detections.padded(several, later=3)
  count = len(several[0].ids)
  there = frames.ids > -2
  assert there.sum() == count + len(several[1].ids)
  # In order.
  np.testing.assert_allclose(
    frames.places[there][:count],
    detections.places_of(several[0].boxes.boxes),
    rtol=1e-4,
    atol=1e-2,
  )
  length = scene.info.length
  assert (
    frames.last.tolist() == [length - 1] * length + [2 * length - 1] * length
  )
  one, two = frames.ids[:length], frames.ids[length:]
  assert not np.intersect1d(one[one >= 0], two[two >= 0]).size
  assert frames.edges[-1] == len(frames.starts)
  for i in (0, frames.edges[1] - 1, frames.edges[1], frames.edges[2] - 1):
    frame, place = frames.starts[i]
    later = frames.ids[frame + 1 : frames.last[frame] + 1]
    assert frames.ids[frame, place] >= 0
    assert (later == frames.ids[frame, place]).sum() >= 3


def test_a_made_up_scene_hides_people_behind_others(scene):
  truth = scene.truth
  assert len(truth.frames) == 150 * 10
  assert 0 < truth.visibilities.min() + 1e-9 <= 1
  assert 0.02 < np.mean(truth.visibilities < 0.5) < 0.5
  again = scenes.make_up(0, length=150, people=10)
  np.testing.assert_array_equal(again.truth.boxes, truth.boxes)
