"""The synthetic problem: closed forms, noise and stationarity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments.aipod import quadratic
from tests.tiers import first

SIZE = 20


def draw(matrices='uniform', objective='published'):
  instance = quadratic.draw_instance(3, matrices, objective, SIZE)
  return jax.tree.map(jnp.asarray, instance)


def draw_noise(instance, scale=0.0, key=0):
  return quadratic.draw_noise(
    jax.random.key(key), instance, scale, lower_steps=3, upper_steps=2
  )


@pytest.mark.slow
@pytest.mark.parametrize('matrices', first(['orthonormal', 'uniform']))
def test_hypergradient_agrees_with_finite_differences_and_the_oracle(
  matrices,
):
  with jax.enable_x64(True):
    instance = draw(matrices)
    x = jax.random.normal(jax.random.key(0), (SIZE,)) / 4
    y = quadratic.minimiser(instance, x)
    np.testing.assert_allclose(
      instance.lower_factors.matrix @ y + instance.h @ x, 0, atol=1e-9
    )
    total = lambda x: quadratic.smooth_loss(
      x, quadratic.minimiser(instance, x), instance.c, instance.d
    )
    unit = 1e-5 * jnp.eye(SIZE)
    slopes = [(total(x + e) - total(x - e)) / 2e-5 for e in unit]
    exact = quadratic.hypergradient(instance, x)
    np.testing.assert_allclose(exact, slopes, rtol=1e-5, atol=1e-7)
    oracle = bj.implicit(
      quadratic.PROBLEM,
      solve=bj.linear_solvers.conjugate_gradient(1),
      lower_set=quadratic.make_sets(instance)['lower'],
    )
    params = bj.BilevelParams(x, y)
    batch = draw_noise(instance)
    gradient, _ = oracle.update(batch, oracle.init(params), params)
    np.testing.assert_allclose(gradient.upper, exact, rtol=1e-8)


def test_released_gradient_omits_the_dependence_of_the_set():
  with jax.enable_x64(True):
    instance = draw()
    x = jax.random.normal(jax.random.key(0), (SIZE,)) / 4
    exact = quadratic.hypergradient(instance, x)
    released = quadratic.hypergradient(instance, x, released=True)
    assert jnp.linalg.norm(exact - released) > 0.5 * jnp.linalg.norm(exact)
    still = instance._replace(h=0 * instance.h)
    np.testing.assert_allclose(
      quadratic.hypergradient(still, x),
      quadratic.hypergradient(still, x, released=True),
      rtol=1e-10,
    )


def test_matrices_are_as_described():
  uniform, orthonormal = draw('uniform'), draw('orthonormal')
  assert uniform.upper_factors.row_space.shape == (16, SIZE)
  assert uniform.upper_factors.matrix.shape == (18, SIZE)
  a = np.asarray(orthonormal.lower_factors.matrix)
  np.testing.assert_allclose(a @ a.T, np.eye(18), atol=1e-5)
  assert not np.any(draw(objective='released').c)
  assert np.any(uniform.c)


def test_noise_of_gradients_differs_between_steps():
  instance = draw()
  noise = draw_noise(instance, 0.1)
  x = y = jnp.ones(SIZE) / 9
  quiet = draw_noise(instance)
  for loss, at, expected in (
    (quadratic.upper_loss, 0, noise.upper[0]),
    (quadratic.upper_loss, 1, noise.upper[1]),
  ):
    gap = jax.grad(loss, at)(x, y, noise) - jax.grad(loss, at)(x, y, quiet)
    np.testing.assert_allclose(gap, expected, atol=1e-6)
  first, second = (
    jax.grad(quadratic.lower_loss, 1)(x, y, quadratic.lower_batch(noise, t))
    for t in (0, 1)
  )
  np.testing.assert_allclose(
    first - second, noise.lower[0] - noise.lower[1], atol=1e-6
  )
  assert 0.05 < float(jnp.std(noise.lower)) < 0.2


def test_stationarity_by_hand():
  instance = draw('orthonormal')
  x, y = jnp.ones(SIZE) / 9, jnp.linspace(-1.0, 1.0, SIZE)
  slope = quadratic.hypergradient(instance, x)
  slope = quadratic.make_sets(instance)['upper'].tangent(slope)
  gap = y - quadratic.minimiser(instance, x)
  measure = quadratic.stationarity(instance, x, y)
  np.testing.assert_allclose(measure, slope @ slope + gap @ gap, 1e-4)
