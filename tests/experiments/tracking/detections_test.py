"""Simulated detections have the documented statistics."""

import numpy as np
import pytest

from experiments.tracking import detections, mot_files, scenes


@pytest.fixture(scope='module')
def scene():
  return scenes.make_up(0, length=150, people=10)


def test_misses_noise_and_false_boxes(scene):
  count, length = 40, 250
  # People of four visibilities, next to each other.
  visible = np.tile([0.1, 0.2, 0.3, 0.9], count // 4)
  truth = mot_files.make(
    np.repeat(np.arange(1, length + 1), count),
    np.tile(
      np.c_[np.arange(count) * 40.0, np.full((count, 3), 30)], (length, 1)
    ),
    ids=np.tile(np.arange(count), length),
    visibilities=np.tile(visible, length),
  )
  info = mot_files.Info('many', length, 2000, 100, 30)
  detector = detections.Detector(
    detection_prob=0.8, jitter=0.05, false_positives=0.25
  )
  detected = detections.simulate(
    truth, info, np.random.default_rng(0), detector
  )
  true = detected.ids >= 0
  share = np.bincount(detected.ids[true], minlength=count) / length
  for vis, wanted in ((0.1, 0), (0.2, 0.2), (0.3, 0.4), (0.9, 0.8)):
    assert share[visible == vis].mean() == pytest.approx(wanted, abs=0.03)
  assert np.sum(~true) / (count * length) == pytest.approx(0.25, abs=0.02)
  box = detected.boxes.boxes[true]
  centre = box[:, 0] + box[:, 2] / 2 - (detected.ids[true] * 40 + 15)
  assert centre.std() / 30 == pytest.approx(0.05, rel=0.05)
  assert np.log(box[:, 3] / 30).std() == pytest.approx(0.05, rel=0.05)
  confidence = detected.boxes.confidences
  clear = true & (detected.ids % 4 == 3)
  assert confidence[clear].mean() == pytest.approx(0.86, abs=0.02)
  assert confidence[~true].mean() == pytest.approx(0.4, abs=0.02)
  false = detected.boxes.boxes[~true]
  assert (false[:, 0] >= 0).all() and (false[:, 0] + 30 <= 2000).all()
  assert abs(false[:, 0].mean() - 985) < 40
  assert np.all(np.diff(detected.boxes.frames) >= 0)


def test_matching_recovers_the_simulated_identities(scene):
  detected = detections.simulate(
    scene.truth, scene.info, np.random.default_rng(1)
  )
  ids = detections.match(scene.truth, detected.boxes, scene.info.length)
  assert np.mean(ids == detected.ids) > 0.97
  far = detected.boxes._replace(
    boxes=detected.boxes.boxes + np.array([5e3, 0, 0, 0])
  )
  assert (detections.match(scene.truth, far, scene.info.length) == -1).all()


@pytest.mark.parametrize(
  ('noise', 'wanted'), [(0.5, 0.999), (1.0, 0.94), (2.0, 0.72), (4.0, 0.57)]
)
def test_embeddings_identify_people_by_their_noise(scene, noise, wanted):
  detector = detections.Detector(embedding_size=16, noise=noise)
  detected = detections.simulate(
    scene.truth, scene.info, np.random.default_rng(2), detector
  )
  np.testing.assert_allclose(
    np.linalg.norm(detected.embedding, axis=1), 1, rtol=1e-5
  )
  area = detections.auc(detected, np.random.default_rng(0))
  assert area == pytest.approx(wanted, abs=0.05)


def test_padded_frames_have_all_detections_once(scene):
  several = [
    detections.simulate(scene.truth, scene.info, np.random.default_rng(i))
    for i in range(2)
  ]
  frames = detections.pad(several, min_later=3)
  count = len(several[0].ids)
  valid = frames.ids > -2
  assert valid.sum() == count + len(several[1].ids)
  # In order.
  np.testing.assert_allclose(
    frames.boxes[valid][:count],
    detections.encode_boxes(several[0].boxes.boxes),
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
    frame, index = frames.starts[i]
    later = frames.ids[frame + 1 : frames.last[frame] + 1]
    assert frames.ids[frame, index] >= 0
    assert (later == frames.ids[frame, index]).sum() >= 3


def test_a_made_up_scene_hides_people_behind_others(scene):
  truth = scene.truth
  assert len(truth.frames) == 150 * 10
  assert 0 < truth.visibilities.min() + 1e-9 <= 1
  assert 0.02 < np.mean(truth.visibilities < 0.5) < 0.5
  again = scenes.make_up(0, length=150, people=10)
  np.testing.assert_array_equal(again.truth.boxes, truth.boxes)


def test_noise_is_correlated_in_time_and_embeddings_walk_and_mix(scene):
  """Against closed forms: correlation, growth of a walk, share of the front."""
  length = 4000
  # Person 2 stands behind person 1; person 3 is apart.
  boxes = np.array([[100, 50, 40, 100], [110, 40, 40, 100], [400, 50, 40, 100]])
  truth = mot_files.make(
    np.repeat(np.arange(1, length + 1), 3),
    np.tile(boxes, (length, 1)),
    ids=np.tile([1, 2, 3], length),
    visibilities=np.tile([1.0, 0.6, 1.0], length),
  )
  info = mot_files.Info('three', length, 640, 480, 30)
  base = detections.Detector(1.0, 0.05, 0.0, embedding_size=8, noise=0.5)

  def simulated(**changes):
    found = detections.simulate(
      truth, info, np.random.default_rng(0), base._replace(**changes)
    )
    return [
      (found.boxes.boxes[found.ids == i], found.embedding[found.ids == i])
      for i in (1, 2, 3)
    ]

  def lag(x, by=1):
    x = x - x.mean(axis=0)
    return np.mean(x[by:] * x[:-by]) / np.mean(x * x)

  plain, correlated = simulated(), simulated(correlation=0.8)
  for one, two in zip(plain, correlated):
    assert abs(lag(one[0][:, 2])) < 0.06 and abs(lag(one[1])) < 0.06
    assert lag(two[0][:, 2]) == pytest.approx(0.8, abs=0.06)
    assert lag(two[0][:, 2], 3) == pytest.approx(0.8**3, abs=0.1)
    assert lag(two[1]) == pytest.approx(0.8, abs=0.06)
    # Its size stays.
    assert two[0][:, 2].std() == pytest.approx(one[0][:, 2].std(), rel=0.15)
  # A fifth of the front's embedding: 0.5 (1 - 0.6).
  mixed = simulated(mixing=0.5, noise=1e-6)
  exact = simulated(noise=1e-6)
  wanted = 0.8 * exact[1][1] + 0.2 * exact[0][1]
  wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
  np.testing.assert_allclose(mixed[1][1], wanted, atol=1e-4)
  for person in (0, 2):  # Nobody is in front.
    np.testing.assert_allclose(mixed[person][1], exact[person][1], atol=1e-5)
  walk = simulated(walk=0.05, noise=1e-6)
  for _, embedding in walk:
    cosine = np.sum(embedding[1:] * embedding[:-1], axis=1)
    # The part of the step across the sphere: 7 of 8 directions.
    angle = np.mean(np.arccos(np.clip(cosine, -1, 1)) ** 2)
    assert angle == pytest.approx(0.05**2 * 7 / 8, rel=0.15)
    far = np.sum(embedding[400:] * embedding[:-400], axis=1).mean()
    assert far < 0.8
