"""What the contract's quadratic cannot tell of the stochastic family."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

SIZE = 3
MATRIX = jnp.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 1.5]])
MIX = jnp.array([[0.5, 1.0, 0.0], [0.0, -0.4, 0.3], [1.0, 0.2, 0.1]])


def upper(x, y, batch):
  return jnp.sum((y - 1) ** 2) + jnp.sum(jnp.sin(x))


def lower(x, y, batch):
  return y @ MATRIX @ y / 2 - y @ (MIX @ x)


PROBLEM = bj.BilevelProblem(upper, lower)


def minimiser(x):
  return jnp.linalg.solve(MATRIX, MIX @ x)


def hypergradient(x):
  return jax.grad(lambda x: upper(x, minimiser(x), None))(x)


def params_at(x):
  return bj.BilevelParams(x, minimiser(x))


X = jnp.array([0.3, -0.7, 1.1])


def test_stable_keeps_y_at_the_minimiser_while_x_moves():
  # No lower step at all: what moves y is the correction alone.
  solver = bj.solvers.stable(
    PROBLEM,
    upper=optax.sgd(0.1),
    lower=optax.sgd(0.0),
    decay=0.5,
    least_curvature=0.1,
  )
  params = params_at(X)
  state = solver.init(params)
  for _ in range(5):
    expected = -0.1 * hypergradient(params.upper)
    updates, state = solver.update(None, state, params)
    np.testing.assert_allclose(updates.upper, expected, rtol=1e-4, atol=1e-5)
    params = bj.apply_updates(params, updates)
    np.testing.assert_allclose(
      params.lower, minimiser(params.upper), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize('directions', [1, 2, 3])
def test_pzobo_is_the_hypergradient_on_average(directions):
  solver = lambda key: bj.solvers.pzobo(
    PROBLEM,
    upper=optax.sgd(1.0),
    step_size=0.4,
    inner_steps=60,
    smoothing=0.1,
    directions=directions,
    key=key,
  )
  params = params_at(X)

  def one(key):
    made = solver(key)
    return -made.update(None, made.init(params), params)[0].upper

  found = jax.vmap(one)(jax.random.split(jax.random.key(0), 500))
  exact = hypergradient(X)
  error = found.std(0) / np.sqrt(500)
  assert np.all(np.abs(found.mean(0) - exact) < 5 * error + 1e-3)
  if directions == SIZE:  # All directions: no noise is left.
    assert found.std(0).max() < 1e-3


def test_vrbo_moves_x_once_and_y_often():
  solver = bj.solvers.vrbo(
    PROBLEM,
    upper=optax.sgd(0.1),
    lower=optax.sgd(0.1),
    terms=3,
    step_size=0.3,
    period=5,
    inner_steps=4,
  )
  params = bj.BilevelParams(X, jnp.zeros(SIZE))
  updates, _ = solver.update(None, solver.init(params), params)
  # Without noise the estimates are exact: y takes four plain steps, the last
  # from where three have led, and x one at that point.
  y = params.lower
  for _ in range(3):
    y = y - 0.1 * jax.grad(lower, 1)(X, y, None)
  end = y - 0.1 * jax.grad(lower, 1)(X, y, None)
  np.testing.assert_allclose(updates.lower, end, rtol=1e-5)
  q = bj.linear_solvers.neumann(3, 0.3)(lambda v: MATRIX @ v, 2 * (y - 1))
  slope = jnp.cos(X) + MIX.T @ q
  np.testing.assert_allclose(updates.upper, -0.1 * slope, rtol=1e-4, atol=1e-6)


def noisy(loss):
  """Adds a slope of mean zero in all variables."""
  return lambda x, y, batch: loss(x, y, batch) + batch @ jnp.concatenate([x, y])


def spread_of(decay):
  """Mean squared hypergradient of a run with noise, after its start."""
  solver = bj.solvers.mrbo(
    bj.BilevelProblem(noisy(upper), noisy(lower)),
    upper=optax.sgd(0.02),
    lower=optax.sgd(0.05),
    terms=40,
    step_size=0.4,
    decay=decay,
  )
  params = params_at(X)

  @jax.jit
  def run(keys, state):
    def body(carry, key):
      params, state = carry
      batch = jax.random.normal(key, (2 * SIZE,))
      updates, state = solver.update(batch, state, params)
      return (bj.apply_updates(params, updates), state), params.upper

    return jax.lax.scan(body, (params, state), keys)[1][500:]

  found = run(jax.random.split(jax.random.key(1), 4_000), solver.init(params))
  return jnp.mean(jax.vmap(hypergradient)(found) ** 2)


def test_momentum_takes_out_noise():
  assert spread_of(0.05) < spread_of(1.0) / 2


def test_sustain_draws_one_length_for_both_points():
  # At a point that does not move, decay 0 keeps the first estimate exactly if
  # both evaluations draw one length of the series.
  solver = bj.solvers.sustain(
    PROBLEM,
    upper=optax.sgd(0.0),
    lower=optax.sgd(0.0),
    terms=6,
    step_size=0.3,
    decay=0.0,
  )
  params = bj.BilevelParams(X, jnp.ones(SIZE))
  state, step = solver.init(params), jax.jit(solver.update)
  _, state = step(None, state, params)
  first = state[0].direction.upper
  for _ in range(4):
    _, state = step(None, state, params)
    np.testing.assert_allclose(state[0].direction.upper, first, rtol=1e-5)


def test_meha_follows_the_gradient_of_the_moreau_envelope():
  wavy = lambda x, y, batch: jnp.sum(jnp.cos(2 * y - x)) + jnp.sum(y**2) / 8
  length = 0.2  # The least curvature is -4 + 1/4.
  x, y = X, jnp.array([0.2, 0.4, -0.6])

  def envelope(x, y):
    start = bj.BilevelParams(x, y)
    near = lambda x, w, batch: (
      wavy(x, w, batch) + jnp.sum((w - y) ** 2) / (2 * length)
    )
    w = bj.diagnostics.lower_minimiser(
      bj.BilevelProblem(near, near), start, steps=40
    )
    return near(x, w, None), w

  with jax.enable_x64(True):
    x, y = jnp.asarray(x, jnp.float64), jnp.asarray(y, jnp.float64)
    w = envelope(x, y)[1]
    oracle = bj.value_gap(bj.BilevelProblem(upper, wavy), proximity=length)
    params = bj.sequences(upper=x, lower=y, value=w)
    found, state = oracle.update(None, oracle.init(params), params)
    gap = jax.jit(lambda x, y: wavy(x, y, None) - envelope(x, y)[0])
    np.testing.assert_allclose(bj.values(state)['gap'], gap(x, y), rtol=1e-8)
    h = 1e-4
    for i in range(SIZE):
      step = jnp.zeros(SIZE).at[i].set(h)
      by_x = (gap(x + step, y) - gap(x - step, y)) / (2 * h)
      by_y = (gap(x, y + step) - gap(x, y - step)) / (2 * h)
      np.testing.assert_allclose(found.rows.upper[1, i], by_x, atol=1e-5)
      np.testing.assert_allclose(found.rows.lower[1, i], by_y, atol=1e-5)


def test_stable_raises_small_curvatures():
  flat = lambda x, y, batch: 0.01 * jnp.vdot(y, y) / 2 - jnp.vdot(x, y)
  solver = bj.solvers.stable(
    bj.BilevelProblem(lambda x, y, batch: jnp.sum(y), flat),
    upper=optax.sgd(1.0),
    lower=optax.sgd(0.0),
    decay=1.0,
    least_curvature=0.5,
  )
  params = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
  updates, _ = solver.update(None, solver.init(params), params)
  np.testing.assert_allclose(updates.upper, -2.0, rtol=1e-5)  # Not -100.


def test_errors():
  with pytest.raises(ValueError, match='least_curvature'):
    bj.solvers.stable(
      PROBLEM,
      upper=optax.sgd(0.1),
      lower=optax.sgd(0.1),
      decay=0.5,
      least_curvature=0.0,
    )
  sgd = {'upper': optax.sgd(0.1), 'lower': optax.sgd(0.1)}
  with pytest.raises(ValueError, match='length > 0'):
    bj.meha(PROBLEM, penalty=1.0, proximity=0.0, **sgd)
  with pytest.raises(ValueError, match='smoothing > 0'):
    bj.solvers.pzobo(
      PROBLEM, upper=optax.sgd(0.1), step_size=0.1, smoothing=0.0
    )
  with pytest.raises(ValueError, match='period is at least 1'):
    bj.solvers.vrbo(
      PROBLEM, terms=1, step_size=0.1, period=0, inner_steps=1, **sgd
    )
  with pytest.raises(ValueError, match='decay is in'):
    bj.solvers.sustain(PROBLEM, terms=1, step_size=0.1, decay=-1.0, **sgd)
