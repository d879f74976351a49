"""The three directions: closed forms, finite differences, unbiasedness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj


def upper(x, y, batch):
  return jnp.sum(jnp.sin(x['a']) * batch) + jnp.sum(y**2 * jnp.exp(x['a'][0]))


def lower(x, y, batch):
  return jnp.sum(jnp.cosh(y - batch * x['a'])) + jnp.vdot(y, y) * x['a'][1] ** 2


PROBLEM = bj.BilevelProblem(upper, lower)


def draw(seed, dtype):
  x, y, v, batch = jax.random.normal(jax.random.key(seed), (4, 3), dtype)
  return bj.sequences(upper={'a': x}, lower=y, linear=v), batch


@pytest.mark.parametrize('seed', range(3))
def test_against_matrices_of_finite_differences(seed):
  with jax.enable_x64(True):
    params, batch = draw(seed, jnp.float64)
    oracle = bj.implicit_directions(PROBLEM)
    found, state = oracle.update(batch, oracle.init(params), params)
    x, y, v = params.upper['a'], params.lower, params.linear
    h = 1e-5
    basis = np.eye(3) * h

    def differences(f, at):
      return np.array([(f(at + e) - f(at - e)) / (2 * h) for e in basis])

    f = lambda x, y: upper({'a': x}, y, batch)
    g = lambda x, y: lower({'a': x}, y, batch)
    g_y = lambda x, y: differences(lambda y: g(x, y), y)
    hessian = differences(lambda y: g_y(x, y), y)
    cross = differences(lambda x: g_y(x, y), x)  # Rows of x.
    f_x, f_y = (
      differences(lambda x: f(x, y), x),
      differences(lambda y: f(x, y), y),
    )
    close = {'rtol': 1e-4, 'atol': 1e-4}
    np.testing.assert_allclose(found.upper['a'], f_x - cross @ v, **close)
    np.testing.assert_allclose(found.lower, g_y(x, y), **close)
    np.testing.assert_allclose(found.linear, hessian @ v - f_y, **close)
    np.testing.assert_allclose(bj.values(state)['upper'], f(x, y))
    np.testing.assert_allclose(bj.values(state)['lower'], g(x, y))


def test_rows_add_up():
  params, batch = draw(0, jnp.float32)
  one, two = (
    bj.implicit_directions(PROBLEM),
    bj.implicit_directions(PROBLEM, rows=True),
  )
  whole, _ = one.update(batch, one.init(params), params)
  rows, _ = two.update(batch, two.init(params), params)
  added = jax.tree.map(lambda r: r.sum(0), rows.rows)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    added,
    whole,
  )


def test_batches_of_their_own():
  params, batch = draw(0, jnp.float32)
  oracle = bj.implicit_directions(PROBLEM, batches=lambda b: (b['f'], b['g']))
  found, state = oracle.update(
    {'f': batch, 'g': 2 * batch}, oracle.init(params), params
  )
  x, y = params.upper, params.lower
  np.testing.assert_allclose(bj.values(state)['upper'], upper(x, y, batch))
  np.testing.assert_allclose(
    found.lower, jax.grad(lower, 1)(x, y, 2 * batch), rtol=1e-5
  )


def test_at_the_solution_it_is_the_hypergradient():
  with jax.enable_x64(True):
    params, batch = draw(1, jnp.float64)
    pair = bj.BilevelParams(params.upper, params.lower)
    y = bj.diagnostics.lower_minimiser(PROBLEM, pair, batch, steps=100)
    pair = pair._replace(lower=y)
    hessian = jax.hessian(lower, 1)(pair.upper, y, batch)
    v = jnp.linalg.solve(hessian, jax.grad(upper, 1)(pair.upper, y, batch))
    params = bj.sequences(upper=pair.upper, lower=y, linear=v)
    oracle = bj.implicit_directions(PROBLEM)
    found, _ = oracle.update(batch, oracle.init(params), params)
    exact = bj.hypergradient(PROBLEM, pair, batch, tolerance=1e-12)
    np.testing.assert_allclose(found.upper['a'], exact['a'], rtol=1e-6)
    np.testing.assert_allclose(found.linear, 0, atol=1e-8)


def test_missing_sequence():
  oracle = bj.implicit_directions(PROBLEM)
  params = bj.BilevelParams({'a': jnp.ones(3)}, jnp.ones(3))
  with pytest.raises(TypeError, match='linear'):
    oracle.update(jnp.ones(3), oracle.init(params), params)
