"""Births, matches and deaths; online and near-online; files of one's own."""

import itertools

import jax
import numpy as np
import pytest

from experiments import harness
from experiments.tracking import (
  baselines,
  detections,
  evaluation,
  models,
  mot_files,
  motion,
  near_online,
  network,
  overlay,
  scenes,
  track,
  tracker,
)

MODEL = baselines.overlap(motion.NOISE, least=0.2)


def detected(boxes, length):
  """Detections whose identities are known by the order of what is given."""
  info = mot_files.Info('made', length, 640, 480, 25.0)
  none = np.zeros((len(boxes.frames), 0), np.float32)
  return detections.Detected(boxes, boxes.ids, none, info)


def walks(*several, length=40):
  """Walks (identity, first frame, last frame, left, pixels a frame)."""
  rows = [
    (frame, identity, left + speed * (frame - first), 50, 20, 40)
    for identity, first, last, left, speed in several
    for frame in range(first, last + 1)
  ]
  table = np.array(rows, float).reshape(-1, 6)
  boxes = mot_files.make(table[:, 0], table[:, 2:], ids=table[:, 1])
  return detected(boxes, length)


def test_a_tracklet_is_told_from_its_third_detection():
  shown = tracker.online(MODEL, walks((1, 5, 30, 10, 2), (2, 8, 9, 300, 0)))
  assert shown.frames.tolist() == list(range(7, 31))
  assert set(shown.ids) == {1}
  rules = tracker.Rules(birth=1)
  shown = tracker.online(
    MODEL, walks((1, 5, 30, 10, 2), (2, 8, 9, 300, 0)), rules
  )
  assert len(shown.frames) == 28 and set(shown.ids) == {1, 2}


@pytest.mark.parametrize(('death', 'count'), [(9, 2), (10, 1)])
def test_who_is_away_too_long_is_somebody_new(death, count):
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
  model = baselines.likelihood(motion.NOISE, worth=25.0)
  for run in (tracker.online, near_online.track):
    shown = run(model, crossing)
    first = shown.ids[np.flatnonzero(shown.frames == 3)]
    last = shown.ids[np.flatnonzero(shown.frames == 40)]
    # Boxes of a frame are in the order of the detections.
    assert first.tolist() == last.tolist() and len(set(first)) == 2


def test_what_the_affinity_leaves_over_is_matched_by_overlap():
  model = MODEL._replace(
    affinity=lambda near, memory: (
      np.full(len(near.one), -1.0),
      np.zeros(len(near.one)),
    )
  )
  straight = walks((1, 1, 20, 10, 1))
  for second, count in ((0.5, 1), (2.0, 0)):
    shown = tracker.online(model, straight, tracker.Rules(second=second))
    assert len(set(shown.ids)) == count


@pytest.mark.parametrize('looks', [0, 3])
def test_pairs_are_scored_as_in_training(looks):
  """One pair at a time, by the functions that training compiles."""
  scene = scenes.make_up(2, length=25)
  found = detections.simulate(
    scene.truth,
    scene.info,
    np.random.default_rng(0),
    detections.STANDARD._replace(looks=looks),
  )
  weights = network.init(jax.random.key(0), hidden=8, looks=looks)
  weights = {name: np.asarray(x) for name, x in weights.items()}
  model = tracker.learned(weights, motion.NOISE)
  rules = tracker.Rules(least=0.25)
  tracks, compared = None, 0
  for frame in tracker.frames_of(found):
    if tracks is None:
      tracks = tracker.begin(model, tracker.Frame(*(x[:0] for x in frame)))
    pairs = tracker.pair(model, tracks, frame, rules)
    moved = motion.predict(tracks.motion, np.float32(1), motion.NOISE)
    for i, j in np.ndindex(pairs.affinity.shape):
      one = motion.Motion(*(x[i] for x in moved))
      far = motion.distance(one, frame.places[j, None], motion.NOISE)[0]
      if far > rules.gate * 1.001 or len(tracks.hits) > 20 < i:
        continue
      seen = motion.features(
        one,
        frame.places[j, None],
        frame.sure[j, None],
        frame.looks[j, None],
        motion.NOISE,
      )
      (e,), (given,) = network.score(weights, tracks.memory[0][i, 0], seen)
      if pairs.affinity[i, j] > tracker.NEVER or far < rules.gate * 0.999:
        np.testing.assert_allclose(
          pairs.affinity[i, j], e - 0.25, rtol=1e-3, atol=1e-3
        )
        kept = pairs.given[pairs.place[i, j], 0]
        np.testing.assert_allclose(kept, given, rtol=1e-3, atol=1e-3)
        compared += 1
    chosen = tracker.assign(pairs.affinity)
    tracks = tracker.advance(model, tracks, pairs, chosen, frame, rules)
  assert compared > 250
  # What is born remembers what a window of training begins with.
  new = np.flatnonzero(tracks.hits == 1)
  at = tracks.place[new]
  born = motion.begin(frame.places[at], frame.looks[at], motion.NOISE)
  seen = motion.features(
    born,
    frame.places[at, None],
    frame.sure[at, None],
    frame.looks[at, None],
    motion.NOISE,
  )
  found = network.embed(weights, seen[:, 0])
  wanted = network.remember(weights, 0 * found, 0 * found, found)
  assert len(new)
  for memory, first in zip(tracks.memory, wanted):
    np.testing.assert_allclose(memory[new, 0], first, rtol=1e-4, atol=1e-5)


def test_several_networks_are_the_mean_of_their_scores(tmp_path):
  keys = jax.random.split(jax.random.key(0), 3)
  several = jax.device_get(
    jax.vmap(lambda key: network.init(key, hidden=5))(keys)
  )
  models.save(tmp_path / 'a.npz', several, motion.NOISE, tracker.RULES)
  together, _ = models.load(tmp_path / 'a.npz')
  alone = [
    tracker.learned({k: v[i] for k, v in several.items()}, motion.NOISE)
    for i in range(3)
  ]
  scene = scenes.make_up(2, length=6)
  found = detections.simulate(scene.truth, scene.info, np.random.default_rng(0))
  frames = tracker.frames_of(found)
  every = (together, *alone)
  tracks = [tracker.begin(model, frames[0]) for model in every]
  rules = tracker.Rules(gate=30.0)
  for frame in frames[1:]:
    pairs = [
      tracker.pair(model, one, frame, rules)
      for model, one in zip(every, tracks)
    ]
    mean = np.mean([one.affinity for one in pairs[1:]], axis=0)
    near = mean > tracker.NEVER
    assert near.any()
    np.testing.assert_allclose(
      pairs[0].affinity[near], mean[near], rtol=1e-4, atol=1e-5
    )
    # All go on with the choice of the mean.
    chosen = tracker.assign(pairs[0].affinity)
    tracks = [
      tracker.advance(model, one, two, chosen, frame, rules)
      for model, one, two in zip(every, tracks, pairs)
    ]
  for i, one in enumerate(tracks[1:]):
    for memory, own in zip(tracks[0].memory, one.memory):
      np.testing.assert_allclose(memory[:, i], own[:, 0], rtol=1e-4, atol=1e-5)


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
  # Without either pair, the other two are exchanged: one state, not two.
  exchanged = near_online.assignments(np.array([[2, 1.9], [1.9, 2]]), 3)
  assert [x[1].tolist() for x in exchanged] == [[0, 1], [1, 0]]
  # All that is doubtful is tried: without each of three pairs.
  apart = near_online.assignments(np.diag([1.0, 2.0, 3.0]), 3)
  assert [x[1].tolist() for x in apart] == [
    [0, 1, 2],
    [-1, 1, 2],
    [0, -1, 2],
    [0, 1, -1],
  ]


def test_states_are_compared_by_probabilities():
  """Of one tracklet, all that may happen sums to 1, however large it is."""
  for shift in (0.0, 900.0):
    affinity = np.array([[1.0, -2.0, tracker.NEVER, 0.5]]) + shift
    affinity[0, 2] = tracker.NEVER
    common = near_online.constant(affinity)
    logs = np.append(affinity[0], 0.0) - common
    assert np.exp(logs).sum() == pytest.approx(1.0)
  two = np.array([[1.0, 3.0], [tracker.NEVER, -1.0]])
  apart = [near_online.constant(row[None]) for row in two]
  assert near_online.constant(two) == pytest.approx(sum(apart))
  for empty in (np.zeros((0, 3)), np.zeros((2, 0))):
    assert near_online.constant(empty) == 0.0


def test_a_history_that_inflates_scores_is_not_preferred():
  """After a jump all affinities are 5 higher, of what is right or not."""
  rules = tracker.Rules(birth=1, second=2.0, gate=1e9)
  given = walks((1, 1, 6, 100, 0), (2, 2, 6, 130, 0), length=6)

  def affinity(near, memory):
    right = near.frame.places[near.two, 0] > 120
    was, jumped = near.moved.place[near.one, 0] > 120, memory[0][near.one]
    found = np.where(was == right, 3.0, 2.8) + 5.0 * jumped
    return found, np.maximum(jumped, was != right)

  model = MODEL._replace(
    affinity=affinity,
    begin=lambda begun, sure, looks: ((), np.zeros(len(sure))),
    remember=lambda memory, given: (given,),
  )
  shown = near_online.track(model, given, rules)
  assert set(shown.ids[shown.boxes[:, 0] < 120]) == {1}
  assert set(shown.ids[shown.boxes[:, 0] > 120]) == {2}


def test_near_online_with_one_state_is_online():
  scene = scenes.make_up(3, length=60)
  found = detections.simulate(scene.truth, scene.info, np.random.default_rng(0))
  online = tracker.online(MODEL, found)
  alone = near_online.Delay(hypotheses=1, doubts=0, frames=4)
  for one, two in zip(online, near_online.track(MODEL, found, delay=alone)):
    np.testing.assert_array_equal(one, two)
  later = near_online.track(MODEL, found)
  assert len(later.frames) > 0.9 * len(online.frames)
  key = later.frames * 1000 + later.ids
  assert len(np.unique(key)) == len(key)  # An identity once a frame.


def test_later_frames_may_overrule_a_choice():
  rules = tracker.Rules(birth=1, second=0.5, gate=1e9)
  given = walks((1, 1, 4, 100, 0), (2, 2, 4, 130, 0), length=4)

  def affinity(near, memory):
    """The first is a little likelier to stay; at the right, it goes on well."""
    del memory
    right = near.frame.places[near.two, 0] > 120
    was, seen = near.moved.place[near.one, 0] > 120, near.moved.seen[near.one]
    there = np.where(seen > 1, 8.0, 0.1)
    found = np.where(was == right, np.where(right, there, 0.6), -1.0)
    return np.where(~was & right & (seen == 1), 0.5, found), found

  model = MODEL._replace(affinity=affinity)
  at_right = lambda shown: shown.ids[shown.boxes[:, 0] > 120].tolist()
  assert at_right(tracker.online(model, given, rules)) == [2, 2, 2]
  assert at_right(near_online.track(model, given, rules)) == [1, 1, 1]
  # Told at once, the choice of the second frame stays.
  now = near_online.Delay(frames=0)
  assert at_right(near_online.track(model, given, rules, now)) == [2, 2, 2]


@pytest.fixture(scope='module')
def weights():
  return jax.device_get(network.init(jax.random.key(0), hidden=4))


def test_a_tracker_is_kept_and_tracks_a_file(tmp_path, weights, capsys):
  pytest.importorskip('trackeval')
  rules = tracker.Rules(least=-3.0, birth=2, death=7)
  models.save(tmp_path / 'search.npz', weights, motion.NOISE, rules)
  model, read = models.load(tmp_path)
  assert read == rules and isinstance(read.death, int)
  scene = scenes.make_up(4, length=50, people=6)
  found = detections.simulate(scene.truth, scene.info, np.random.default_rng(0))
  given = tmp_path / 'det.txt'
  mot_files.write_boxes(given, found.boxes)
  with open(given, 'a', encoding='utf-8') as file:
    file.write('3,-1,nan,1,2,3,1\n')
  arguments = [
    f'--checkpoint={tmp_path}',
    f'--detections={given}',
    f'--output={tmp_path}/out.txt',
    f'--overlay={tmp_path}/tracks.gif',
  ]
  assert track.main(arguments) == 0
  said = capsys.readouterr()
  assert 'boxes of' in said.out and '1 boxes that are not finite' in said.err
  shown = mot_files.read_boxes(tmp_path / 'out.txt', identities=True)
  again = tracker.online(model, found, rules)
  assert np.mean(shown.ids == again.ids) > 0.95  # But for digits of the file.
  scores = evaluation.evaluate(
    {'a': evaluation.prepared(scene.truth, shown, 50)}
  )[0]
  assert scores.idf1 > 20
  assert (tmp_path / 'tracks.gif').stat().st_size > 1_000
  assert track.main([*arguments, '--hypotheses=2']) == 0


def test_bad_checkpoints_and_pictures_are_said_in_one_line(
  tmp_path, weights, capsys
):
  given = tmp_path / 'det.txt'
  given.write_text('1,-1,1,2,3,4,1\n')
  arguments = [f'--detections={given}', f'--output={tmp_path}/out.txt']
  looks = jax.device_get(network.init(jax.random.key(0), hidden=4, looks=3))
  models.save(tmp_path / 'looks.npz', looks, motion.NOISE, tracker.RULES)
  (tmp_path / 'text.npz').write_text('no such thing')
  for name, says in (
    ('none.npz', 'train a tracker by'),
    ('text.npz', 'is damaged, cut short or no tracker: it is no file .npz'),
    ('looks.npz', 'it needs features of identity'),
  ):
    assert track.main([f'--checkpoint={tmp_path}/{name}', *arguments]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count('\n') == 1
  models.save(tmp_path / 'search.npz', weights, motion.NOISE, tracker.RULES)
  (tmp_path / 'folder.gif').mkdir()
  for name, says in (('a.mp4', 'a .png, of one'), ('folder.gif', 'a folder')):
    flags = [f'--checkpoint={tmp_path}', f'--overlay={tmp_path}/{name}']
    assert track.main([*flags, *arguments]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count('\n') == 1
  boxes = mot_files.make([1], [[1, 1, 5, 5]], ids=[1])
  info = mot_files.Info('a', 3, 20, 10, 25.0)
  with pytest.raises(harness.SettingsError, match=r'a \.png, of one frame'):
    overlay.write(tmp_path / 'a.jpg', boxes, info)
  with pytest.raises(harness.MissingDataError, match=r'000002\.jpg or \.png'):
    overlay.write(tmp_path / 'a.png', boxes, info, images=tmp_path)


def test_confidences_are_those_that_a_tracker_knows(tmp_path, weights, capsys):
  models.save(tmp_path / 'search.npz', weights, motion.NOISE, tracker.RULES)
  given = tmp_path / 'det.txt'
  arguments = [
    f'--checkpoint={tmp_path}',
    f'--detections={given}',
    f'--output={tmp_path}/out.txt',
  ]

  def tracked(*confidences, flags=()):
    """The exit status, what was said, and the result."""
    given.write_text(
      ''.join(
        f'{frame},-1,{10 + frame},20,30,40,{sure}\n'
        for frame, sure in enumerate(confidences, 1)
      )
    )
    status = track.main([*arguments, *flags])
    said = capsys.readouterr()
    return status, said.err, (tmp_path / 'out.txt').read_text()

  status, _, wanted = tracked(1, 1, 1, 1, 1)
  assert status == 0 and wanted
  # Minus one is that a file has none.
  status, said, found = tracked(-1, -1, -1, -1, -1)
  assert (status, found) == (0, wanted) and 'are -1: 1 is taken' in said
  for wrong, says in (
    ((90, 80, 70), 'from 70 to 90'),
    ((-0.5, 0.5, 0.9), 'from -0.5 to 0.9'),
    ((-1, -0.5, -2), 'from -2 to -0.5'),
  ):
    status, said, _ = tracked(*wrong)
    assert status == 1 and says in said and 'seventh column' in said
  # What is no number is no box.
  status, said, _ = tracked(1, 'nan', 'inf', 1)
  assert status == 0 and '2 boxes that are not finite' in said
  for flag in (
    '--hypotheses=0',
    '--delay=-1',
    '--least_confidence=nan',
    '--least_confidence=2',
  ):
    status, said, _ = tracked(1, 1, flags=(flag,))
    assert status == 1 and said.count('\n') == 1 and 'at least one' in said


def test_a_box_is_drawn_where_it_is():
  boxes = mot_files.make([2, 2], [[10, 20, 30, 40], [80, 20, 9, 9]], ids=[1, 2])
  info = mot_files.Info('a', 3, 100, 100, 25.0)
  picture = np.asarray(overlay.draw(boxes, info, 2))
  assert picture.shape == (100, 100, 3)
  assert picture[40, 10].tolist() == picture[60, 25].tolist() == [213, 94, 0]
  assert picture[90, 90].tolist() == [255, 255, 255]
  assert (np.asarray(overlay.draw(boxes, info, 1)) == 255).all()
  # A number hides no small box, nor lies outside of the picture.
  for top in (40, 0):
    small = mot_files.make([2], [[10, top, 8, 9]], ids=[7])
    picture = np.asarray(overlay.draw(small, info, 2))
    inside = picture[top + 2 : top + 3, 12:17]
    assert (inside == 255).all()
    assert (picture[:, 20:] == 255).all() and (picture[60:] == 255).all()
    drawn = (picture[:, :20] != 255).any(axis=(1, 2))
    assert drawn[28:40].any() if top else drawn[10:22].any()
