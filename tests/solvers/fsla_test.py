"""Tests of FSLA against its equations, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract
from tests.contract import RATE, Row


def _row(wrap, rate, decay):
  sgd = optax.sgd(rate)
  solver = bj.solvers.fsla(contract.PROBLEM, decay=decay, upper=sgd, lower=sgd)
  return bj.evaluation.wrapped(solver, wrap)


ROWS = (
  Row(
    'fsla',
    _row,
    {
      'gradients/upper': 3,
      'gradients/lower': 4,
      'hessian_vector_products/lower': 3,
    },
    hyper={'rate': RATE, 'decay': 0.3},
  ),
)

MATRIX = np.array([[2.0, 0.3], [0.3, 1.0]])
CROSS = np.array([[0.5, -0.2, 0.1], [0.4, 0.6, -0.3]])


def lower(x, y, batch):
  return y @ (MATRIX @ y) / 2 - y @ (CROSS @ x) + batch * jnp.cosh(y).sum()


def upper(x, y, batch):
  return jnp.sum((y - batch) ** 2) + 0.1 * jnp.sum(x**4) + x[:2] @ y


def by_hand(x, y, batches, decay, rates):
  """Three upper, lower and linear steps a batch, in this order."""
  v, held, before = np.zeros(2), None, None
  f_y, g_y = jax.grad(upper, 1), jax.grad(lower, 1)
  hessian = jax.hessian(lower, 1)
  cross = jax.jacobian(g_y, 0)

  def hypergradient(x, y, v, batch):
    return jax.grad(upper)(x, y, batch) - cross(x, y, batch).T @ v

  for batch in batches:
    y_new = y - rates[0] * g_y(x, y, batch)
    pull = hessian(x, y_new, batch) @ v - f_y(x, y_new, batch)
    v_new = v - rates[1] * pull
    now = hypergradient(x, y_new, v_new, batch)
    if held is not None:
      now += (1 - decay) * (held - hypergradient(*before, batch))
    before, held = (x, y_new, v_new), now
    x, y, v = x - rates[2] * now, y_new, v_new
  return x, y, v


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_takes_the_steps_of_its_equations(dtype):
  with jax.enable_x64(dtype == 'float64'):
    x, y = jnp.array([0.3, -0.2, 0.5], dtype), jnp.array([0.1, 0.4], dtype)
    batches = jnp.array([0.1, 0.5, 0.2, 0.7], dtype)
    solver = bj.solvers.fsla(
      bj.BilevelProblem(upper, lower),
      decay=0.3,
      upper=optax.sgd(0.05),
      lower=optax.sgd(0.2),
      linear=optax.sgd(0.1),
    )
    params, update = bj.BilevelParams(x, y), jax.jit(solver.update)
    state = solver.init(params)
    for batch in batches:
      updates, state = update(batch, state, params)
      params = optax.apply_updates(params, updates)
    found = (*params, bj.auxiliaries(state)['linear'])
    loop = jax.jit(lambda *at: by_hand(*at, 0.3, (0.2, 0.1, 0.05)))
    wanted = loop(x, y, batches)
    for ours, theirs in zip(found, wanted, strict=True):
      np.testing.assert_allclose(
        ours, theirs, rtol=1e-11 if dtype == 'float64' else 2e-5
      )
