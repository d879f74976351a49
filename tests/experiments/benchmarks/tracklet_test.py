"""What is compared is the same work, on the same windows and detections."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.benchmarks import tracklet

SMALL = tracklet.Settings(
  hidden=8, hypotheses=(1,), window=3, batch=2, people=4, length=40, rounds=1
)


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


def test_peers_that_are_not_there_are_not_measured(
  options, results, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv(tracklet.peers.PYTHON_VARIABLE, str(tmp_path / 'none'))
  made = {}
  monkeypatch.setattr(
    tracklet, 'program', lambda s, k: made.setdefault('one', _Fake(k))
  )
  tracklet.main(options(SMALL))
  assert 'are not timed' in capsys.readouterr().out
  kept = results()
  assert 'speed_ratio/bytetrack' not in kept['metrics']
  assert kept['metrics']['memory_ratio/search_k1'] == 1
  assert 'not measured' in (tmp_path / 'table.md').read_text()


@pytest.mark.slow
def test_speed_is_that_of_as_many_networks_as_train_writes(monkeypatch):
  assert tracklet.Settings().members == tracklet.train.Settings().members > 1
  weights = tracklet.trained(dataclasses.replace(SMALL, updates=1))
  key = jax.random.split(jax.random.key(2), 1)[0]
  for member in range(SMALL.members):
    update, start, batch = tracklet.step(SMALL, 0, seed=1, member=member)
    wanted = jax.jit(update)(start, batch(key))[0]
    for name, before in start[0].items():
      np.testing.assert_allclose(weights[name][member], wanted[name], atol=1e-5)
      assert np.abs(weights[name][member] - before).max() > 1e-4
  given = tracklet.crowd(dataclasses.replace(SMALL, length=10))
  clocks = iter((np.array([10.0, 1.0]), np.array([12.0, 5.0])))
  monkeypatch.setattr(tracklet.peer_trackers, 'clocks', lambda: next(clocks))
  np.testing.assert_allclose(
    tracklet.frames_per_second(given, weights), [5.0, 2.5]
  )


def test_scenes_are_a_crowd_a_sparse_one_and_mot17(tmp_path):
  small = dataclasses.replace(SMALL, people=9, sparse_people=2)
  timed = tracklet.timed_scenes(small, None)
  counts = {name: len(one.boxes.frames) for name, one in timed.items()}
  assert set(counts) == {'crowd', 'sparse'}
  assert counts['crowd'] > 2 * counts['sparse'] > 0
  with pytest.raises(tracklet.harness.MissingDataError):
    tracklet.timed_scenes(small, str(tmp_path))


class _Fake:
  """A program that does nothing."""

  memory = 1

  def __init__(self, k):
    self.k = k

  def run(self, steps):
    sum(range(20_000 * steps))
