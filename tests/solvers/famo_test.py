"""FAMO by hand, and what it balances."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract
from tests.contract import OBJECTIVES, Row


def _row(wrap, rate):
  solver = bj.solvers.famo(
    lambda params, batch: 1 + contract.three_losses(params, batch),
    OBJECTIVES,
    optimiser=optax.sgd(rate),
  )
  return bj.evaluation.wrapped(solver, wrap)


ROWS = (
  Row(
    'famo',
    _row,
    {'gradients/weighted': 1},
    params=contract.flat_params,
    devices=True,
  ),
)


def losses(x, batch):
  return jnp.stack([(x - 1) ** 2 + 1, 4 * (x + 2) ** 2 + 2]) * batch


def test_two_updates_by_hand():
  rate, decay, minima = 0.1, 0.01, np.array([0.5, 1.0])
  solver = bj.solvers.famo(
    losses,
    2,
    optimiser=optax.sgd(0.05),
    weight_rate=rate,
    weight_decay=decay,
    minima=minima,
  )
  x, batch = 0.3, 1.5
  value = lambda x: np.array([(x - 1) ** 2 + 1, 4 * (x + 2) ** 2 + 2]) * batch
  slope = lambda x: np.array([2 * (x - 1), 8 * (x + 2)]) * batch
  logits, first, second = np.zeros(2), np.zeros(2), np.zeros(2)
  params = jnp.float32(x)
  state = solver.init(params)
  for k in range(1, 3):
    updates, state = solver.update(jnp.float32(batch), state, params)
    params = optax.apply_updates(params, updates)
    soft = np.exp(logits) / np.exp(logits).sum()
    height = value(x) - minima
    weights = soft / height / (soft / height).sum()
    x = x - 0.05 * weights @ slope(x)
    fell = np.log(height) - np.log(value(x) - minima)
    gradient = soft * (fell - soft @ fell) + decay * logits
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient**2
    step = first / (1 - 0.9**k)
    step /= np.sqrt(second / (1 - 0.999**k)) + 1e-8
    logits = logits - rate * step
    np.testing.assert_allclose(params, x, rtol=1e-5)
    np.testing.assert_allclose(state.weights, weights, rtol=1e-5)
    np.testing.assert_allclose(state.logits, logits, rtol=1e-3)
  assert bj.counts(state) == {'gradients/weighted': 2}


def test_the_loss_that_falls_slower_gets_more_weight():
  """Relative to its size, the first loss is flat and the second steep."""

  def uneven(x, batch):
    return jnp.stack([jnp.sum((x - 2) ** 2) + 50, jnp.sum(x**2) + 0.1])

  solver = bj.solvers.famo(uneven, 2, optimiser=optax.sgd(1e-2))
  params = jnp.array([1.0])
  state, step = solver.init(params), jax.jit(solver.update)
  for _ in range(100):
    updates, state = step(None, state, params)
    params = optax.apply_updates(params, updates)
  assert state.logits[0] > state.logits[1]


def test_errors():
  with pytest.raises(ValueError, match='weight_decay'):
    bj.solvers.famo(losses, 2, optimiser=optax.sgd(1.0), weight_decay=-1.0)
  with pytest.raises(ValueError, match='minima'):
    bj.solvers.famo(losses, 2, optimiser=optax.sgd(1.0), minima=[1.0, 2.0, 3.0])
