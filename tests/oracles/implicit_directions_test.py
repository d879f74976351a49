"""The three directions: closed forms, finite differences, unbiasedness."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract
from tests.contract import COORDINATES, Row


def _row(wrap, rate):
  oracle = wrap(bj.implicit_directions(contract.PROBLEM))
  return contract.by_descent(oracle, upper=rate, lower=rate, linear=rate)


def _in_turn(wrap, rate):
  """Each direction where the ones before it have moved the sequences."""
  oracles = [
    wrap(bj.implicit_directions(contract.PROBLEM, of=name))
    for name in ('lower', 'linear', 'upper')
  ]
  sgd = optax.sgd(rate)
  return bj.descend(*oracles, upper=sgd, lower=sgd, linear=sgd)


_START = contract.with_sequence(linear=np.linspace(-0.5, 1.0, COORDINATES))

ROWS = (
  Row(
    'implicit_directions',
    _row,
    {
      'gradients/upper': 1,
      'gradients/lower': 1,
      'hessian_vector_products/lower': 1,
    },
    params=_START,
    light=True,
  ),
  Row(
    'implicit_directions, in turn',
    _in_turn,
    {
      'gradients/upper': 2,
      'gradients/lower': 3,
      'hessian_vector_products/lower': 2,
    },
    params=_START,
  ),
)


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
  whole, _ = jax.jit(one.update)(batch, one.init(params), params)
  rows, _ = jax.jit(two.update)(batch, two.init(params), params)
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


def test_at_the_solution_it_is_the_hypergradient(x64):
  """Against the implicit function theorem, written down densely."""
  params, batch = draw(1, jnp.float64)
  oracle = bj.implicit_directions(PROBLEM)

  @jax.jit
  def both(x, y):
    slope = lambda x, y: jax.grad(lower, 1)(x, y, batch)
    hessian = jax.jacobian(slope, 1)

    def newton(_, y):
      return y - jnp.linalg.solve(hessian(x, y), slope(x, y))

    y = jax.lax.fori_loop(0, 30, newton, y)
    f_x, f_y = jax.grad(upper, (0, 1))(x, y, batch)
    v = jnp.linalg.solve(hessian(x, y), f_y)
    cross = jax.jacobian(slope)(x, y)['a']
    point = bj.sequences(upper=x, lower=y, linear=v)
    found, _ = oracle.update(batch, oracle.init(point), point)
    return found, f_x['a'] - cross.T @ v

  found, exact = both(params.upper, params.lower)
  np.testing.assert_allclose(found.upper['a'], exact, rtol=1e-9)
  np.testing.assert_allclose(found.linear, 0, atol=1e-9)
  np.testing.assert_allclose(found.lower, 0, atol=1e-9)


def test_missing_sequence():
  oracle = bj.implicit_directions(PROBLEM)
  params = bj.BilevelParams({'a': jnp.ones(3)}, jnp.ones(3))
  with pytest.raises(TypeError, match='linear'):
    oracle.update(jnp.ones(3), oracle.init(params), params)
