"""V-PBSGD: what is drawn, how inner steps fall, how noise falls with M."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

PROBLEM = bj.BilevelProblem(
  upper=lambda x, y, batch: jnp.mean((y - 1 - batch['f']) ** 2) / 2,
  lower=lambda x, y, batch: jnp.mean((y - x * (1 + batch['g'])) ** 2) / 2,
)


def solver_of(inner_steps=8, value_rate=0.9, rate=0.02, **kwargs):
  return bj.solvers.v_pbsgd(
    PROBLEM,
    penalty=5.0,
    upper=optax.sgd(rate),
    lower=optax.sgd(rate),
    value_rate=value_rate,
    inner_steps=inner_steps,
    key=jax.random.key(3),
    **kwargs,
  )


def plain(batch, t):
  del t
  return {'f': 0 * batch['f'], 'g': 0 * batch['g']}


def test_error_falls_with_the_samples_of_the_outer_step():
  """The first inner step is exact, whatever is drawn: M is what is left."""
  solver = solver_of(2, value_rate=1.0, rate=0.1, inner_batch=plain)

  @functools.partial(jax.jit, static_argnums=1)
  def variance(key, size):
    def step(carry, key):
      params, state = carry
      one, two = jax.random.split(key)
      batch = {
        'f': jax.random.normal(one, (size,)),
        'g': 0.5 * jax.random.normal(two, (size,)),
      }
      updates, state = solver.update(batch, state, params)
      return (bj.apply_updates(params, updates), state), params.upper

    params = bj.BilevelParams(jnp.float32(1.0), jnp.float32(1.0))
    _, path = jax.lax.scan(
      step, (params, solver.init(params)), jax.random.split(key, 800)
    )
    return path[300:].var()

  def mean_variance(size):
    keys = jax.random.split(jax.random.key(0), 8)
    return float(jax.vmap(lambda key: variance(key, size))(keys).mean())

  few, more, most = map(mean_variance, (1, 8, 64))
  # As 1 / M: eight times fewer at each.
  assert 4 < few / more < 16, (few, more)
  assert 4 < more / most < 16, (more, most)


def test_error_falls_with_the_inner_steps_where_they_are_noisy():
  def error(steps):
    solver = solver_of(
      steps, inner_batch=lambda batch, t: {'f': batch['f'], 'g': batch['g'][t]}
    )
    params = bj.BilevelParams(jnp.float32(2.0), jnp.float32(0.0))
    state = solver.init(params)

    @jax.jit
    def one(key):
      noise = jax.random.normal(key, (steps, 1))
      batch = {'f': jnp.zeros(1), 'g': 0.5 * noise}
      now = state._replace(
        inner=(state.inner[0]._replace(key=key), state.inner[1])
      )
      # The outer step is given one sample: its update is not looked at.
      _, after = solver.update(batch, now, params)
      return (bj.auxiliaries(after)['value'] - 2.0) ** 2

    return float(jax.vmap(one)(jax.random.split(jax.random.key(1), 500)).mean())

  short, long = error(4), error(32)
  assert long < 0.6 * short


def drawn(steps, weights, draws=2000):
  count = bj.oracle(lambda p, batch, s: ((p,), jnp.ones(()), s), ('at',))
  solver = bj.repeat_drawn(
    optax.chain(count, optax.sgd(-1.0)), steps, weights, key=jax.random.key(0)
  )
  state = solver.init(jnp.float32(0.0))

  def step(state, _):
    updates, state = solver.update(None, state, jnp.float32(0.0))
    return state, updates

  _, ends = jax.jit(lambda s: jax.lax.scan(step, s, length=draws))(state)
  return np.asarray(ends)


def test_points_are_drawn_as_often_as_their_weights_say():
  ends = drawn(5, lambda t: 1 / jnp.sqrt(1.0 + t))
  found = np.array([(ends == t).mean() for t in range(1, 6)])
  wanted = 1 / np.sqrt(np.arange(1, 6))
  wanted /= wanted.sum()
  np.testing.assert_allclose(found, wanted, atol=0.04)


def test_the_inner_step_falls_within_a_restart_and_starts_again():
  """One coordinate, whose slope says which step was taken."""
  moves = []
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: 0 * x * y, lower=lambda x, y, batch: y + 0 * x
  )
  solver = bj.solvers.v_pbsgd(
    problem,
    penalty=1.0,
    upper=optax.sgd(0.0),
    lower=optax.sgd(0.0),
    value_rate=lambda k: 1.0 / (1 + k),
    inner_steps=4,
    key=jax.random.key(0),
  )
  params = bj.BilevelParams(jnp.float32(0.0), jnp.float32(0.0))
  state = solver.init(params)
  step = jax.jit(solver.update)
  for k in range(12):
    _, state = step(None, state, params)
    moves.append(float(bj.auxiliaries(state)['value']) * (1 + k))
  ends = -np.cumsum(1 / np.sqrt([1, 2, 3, 4]))
  distance = np.abs(np.array(moves)[:, None] - ends).min(axis=1)
  np.testing.assert_allclose(distance, 0, atol=1e-5)
  assert len({round(m, 3) for m in moves}) > 1


def test_the_value_sequence_stays_in_the_lower_set():
  solver = solver_of(
    lower_set=functools.partial(
      optax.projections.projection_box, lower=-0.1, upper=0.1
    )
  )
  params = bj.BilevelParams(jnp.float32(4.0), jnp.float32(0.0))
  batch = {'f': jnp.zeros(2), 'g': jnp.zeros(2)}
  _, state = solver.update(batch, solver.init(params), params)
  np.testing.assert_allclose(bj.auxiliaries(state)['value'], 0.1, rtol=1e-6)


def test_another_key_draws_other_points():
  params = bj.BilevelParams(jnp.float32(4.0), jnp.float32(0.0))
  batch = {'f': jnp.zeros(2), 'g': jnp.zeros(2)}
  solver = solver_of()
  state = solver.init(params)
  values = set()
  for _ in range(8):
    _, state = solver.update(batch, state, params)
    values.add(float(bj.auxiliaries(state)['value']))
  assert len(values) > 1


def test_steps_below_one():
  with pytest.raises(ValueError, match='steps >= 1'):
    solver_of(inner_steps=0)
