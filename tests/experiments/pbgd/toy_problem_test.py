"""Minima, starts and distances of the toy problem."""

import jax.numpy as jnp
import numpy as np
import scipy.optimize

import bilevel_jax as bj
from experiments.pbgd import toy_problem


def test_minima_agree_with_scipy():
  def loss(x):
    wave = np.cos(2 - 4 * x) / (1 + np.exp(2 - 4 * x))
    return wave + 0.5 * np.log((4 * x - 2) ** 2 + 1)

  minima = toy_problem.local_minima()
  brackets = [(0.9, 1.5), (0.1, 0.7), (2.5, 3.0)]  # The global one first.
  expected = [
    scipy.optimize.minimize_scalar(
      loss, bounds=bracket, method='bounded', options={'xatol': 1e-10}
    ).x
    for bracket in brackets
  ]
  np.testing.assert_allclose(minima, expected, atol=1e-6)
  assert np.all(np.diff(loss(minima)) > 0)


def test_minima_at_the_ends_of_the_interval():
  minima = toy_problem.local_minima(jnp.sin, 0.0, 3.0, 101)
  np.testing.assert_allclose(minima, [0.0, 3.0], atol=1e-12)


def test_lower_minimisers_are_on_the_line():
  x, y = np.meshgrid(np.linspace(0, 3, 31), np.linspace(-5, 8.5, 136))
  assert np.min(toy_problem.lower_loss(x, y)) >= 0
  np.testing.assert_allclose(toy_problem.lower_loss(x, -x), 0, atol=1e-12)


def test_starts_fill_the_rectangle_and_differ_between_seeds():
  starts = toy_problem.draw_starts((0, 1), 500)
  for z, (low, high) in zip(
    starts, (toy_problem.X_RANGE, toy_problem.Y_RANGE), strict=True
  ):
    assert z.shape == (1000,)
    assert low <= z.min() < low + 0.1 * (high - low)
    assert high - 0.1 * (high - low) < z.max() <= high
    assert len(np.unique(z)) > 990


def test_distance_is_the_larger_of_both_coordinates():
  params = bj.BilevelParams(np.array([1.0, 1.01]), np.array([5.0, -1.02]))
  distances = toy_problem.distances_to(np.array([1.0]), params)
  np.testing.assert_allclose(distances[:, 0], [6.0, 0.02])
