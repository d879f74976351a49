"""Several hypotheses: which are tried, compared and reported."""

import itertools

import numpy as np
import pytest

from experiments.tracking import detections, near_online, scenes, tracker
from tests.experiments.tracking.walks import MODEL, walks


def test_assignments_are_the_best_of_all():
  rng = np.random.default_rng(0)
  for _ in range(20):
    affinity = rng.normal(size=(3, 4))
    sums = {
      chosen: sum(affinity[i, j] for i, j in enumerate(chosen) if j >= 0)
      for chosen in itertools.product(range(-1, 4), repeat=3)
      if len({j for j in chosen if j >= 0}) == sum(j >= 0 for j in chosen)
    }
    best = max(sums, key=sums.get)
    assert tracker.assign(affinity).tolist() == list(best)
    tried = near_online.assignments(affinity, 2)
    assert tried[0][0] == pytest.approx(sums[best])
    for value, chosen, without in tried[1:]:
      ((i, j),) = np.argwhere(without != affinity)
      assert best[i] == j
      allowed = [v for c, v in sums.items() if c[i] != j]
      assert value == pytest.approx(sums[tuple(chosen.tolist())])
      assert value == pytest.approx(max(allowed))
    assert len(tried) <= 1 + min(2, sum(j >= 0 for j in best))
    assert len({tuple(chosen) for _, chosen, _ in tried}) == len(tried)
  # Without either pair, the other two are exchanged: one assignment, not two.
  exchanged = near_online.assignments(np.array([[2, 1.9], [1.9, 2]]), 3)
  assert [x[1].tolist() for x in exchanged] == [[0, 1], [1, 0]]
  # Three doubtful pairs: without each of them.
  apart = near_online.assignments(np.diag([1.0, 2.0, 3.0]), 3)
  assert [x[1].tolist() for x in apart] == [
    [0, 1, 2],
    [-1, 1, 2],
    [0, -1, 2],
    [0, 1, -1],
  ]


def test_hypotheses_are_compared_by_probabilities():
  """The probabilities of all choices of a tracklet sum to 1."""
  for shift in (0.0, 900.0):
    affinity = np.array([[1.0, -2.0, tracker.FORBIDDEN, 0.5]]) + shift
    affinity[0, 2] = tracker.FORBIDDEN
    common = near_online.log_normaliser(affinity)
    logs = np.append(affinity[0], 0.0) - common
    assert np.exp(logs).sum() == pytest.approx(1.0)
  two = np.array([[1.0, 3.0], [tracker.FORBIDDEN, -1.0]])
  apart = [near_online.log_normaliser(row[None]) for row in two]
  assert near_online.log_normaliser(two) == pytest.approx(sum(apart))
  for empty in (np.zeros((0, 3)), np.zeros((2, 0))):
    assert near_online.log_normaliser(empty) == 0.0


def test_a_history_that_inflates_scores_is_not_preferred():
  """After a jump all affinities are higher by 5, correct or not."""
  rules = tracker.Rules(birth=1, second_overlap=2.0, gate=1e9)
  given = walks((1, 1, 6, 100, 0), (2, 2, 6, 130, 0), length=6)

  def affinity(candidates, memory):
    track, detection = candidates.track, candidates.detection
    right = candidates.frame.boxes[detection, 0] > 120
    was, jumped = (
      candidates.predicted.last_box[track, 0] > 120,
      memory[0][track],
    )
    scores = np.where(was == right, 3.0, 2.8) + 5.0 * jumped
    return scores, np.maximum(jumped, was != right)

  model = MODEL._replace(
    affinity=affinity,
    begin=lambda initial, confidence, embedding: (
      (),
      np.zeros(len(confidence)),
    ),
    remember=lambda memory, updates: (updates,),
  )
  shown = near_online.track(model, given, rules)
  assert set(shown.ids[shown.boxes[:, 0] < 120]) == {1}
  assert set(shown.ids[shown.boxes[:, 0] > 120]) == {2}


def test_near_online_with_one_hypothesis_is_online():
  scene = scenes.make_up(3, length=60)
  detected = detections.simulate(
    scene.truth, scene.info, np.random.default_rng(0)
  )
  online = tracker.online(MODEL, detected)
  alone = near_online.Delay(hypotheses=1, doubtful_pairs=0, frames=4)
  for one, two in zip(online, near_online.track(MODEL, detected, delay=alone)):
    np.testing.assert_array_equal(one, two)
  later = near_online.track(MODEL, detected)
  assert len(later.frames) > 0.9 * len(online.frames)
  key = later.frames * 1000 + later.ids
  assert len(np.unique(key)) == len(key)  # An identity once a frame.


def test_later_frames_may_overrule_a_choice():
  rules = tracker.Rules(birth=1, second_overlap=0.5, gate=1e9)
  given = walks((1, 1, 4, 100, 0), (2, 2, 4, 130, 0), length=4)

  def affinity(candidates, memory):
    """Staying left scores a little more first; going right pays later."""
    del memory
    track, predicted = candidates.track, candidates.predicted
    right = candidates.frame.boxes[candidates.detection, 0] > 120
    was = predicted.last_box[track, 0] > 120
    count = predicted.measurements[track]
    gain = np.where(count > 1, 8.0, 0.1)
    scores = np.where(was == right, np.where(right, gain, 0.6), -1.0)
    return np.where(~was & right & (count == 1), 0.5, scores), scores

  model = MODEL._replace(affinity=affinity)
  at_right = lambda shown: shown.ids[shown.boxes[:, 0] > 120].tolist()
  assert at_right(tracker.online(model, given, rules)) == [2, 2, 2]
  assert at_right(near_online.track(model, given, rules)) == [1, 1, 1]
  # Without a delay, the choice of the second frame stays.
  now = near_online.Delay(frames=0)
  assert at_right(near_online.track(model, given, rules, now)) == [2, 2, 2]
