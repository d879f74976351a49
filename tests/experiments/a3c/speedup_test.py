"""Running averages and speedups by hand."""

import numpy as np
import pytest

from experiments.a3c import speedup


def test_running_average_by_hand():
  means = np.array([[1.0], [3.0], [5.0], [7.0]])
  average = speedup.running_average(means, 2)
  np.testing.assert_allclose(average[:, 0], [1, 2, 4, 6])
  np.testing.assert_allclose(speedup.running_average(means, 9)[-1], 4)


def test_speedup_of_equal_curves_is_the_number_of_workers():
  steps = 10 * np.arange(1, 6)
  curve = np.array([0.1, 0.3, 0.2, 0.5, 0.6])
  assert speedup.first_at(curve, steps, 0.3) == 20
  assert speedup.first_at(curve, steps, 0.9) == np.inf
  runs = np.stack([curve] * 3, axis=1)
  same = speedup.speedup(runs, runs, 8, steps, 0.3)
  assert same.mean == 8 and same.half_width == 0
  later = np.roll(runs, 1, axis=0) * [[0], [1], [1], [1], [1]]
  assert speedup.speedup(runs, later, 8, steps, 0.3).mean == 8 * 2 / 3


def test_target_that_is_never_reached():
  steps = np.arange(1, 4)
  low, high = np.zeros((3, 2)), np.ones((3, 2))
  assert speedup.speedup(high, low, 4, steps, 0.5).mean == 0
  assert np.isnan(speedup.speedup(low, high, 4, steps, 0.5).mean)


def test_interval_by_leaving_out_one_run():
  """Jackknife of three runs: two reach the target at 2, one at 4."""
  steps = np.arange(1, 5)
  ones = np.tile([[0.0], [1.0], [1.0], [1.0]], 3)
  many = ones.copy()
  many[:, 2] = [-1.0, -1.0, -1.0, 1.0]
  # At step 2 the mean is 1/3; without the third run 1, without another 0.
  interval = speedup.speedup(ones, many, 2, steps, 0.5)
  assert interval.mean == pytest.approx(2 * 2 / 4)
  values = np.array([2 * 2 / 4, 2 * 2 / 4, 2 * 2 / 2])
  spread = 2 / 3 * np.sum((values - values.mean()) ** 2)
  assert interval.half_width == pytest.approx(
    4.302653 * np.sqrt(spread), rel=1e-6
  )
