"""The filter, the features and the networks in few calls are the plain ones."""

import os
import pathlib

import jax
import numpy as np
import pytest
import threadpoolctl

from experiments.tracking import (
  baselines,
  detections,
  filtering,
  inference,
  live,
  mot_files,
  motion,
  network,
  scenes,
  tracker,
)
from tests.experiments.tracking import plain
from tests.tiers import first

NOISE = motion.Noise(0.05, 0.03, 0.01, 0.1, 0.02)
REAL = pathlib.Path('mot/MOT15_sort_det/TUD-Campus/det/det.txt')


def draw_frame(rng, count, embedding_size=0):
  """Draws detections that lie near each other."""
  boxes = rng.normal(size=(count, 4)) * (20, 20, 0.2, 0.2) + (99, 99, 3, 4)
  return tracker.Frame(
    boxes.astype(np.float32),
    rng.random(count, np.float32),
    rng.normal(size=(count, embedding_size)).astype(np.float32),
  )


def assert_same(one, two):
  for name, a, b in zip(motion.Motion._fields, one, two):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('embedding_size', [0, 3])
def test_filter_and_features_are_those_of_motion(embedding_size):
  rng, kalman = np.random.default_rng(0), filtering.make(NOISE)
  frame = draw_frame(rng, 6, embedding_size)
  state = kalman.measure(frame).begin(np.arange(6))
  own = motion.begin(frame.boxes, frame.embedding, NOISE)
  total = frame.embedding
  for _ in range(15):  # Longer than the cap of the measurements.
    assert_same(filtering.as_motion(state, total), own)
    frame = draw_frame(rng, 5, embedding_size)
    own = motion.predict(own, np.float32(1), NOISE)
    before = kalman.predict(state, total)
    candidates = filtering.Candidates(before, kalman.measure(frame), np.inf)
    assert candidates.shape == (6, 5)
    assert_same(candidates.predicted, own)
    innovation, deviation = motion.innovations(own, frame.boxes[None], NOISE)
    np.testing.assert_allclose(candidates.deviation, deviation, rtol=1e-5)
    np.testing.assert_allclose(
      candidates.innovation, innovation.reshape(-1, 4), rtol=1e-4, atol=1e-4
    )
    each = (np.repeat(x[None], 6, axis=0) for x in frame)
    wanted = motion.features(own, *each, NOISE)
    np.testing.assert_allclose(
      candidates.features(), wanted.reshape(30, -1), rtol=1e-3, atol=1e-4
    )
    # Tracklets 4 and 0 continue, and tracklet 2 is replaced.
    tracks, at = [4, 0], [1, 3]
    states = kalman.update(candidates, tracks, [*at, 2])
    rows = motion.Motion(*(x[tracks] for x in own))
    rows = motion.update(rows, frame.boxes[at], frame.embedding[at], NOISE)
    first = motion.begin(frame.boxes[[2]], frame.embedding[[2]], NOISE)
    for old, new, born in zip(own, rows, first):
      old[tracks], old[[2]] = new, born
    state = before.state
    state[:, [4, 0, 2]] = states
    total = own.embedding_sum


def test_gates_keep_near_pairs():
  rng, kalman = np.random.default_rng(1), filtering.make(NOISE)
  one, two = draw_frame(rng, 9), draw_frame(rng, 7)
  state = kalman.measure(one).begin(np.arange(9))
  before = kalman.predict(state, one.embedding)
  distance = motion.distance(
    filtering.as_motion(before.state, one.embedding), two.boxes[None], NOISE
  )
  gate = float(np.median(distance))
  pairs = filtering.Candidates(before, kalman.measure(two), gate)
  wanted = np.argwhere(distance <= gate)
  np.testing.assert_array_equal(np.c_[pairs.track, pairs.detection], wanted)


@pytest.mark.parametrize('count', first([3, 1, 9]))
def test_networks_are_those_of_training(count):
  """For one row, few and several, which are different products."""
  weights = jax.device_get(
    jax.vmap(lambda key: network.init(key, hidden=6, embedding_size=2))(
      jax.random.split(jax.random.key(0), 2)
    )
  )
  rng = np.random.default_rng(0)
  weights = {
    name: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32)
    for name, x in weights.items()
  }
  every = [{name: x[i] for name, x in weights.items()} for i in range(2)]
  networks = inference.Networks(weights, NOISE)
  frame = draw_frame(rng, count, 2)
  memory, x = networks.begin(frame.confidence, frame.embedding)
  assert not memory.any()
  features = rng.normal(size=(count, network.feature_count(2)))
  features = features.astype(np.float32)
  track = np.arange(count)
  h = [network.first_state(w, *frame[1:], NOISE) for w in every]
  for _ in range(3):
    memory = networks.remember(memory, x)
    for i, w in enumerate(every):
      terms = network.tracklet_terms(w, h[i][0])
      wanted = np.stack([*h[i], *terms], axis=1)
      np.testing.assert_allclose(memory[:, i], wanted, rtol=1e-4, atol=1e-5)
    scores, x = networks.score(memory, track, features)
    both = [network.score(w, s[0], features[:, None]) for w, s in zip(every, h)]
    mean = np.mean([e[:, 0] for e, _ in both], axis=0)
    np.testing.assert_allclose(scores, mean, rtol=1e-4, atol=1e-5)
    for i, (_, own) in enumerate(both):
      np.testing.assert_allclose(x[:, i], own[:, 0], rtol=1e-4, atol=1e-5)
    h = [
      network.remember(w, *s, own[:, 0])
      for w, s, (_, own) in zip(every, h, both)
    ]


def sequences():
  """A crowd, one with embeddings, and real detections if they are there."""
  for seed, size in ((0, 0), (1, 3)):
    scene = scenes.make_up(seed, length=60, people=10)
    detector = detections.STANDARD._replace(embedding_size=size)
    rng = np.random.default_rng(seed)
    yield detections.simulate(scene.truth, scene.info, rng, detector)
  path = pathlib.Path(os.environ.get('BILEVEL_JAX_DATA', '/none')) / REAL
  if path.exists():
    boxes = mot_files.read_boxes(path, identities=False)
    info = mot_files.read_info(path.parent, boxes)
    none = np.zeros((len(boxes.ids), 0), np.float32)
    yield detections.Detected(boxes, boxes.ids, none, info)


@pytest.mark.slow
def test_tracks_are_those_of_the_plain_tracker():
  for detected in sequences():
    size = detected.embedding.shape[1]
    init = lambda key, size=size: network.init(
      key, hidden=8, embedding_size=size
    )
    weights = jax.device_get(
      jax.vmap(init)(jax.random.split(jax.random.key(1), 2))
    )
    model, base = (
      make(weights, NOISE) for make in (tracker.make_model, plain.make_model)
    )
    hand = baselines.likelihood(NOISE, match_score=23.0, cosine_weight=1.0)
    for one, two, rules in (
      (model, base, tracker.Rules(min_score=-2.0, death=20)),
      (hand, hand, tracker.RULES),
      (hand, hand, tracker.Rules(second_overlap=0.3, min_confidence=0.4)),
      (baselines.overlap(NOISE),) * 2 + (tracker.Rules(birth=1),),
    ):
      wanted = plain.online(two, detected, rules)
      shown = tracker.online(one, detected, rules)
      assert len(np.unique(wanted.ids)) > 5
      for a, b in zip(shown, wanted):
        np.testing.assert_array_equal(a, b)


def threads():
  return [
    one['num_threads']
    for one in threadpoolctl.threadpool_info()
    if one['user_api'] == 'blas'
  ]


def test_the_number_of_threads_is_restored():
  before = threads()
  with inference.OneThread():
    assert set(threads()) == {1}
    live.Tracker(baselines.overlap(NOISE)).update([[0, 0, 9, 9]])
    assert set(threads()) == {1}  # The inner context is not the last one.
  assert threads() == before
  with pytest.raises(KeyError), inference.OneThread():
    raise KeyError
  assert threads() == before
