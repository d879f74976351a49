"""VRBO against the recursion written down in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

RATES, MOVES, PERIOD, TERMS, ETA = (0.05, 0.1), 3, 2, 3, 0.2
RNG = np.random.default_rng(0)
# Coupled, dense, and not quadratic in either variable.
COUPLING, TILT = RNG.normal(size=(2, 3, 2))


def upper(x, y, batch):
  return jnp.sum(jnp.sin(y) * batch['f']) + jnp.sum((x - y @ TILT) ** 2) / 2


def lower(x, y, batch):
  pull = y - jnp.asarray(COUPLING, y.dtype) @ jnp.tanh(x) - batch['g']
  return (
    jnp.sum(pull**2) / 2
    + jnp.sum(jnp.logaddexp(y, -y))
    + (jnp.vdot(batch['h'] @ y, y) / 2)
  )


def directions(x, y, batch):
  """The truncated hypergradient and the lower slope, by hand."""
  f_x = x - y @ TILT
  f_y = np.cos(y) * batch['f'] - TILT @ f_x
  pull = y - COUPLING @ np.tanh(x) - batch['g']
  symmetric = (batch['h'] + batch['h'].T) / 2
  hessian = np.eye(3) + np.diag(1 / np.cosh(y) ** 2) + symmetric
  q = ETA * f_y
  for _ in range(TERMS):
    q = q + ETA * (f_y - hessian @ q)
  cross = -(COUPLING / np.cosh(x) ** 2).T  # Rows by x, columns by y.
  return f_x - cross @ q, pull + np.tanh(y) + symmetric @ y


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
def test_equals_the_recursion_by_hand(dtype):
  """Period 2, three moves, and a large batch of its own."""
  draw = lambda *shape: {
    'f': RNG.normal(size=(*shape, 3)),
    'g': RNG.normal(size=(*shape, 3)),
    'h': RNG.normal(size=(*shape, 3, 3)) / 4,
  }
  batches = [{'small': draw(MOVES), 'large': draw()} for _ in range(5)]
  pick = lambda tree, t: jax.tree.map(lambda leaf: leaf[t], tree)
  with jax.enable_x64(dtype == jnp.float64):
    solver = bj.solvers.vrbo(
      bj.BilevelProblem(upper, lower),
      terms=TERMS,
      step_size=ETA,
      period=PERIOD,
      large_batch=lambda batch: batch['large'],
      upper=optax.sgd(RATES[0]),
      lower=bj.Sequence(
        optax.sgd(RATES[1]),
        steps=MOVES,
        batch_at=lambda batch, t: pick(batch['small'], t),
      ),
    )
    x, y = np.array([0.3, -0.8]), np.array([0.5, 1.0, -0.2])
    params = bj.BilevelParams(jnp.asarray(x, dtype), jnp.asarray(y, dtype))
    state, step = solver.init(params), jax.jit(solver.update)
    spent = 0
    behind = x, y
    for k, batch in enumerate(batches):
      cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), batch)
      updates, state = step(cast, state, params)
      params = bj.apply_updates(params, updates)
      for t in range(MOVES):
        if t == 0 and k % PERIOD == 0:
          estimate = directions(x, y, batch['large'])
          spent += 1
        else:
          small = pick(batch['small'], t)
          here, there = directions(x, y, small), directions(*behind, small)
          estimate = [
            d + a - b for d, a, b in zip(estimate, here, there, strict=True)
          ]
          spent += 2
        behind = x, y
        y = y - RATES[1] * estimate[1]
        if t == MOVES - 1:
          x = x - RATES[0] * estimate[0]
      tolerance = 1e-4 if dtype == jnp.float32 else 1e-10
      np.testing.assert_allclose(params.upper, x, rtol=tolerance)
      np.testing.assert_allclose(params.lower, y, rtol=tolerance)
    assert bj.counts(state)['gradients/lower'] == spent
