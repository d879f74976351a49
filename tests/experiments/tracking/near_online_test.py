"""Several hypotheses: which are tried, compared and reported."""

import itertools

import numpy as np
import pytest

from experiments.tracking import detections, near_online, scenes, tracker
from tests.experiments.tracking.walks import MODEL, walks


def matchings(tracks, count):
  """All choices of a detection, or -1, per tracklet."""
  for chosen in itertools.product(range(-1, count), repeat=tracks):
    used = [j for j in chosen if j >= 0]
    if len(set(used)) == len(used):
      yield chosen


def test_assignments_are_the_best_of_all():
  rng = np.random.default_rng(0)
  for shape in [(3, 4)] * 8 + [(4, 2), (1, 3), (0, 2), (2, 0)]:
    affinity = rng.normal(size=shape)
    sums = {
      chosen: sum(affinity[i, j] for i, j in enumerate(chosen) if j >= 0)
      for chosen in matchings(*shape)
      # A pair below 0 is never matched.
      if all(j < 0 or affinity[i, j] > 0 for i, j in enumerate(chosen))
    }
    best = sorted(sums, key=lambda c: -sums[c])
    assert tracker.assign(affinity).tolist() == list(best[0])
    for count in (1, 4, 1000):
      found = near_online.assignments(affinity, count, 9)
      assert [tuple(c.tolist()) for _, c, _ in found] == best[:count]
      for value, chosen, without in found:
        assert value == pytest.approx(sums[tuple(chosen.tolist())])
        for i, j in np.argwhere(without != affinity):
          assert without[i, j] == tracker.FORBIDDEN and chosen[i] != j
    # Splits by fewer pairs find the second best, and no assignment twice.
    few = [c.tolist() for _, c, _ in near_online.assignments(affinity, 9, 1)]
    assert few[0] == list(best[0]) and len(set(map(tuple, few))) == len(few)
  # Pairs in doubt are split by first: here the least affinity.
  apart = near_online.assignments(np.diag([1.0, 2.0, 3.0]), 2, 1)
  assert [x[1].tolist() for x in apart] == [[0, 1, 2], [-1, 1, 2]]


def table_model(rng, detections_per_frame):
  """Affinities are a table of the whole history and the next detection.

  The memory is the history: its detections as digits.
  """
  base = detections_per_frame + 1
  table = rng.normal(size=(base**6, detections_per_frame)) * 2 + 1

  def index(boxes):
    return np.rint(boxes[:, 0] / 10).astype(int) - 1

  def affinity(candidates, memory):
    history = memory[0][candidates.track]
    digit = index(candidates.frame.boxes)[candidates.detection]
    return table[history, digit], history * base + digit + 1

  def begin(initial, confidence, embedding):
    del confidence, embedding
    digits = index(initial.last_box) + 1
    return (np.zeros(len(digits), int),), digits

  model = MODEL._replace(
    affinity=affinity,
    begin=begin,
    remember=lambda memory, updates: (updates,),
  )
  return model, table, base


def best_by_enumeration(table, base, width, length, birth_cost):
  """The histories of the largest total log-probability, over all sequences.

  Returns:
    The final histories, a frozenset of tuples of (frame, detection).
  """
  states = [(0.0, ())]
  for frame in range(length):
    grown = []
    for total, tracks in states:
      codes = [code for code, _ in tracks]
      for chosen in matchings(len(tracks), width):
        if any(j >= 0 and table[c, j] <= 0 for c, j in zip(codes, chosen)):
          continue
        value, later = total, []
        for (code, history), j in zip(tracks, chosen):
          probs = np.exp(np.append(table[code], 0.0))
          value += np.log(probs[j] / probs.sum())  # The last one is a miss.
          if j >= 0:
            code, history = code * base + j + 1, (*history, (frame, j))
          later.append((code, history))
        free = [j for j in range(width) if j not in chosen]
        value -= birth_cost * len(free)
        later += [(j + 1, ((frame, j),)) for j in free]
        grown.append((value, tuple(later)))
    states = grown
  return frozenset(h for _, h in max(states)[1])


@pytest.mark.slow
@pytest.mark.parametrize('birth_cost', [0.5, 4.0])
def test_the_best_total_of_all_sequences_of_matchings(birth_cost):
  """With all hypotheses kept, against an enumeration in plain Python."""
  width, length, better = 2, 4, 0
  rules = tracker.Rules(birth=1, gate=1e12)
  given = walks(
    *((i, 1, length, 10 * i - 10, 0) for i in (1, 2)), length=length
  )
  for seed in range(12):
    model, table, base = table_model(np.random.default_rng(seed), width)
    wanted = best_by_enumeration(table, base, width, length, birth_cost)
    every = near_online.Delay(10**5, 9, length, birth_cost, length)

    def histories(shown):
      column = np.rint(shown.boxes[:, 0] / 10).astype(int)
      rows = zip(shown.ids, shown.frames - 1, column)
      by_id = {}
      for identity, frame, j in sorted(rows):
        by_id.setdefault(identity, []).append((int(frame), int(j)))
      return frozenset(map(tuple, by_id.values()))

    assert histories(near_online.track(model, given, rules, every)) == wanted
    better += histories(tracker.online(model, given, rules)) != wanted
  assert better  # Totals change choices.


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
  for frames in (0, 3):  # An identity once a frame, while hypotheses change.
    many = near_online.track(
      MODEL, detected, delay=near_online.Delay(frames=frames)
    )
    key = many.frames * 1000 + many.ids
    assert len(np.unique(key)) == len(key)
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
  now = near_online.Delay(frames=0, scan=0)
  assert at_right(near_online.track(model, given, rules, now)) == [2, 2, 2]
  # Online, a frame is reported at once, and later ones by the better history.
  online = near_online.track(model, given, rules, near_online.ONLINE)
  assert at_right(online) == [2, 1, 1]
