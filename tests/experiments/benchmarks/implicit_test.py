"""The benchmark of the implicit hypergradient, small: counts and exponents."""

import numpy as np
import pytest

from experiments import harness
from experiments.benchmarks import implicit

SETTINGS = implicit.Settings(
  parameters=20_000, rows=32, sizes=(5_000, 20_000), rounds=1
)


@pytest.mark.slow
def test_operations_are_those_of_the_products(tmp_path, capsys):
  options = harness.Options(
    'benchmarks', 'implicit', 'paper', SETTINGS, str(tmp_path), None, (0,)
  )
  metrics = implicit.main(options)
  # Two gradients for each product, less in the first layer.
  assert 0.7 < metrics['flops_ratio'] <= implicit.BOUND_FLOPS
  assert metrics['bytes_exponent'] < implicit.BOUND_EXPONENT
  assert 'FLOPs' in capsys.readouterr().out


def test_sizes_are_about_those_asked_for():
  for size in (1_000, 100_000):
    count = implicit.weighted_digits(size, 2).count
    assert count == pytest.approx(size, rel=0.05)


def test_exponent_of_a_power():
  sizes = np.array([1.0, 10.0, 100.0])
  assert implicit.exponent(sizes, 3 * sizes**1.5) == pytest.approx(1.5)
