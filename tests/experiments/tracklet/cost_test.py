"""The cost of an update of each way of training."""

import jax
import numpy as np
import pytest

from experiments.tracking import detections, motion, network, scenes
from experiments.tracklet import cost, learning, rollout_training


@pytest.mark.slow
def test_each_way_has_a_cost():
  scene = scenes.make_up(3, length=60, people=14)
  detected = detections.simulate(
    scene.truth, scene.info, np.random.default_rng(0), detections.HARD
  )
  task = learning.Task(
    detections.pad([detected]),
    motion.NOISE,
    *(4, {'steps': 4, 'jumps': 0.3, 'max_gap': 9}, 4),
  )
  weights = jax.vmap(lambda key: network.init(key, hidden=4))(
    jax.random.split(jax.random.key(0), 2)
  )
  costs = cost.measure(
    task,
    [detected],
    weights,
    learning.Search(2, 4),
    rollout_training.Rollouts(redraw=2, frames=30, rows=8),
    updates=2,
    rounds=1,
  )
  assert sorted(costs) == ['rollouts', 'search', 'teacher_forcing']
  assert all(seconds > 0 for seconds in costs.values())
