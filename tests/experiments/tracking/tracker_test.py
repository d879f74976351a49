"""Births, matches and deaths of tracklets; the network's scores."""

import jax
import numpy as np
import pytest

from experiments.tracking import (
  baselines,
  detections,
  models,
  motion,
  near_online,
  network,
  scenes,
  tracker,
)
from tests.experiments.tracking.walks import MODEL, walks


def test_a_tracklet_is_reported_from_its_third_detection():
  shown = tracker.online(MODEL, walks((1, 5, 30, 10, 2), (2, 8, 9, 300, 0)))
  assert shown.frames.tolist() == list(range(7, 31))
  assert set(shown.ids) == {1}
  rules = tracker.Rules(birth=1)
  shown = tracker.online(
    MODEL, walks((1, 5, 30, 10, 2), (2, 8, 9, 300, 0)), rules
  )
  assert len(shown.frames) == 28 and set(shown.ids) == {1, 2}


@pytest.mark.parametrize(('death', 'count'), [(9, 2), (10, 1)])
def test_a_person_who_is_away_too_long_gets_a_new_identity(death, count):
  away = walks((1, 1, 10, 10, 1), (1, 20, 40, 29, 1))
  rules = tracker.Rules(death=death)
  assert len(set(tracker.online(MODEL, away, rules).ids)) == count


def test_no_detections_and_empty_frames():
  nothing = walks(length=5)
  for run in (tracker.online, near_online.track):
    assert len(run(MODEL, nothing).frames) == 0
  one = walks((1, 2, 2, 10, 0), length=5)
  assert len(tracker.online(MODEL, one).frames) == 0


def test_people_who_cross_keep_their_identities():
  crossing = walks((1, 1, 40, 100, 4), (2, 1, 40, 260, -4))
  model = baselines.likelihood(motion.NOISE, match_score=25.0)
  for run in (tracker.online, near_online.track):
    shown = run(model, crossing)
    first = shown.ids[np.flatnonzero(shown.frames == 3)]
    last = shown.ids[np.flatnonzero(shown.frames == 40)]
    # Boxes of a frame are in the order of the detections.
    assert first.tolist() == last.tolist() and len(set(first)) == 2


def test_the_second_pass_matches_by_overlap():
  model = MODEL._replace(
    affinity=lambda candidates, memory: (
      np.full(len(candidates.track), -1.0),
      np.zeros(len(candidates.track)),
    )
  )
  straight = walks((1, 1, 20, 10, 1))
  for second, count in ((0.5, 1), (2.0, 0)):
    shown = tracker.online(
      model, straight, tracker.Rules(second_overlap=second)
    )
    assert len(set(shown.ids)) == count


@pytest.mark.parametrize('embedding_size', [0, 3])
def test_pairs_are_scored_as_in_training(embedding_size):
  """One pair at a time, by the functions that training compiles."""
  scene = scenes.make_up(2, length=25)
  detected = detections.simulate(
    scene.truth,
    scene.info,
    np.random.default_rng(0),
    detections.STANDARD._replace(embedding_size=embedding_size),
  )
  weights = network.init(
    jax.random.key(0), hidden=8, embedding_size=embedding_size
  )
  weights = {name: np.asarray(x) for name, x in weights.items()}
  model = tracker.make_model(weights, motion.NOISE)
  rules = tracker.Rules(min_score=0.25)
  tracks, compared = None, 0
  for frame in tracker.split_frames(detected):
    if tracks is None:
      tracks = tracker.begin(model, tracker.Frame(*(x[:0] for x in frame)))
    pairs = tracker.pair(model, tracks, frame, rules)
    moved = motion.predict(tracks.motion, np.float32(1), motion.NOISE)
    for i, j in np.ndindex(pairs.affinity.shape):
      one = motion.Motion(*(x[i] for x in moved))
      far = motion.distance(one, frame.boxes[j, None], motion.NOISE)[0]
      if far > rules.gate * 1.001 or len(tracks.hits) > 20 < i:
        continue
      features = motion.features(
        one,
        frame.boxes[j, None],
        frame.confidence[j, None],
        frame.embedding[j, None],
        motion.NOISE,
      )
      state = tracks.memory[0][i, 0, 0]
      (e,), (x,) = network.score(weights, state, features)
      if pairs.affinity[i, j] > tracker.FORBIDDEN or far < rules.gate * 0.999:
        np.testing.assert_allclose(
          pairs.affinity[i, j], e - 0.25, rtol=1e-3, atol=1e-3
        )
        (updates,) = pairs.select([i], [j])[:, 0]
        np.testing.assert_allclose(updates, x, rtol=1e-3, atol=1e-3)
        compared += 1
    chosen = tracker.assign(pairs.affinity)
    tracks = tracker.advance(model, tracks, pairs, chosen, frame, rules)
  assert compared > 250
  # A new tracklet has the memory that a training window begins with.
  new = np.flatnonzero(tracks.hits == 1)
  at = tracks.detection[new]
  born = motion.begin(frame.boxes[at], frame.embedding[at], motion.NOISE)
  features = motion.features(
    born,
    frame.boxes[at, None],
    frame.confidence[at, None],
    frame.embedding[at, None],
    motion.NOISE,
  )
  x = network.embed(weights, features[:, 0])
  wanted = network.remember(weights, 0 * x, 0 * x, x)
  assert len(new)
  wanted = np.stack([*wanted, *network.tracklet_terms(weights, wanted[0])], 1)
  np.testing.assert_allclose(
    tracks.memory[0][new, 0], wanted, rtol=1e-4, atol=1e-5
  )


def test_several_networks_are_the_mean_of_their_scores(tmp_path):
  keys = jax.random.split(jax.random.key(0), 3)
  several = jax.device_get(
    jax.vmap(lambda key: network.init(key, hidden=5))(keys)
  )
  models.save(tmp_path / 'a.npz', several, motion.NOISE, tracker.RULES)
  together, _ = models.load(tmp_path / 'a.npz')
  alone = [
    tracker.make_model({k: v[i] for k, v in several.items()}, motion.NOISE)
    for i in range(3)
  ]
  scene = scenes.make_up(2, length=6)
  detected = detections.simulate(
    scene.truth, scene.info, np.random.default_rng(0)
  )
  frames = tracker.split_frames(detected)
  every = (together, *alone)
  tracks = [tracker.begin(model, frames[0]) for model in every]
  rules = tracker.Rules(gate=30.0)
  for frame in frames[1:]:
    pairs = [
      tracker.pair(model, one, frame, rules)
      for model, one in zip(every, tracks)
    ]
    mean = np.mean([one.affinity for one in pairs[1:]], axis=0)
    near = mean > tracker.FORBIDDEN
    assert near.any()
    np.testing.assert_allclose(
      pairs[0].affinity[near], mean[near], rtol=1e-4, atol=1e-5
    )
    # All continue with the assignment of the mean.
    chosen = tracker.assign(pairs[0].affinity)
    tracks = [
      tracker.advance(model, one, two, chosen, frame, rules)
      for model, one, two in zip(every, tracks, pairs)
    ]
  for i, one in enumerate(tracks[1:]):
    for memory, alone in zip(tracks[0].memory, one.memory):
      np.testing.assert_allclose(
        memory[:, i], alone[:, 0], rtol=1e-4, atol=1e-5
      )
