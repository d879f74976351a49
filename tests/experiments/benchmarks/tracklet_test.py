"""What is compared is the same work, on the same windows and detections."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import tracklet
from experiments.tracklet import train

SMALL = tracklet.Sizes(hidden=8, window=3, batch=2, people=4, length=40)


@pytest.mark.slow
def test_a_search_carries_more_than_the_truth():
  base, one = (tracklet.program(SMALL, k) for k in (0, 1))
  for a, b in zip(jax.tree.leaves(base.carry), jax.tree.leaves(one.carry)):
    np.testing.assert_array_equal(a, b)
  assert 1.3 * base.flops <= one.flops <= 6 * base.flops
  before = jax.device_get(base.carry[0])
  base.run(2)
  moved = [
    np.any(a != b) for a, b in zip(before.values(), base.carry[0].values())
  ]
  assert all(moved)


@pytest.mark.slow
def test_speed_is_that_of_as_many_networks_as_train_writes(monkeypatch):
  assert tracklet.Sizes().members == train.Settings().network.members > 1
  weights = tracklet.trained(SMALL._replace(updates=1))
  key = jax.random.split(jax.random.key(2), 1)[0]
  for member in range(SMALL.members):
    update, start, batch = tracklet.step(SMALL, 0, seed=1, member=member)
    wanted = jax.jit(update)(start, batch(key))[0]
    for name, before in start[0].items():
      np.testing.assert_allclose(weights[name][member], wanted[name], atol=1e-5)
      assert np.abs(weights[name][member] - before).max() > 1e-4
  given = tracklet.crowd(SMALL._replace(length=10))
  clocks = iter((np.array([10.0, 1.0]), np.array([12.0, 5.0])) * 2)
  monkeypatch.setattr(tracklet.peer_trackers, 'clocks', lambda: next(clocks))
  for live in (False, True):
    spent = tracklet.time_tracker(given, weights, live=live)
    np.testing.assert_allclose(spent, [2.0, 4.0])


def test_scenes_are_a_crowd_a_sparse_one_and_mot17(tmp_path):
  small = SMALL._replace(people=9, sparse_people=2)
  crowd, sparse = (
    len(tracklet.scene(name, small, None).boxes.frames)
    for name in ('crowd', 'sparse')
  )
  assert crowd > 2 * sparse > 0
  for folder in (None, str(tmp_path)):
    with pytest.raises(tracklet.harness.MissingDataError):
      tracklet.scene('mot17', small, folder)
