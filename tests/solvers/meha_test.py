"""MEHA: descends along the gradient of a Moreau envelope's gap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import PENALISED, Row


def _row(wrap, penalty, rate):
  sgd = optax.sgd(rate)
  solver = bj.meha(
    contract.PROBLEM,
    penalty=penalty,
    proximity=2.0,
    upper=sgd,
    lower=sgd,
  )
  return bj.evaluation.wrapped(solver, wrap)


ROWS = (
  Row(
    'meha',
    _row,
    {'gradients/upper': 1, 'gradients/lower': 3},
    hyper=PENALISED,
  ),
)


def test_follows_the_gradient_of_the_moreau_envelope(x64):
  """By finite differences of the envelope, whose minimiser Newton finds."""
  wavy = lambda x, y, batch: jnp.sum(jnp.cos(2 * y - x)) + jnp.sum(y**2) / 8
  length = 0.2  # The least curvature is -4 + 1/4.
  near = lambda x, w, y: wavy(x, w, None) + jnp.sum((w - y) ** 2) / (2 * length)

  @jax.jit
  def minimiser(x, y):
    def newton(_, w):
      slope = jax.grad(near, 1)(x, w, y)
      return w - jnp.linalg.solve(jax.hessian(near, 1)(x, w, y), slope)

    return jax.lax.fori_loop(0, 40, newton, y)

  def gap(point):
    x, y = point
    return wavy(x, y, None) - near(x, minimiser(x, y), y)

  x, y = jnp.array([[0.3, -0.7, 1.1], [0.2, 0.4, -0.6]])
  oracle = bj.value_gap(
    bj.BilevelProblem(problems.MIXED.upper, wavy), proximity=length
  )
  params = bj.sequences(upper=x, lower=y, value=minimiser(x, y))
  found, state = oracle.update(None, oracle.init(params), params)
  np.testing.assert_allclose(bj.values(state)['gap'], gap((x, y)), rtol=1e-8)
  by_x, by_y = problems.by_differences(gap, (x, y), 1e-4)
  np.testing.assert_allclose(found.rows.upper[1], by_x, atol=1e-5)
  np.testing.assert_allclose(found.rows.lower[1], by_y, atol=1e-5)


def test_a_proximity_of_zero():
  sgd = {'upper': optax.sgd(0.1), 'lower': optax.sgd(0.1)}
  with pytest.raises(ValueError, match='length > 0'):
    bj.meha(problems.MIXED, penalty=1.0, proximity=0.0, **sgd)
