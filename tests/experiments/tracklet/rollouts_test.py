"""Histories of the tracker: against loops, and an oracle that finds all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.tracking import (
  baselines,
  detections,
  motion,
  network,
  scenes,
  tracker,
)
from experiments.tracklet import learning, rollout_training, rollouts, windows

MODEL = baselines.overlap(motion.NOISE, min_overlap=0.05)
RULES = tracker.Rules(birth=1)


@pytest.fixture(scope='module')
def detected():
  """A crowd, in which the overlap of boxes confuses people."""
  scene = scenes.make_up(3, length=60, people=14)
  return detections.simulate(
    scene.truth, scene.info, np.random.default_rng(0), detections.HARD
  )


def test_recorded_histories_are_the_tracks(detected):
  found = rollouts.record(MODEL, detected, RULES)
  alone = tracker.online(MODEL, detected, RULES)
  for one, two in zip(found.boxes, alone):
    np.testing.assert_array_equal(one, two)
  # With a birth at once, each reported track is a history.
  rows = detected.boxes.by_frame(detected.info.length)
  wanted = {
    tuple(
      map(tuple, np.c_[alone.frames, alone.boxes][alone.ids == one].tolist())
    )
    for one in np.unique(alone.ids)
  }
  assert wanted == {
    tuple(
      (frame + 1.0, *detected.boxes.boxes[rows[frame][index]].tolist())
      for frame, index in history
      if index >= 0
    )
    for history in found.histories
  }


def test_errors_are_counted_on_pure_and_mixed_histories(detected):
  ids = np.array([5, 5, 7, 7, 5, -1, 5])
  small = detected._replace(
    boxes=detected.boxes.where(np.arange(7))._replace(frames=np.arange(1, 8)),
    ids=ids,
    embedding=detected.embedding[:7],
    info=detected.info._replace(length=7),
  )
  history = [(i, 0) for i in range(7)]
  # 5-5 and 5-7 are pure; 7-7, 7-5 and 5-(-1) mixed; a false one has no target.
  assert rollouts.count_errors(small, [history]) == pytest.approx(
    (5, 3 / 5, 1 / 2, 2 / 3)
  )
  missed = [(0, 0), (1, -1), (2, 0)]
  assert rollouts.count_errors(small, [missed]) == (1, 0.0, 1.0, 0.0)


def test_the_oracle_makes_no_error_on_mixed_histories(detected):
  plain = rollouts.record(MODEL, detected, RULES)
  before = rollouts.count_errors(detected, plain.histories)
  assert before.wrong_pure > 0 and before.wrong_mixed > 0.02
  helped = rollouts.record(MODEL, detected, RULES, oracle='last')
  after = rollouts.count_errors(detected, helped.histories)
  assert after.wrong_mixed == 0 and after.wrong_pure > 0
  # The last person is followed after a false detection, too.
  person = rollouts.record(MODEL, detected, RULES, oracle='person')
  errors = rollouts.count_errors(detected, person.histories)
  assert errors.wrong_mixed == 0 and errors.mixed > after.mixed
  # The majority's oracle goes back to the first person.
  back = rollouts.record(MODEL, detected, RULES, oracle='majority')
  assert rollouts.count_errors(detected, back.histories).wrong_mixed > 0


def test_windows_have_the_choices_of_the_history_and_its_last_person(detected):
  found = rollouts.record(MODEL, detected, RULES)
  offset, steps = detected.info.length, 6
  data = detections.pad([detected, detected])
  rows = rollouts.cut(
    detected,
    found.histories,
    rows=200,
    steps=steps,
    length=5,
    offset=offset,
    mixed_share=0.5,
    rng=np.random.default_rng(0),
  )
  assert rows.count.max() == 5 and rows.count.min() >= 1
  drawn = jax.device_get(
    jax.jit(windows.from_histories)(jax.tree.map(jnp.asarray, data), rows)
  )
  by_frame = detected.boxes.by_frame(detected.info.length)
  mixed = 0
  pairs = {pair for history in found.histories for pair in history}
  for row in range(200):
    person, persons = -1, set()
    for step in range(rows.count[row] + 1):
      frame, index = rows.frames[row, step], rows.index[row, step]
      assert (frame - offset, index) in pairs
      assert drawn.inside[row, step]
      here = detected.ids[by_frame[frame - offset]]
      chosen = np.flatnonzero(drawn.is_chosen[row, step])
      assert chosen.tolist() == ([index] if index >= 0 else [])
      target = np.flatnonzero(drawn.is_target[row, step]).tolist()
      if step == 0:
        assert target == [index]
      else:
        wanted = [] if person < 0 else np.flatnonzero(here == person).tolist()
        assert target == wanted
        gap = frame - rows.frames[row, step - 1]
        assert drawn.gaps[row, step] == gap >= 1
      if index >= 0:
        person = here[index] if here[index] >= 0 else person
        persons.add(here[index])
    mixed += len(persons) > 1
    assert not drawn.inside[row, rows.count[row] + 1 :].any()
  assert mixed / 200 == pytest.approx(0.5, abs=0.12)


@pytest.mark.slow
def test_training_on_own_histories_continues_over_redraws(
  detected, options, tmp_path
):
  """The parts are one run of Adam, and a second call reads their results."""
  data = detections.pad([detected])
  task = learning.Task(
    data, motion.NOISE, 4, {'steps': 4, 'jumps': 0.3, 'max_gap': 9}, 4
  )
  settings = rollout_training.Rollouts(redraw=2, frames=30, rows=8)
  start = jax.vmap(lambda key: network.init(key, hidden=4))(
    jax.random.split(jax.random.key(0), 2)
  )
  given = options(rollout_training.Rollouts())._replace(seeds=(0, 1))
  run = learning.Run(given, {}, chunk=2)

  def train():
    return rollout_training.train(
      task,
      run,
      [detected],
      settings,
      name='own',
      rate=1e-2,
      steps=3,
      start=start,
    )

  found = train()
  assert found.steps.tolist() == [2, 3] and found.step == 3
  counts = [x for x in jax.tree.leaves(found.state) if x.dtype == np.int32]
  assert all((np.asarray(x) == 3).all() for x in counts) and counts
  assert isinstance(found, harness.Trained)
  assert np.isfinite(found.history['loss/loss']).all()
  again = train()
  for one, two in zip(
    jax.tree.leaves(found.params), jax.tree.leaves(again.params)
  ):
    np.testing.assert_array_equal(one, two)
