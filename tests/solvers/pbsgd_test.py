"""V-PBSGD: what is drawn, how inner steps fall, how noise falls with M."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract
from tests.contract import INNER, PENALISED, Row

S = bj.Sequence


def _row(wrap, penalty, rate):
  sgd = optax.sgd(rate)
  solver = bj.solvers.v_pbsgd(
    contract.PROBLEM,
    penalty=penalty,
    upper=sgd,
    lower=sgd,
    value=bj.solvers.RandomStop(
      rate, INNER, jax.random.key(7), contract.inner_batch
    ),
  )
  return bj.evaluation.wrapped(solver, wrap)


ROWS = (
  Row(
    'v_pbsgd',
    _row,
    {'gradients/upper': 1, 'gradients/lower': 2 + INNER},
    hyper=PENALISED,
    keys=True,
  ),
)

PROBLEM = bj.BilevelProblem(
  upper=lambda x, y, batch: jnp.mean((y - 1 - batch['f']) ** 2) / 2,
  lower=lambda x, y, batch: jnp.mean((y - x * (1 + batch['g'])) ** 2) / 2,
)
ZERO = {'f': np.zeros(2, np.float32), 'g': np.zeros(2, np.float32)}


def solver_of(
  steps=8, *, value_rate=0.9, rate=0.02, key=3, batch_at=None, **given
):
  given = {'problem': PROBLEM, 'lower': optax.sgd(rate)} | given
  value = bj.solvers.RandomStop(value_rate, steps, key, batch_at)
  return bj.solvers.v_pbsgd(
    penalty=5.0, upper=optax.sgd(rate), value=value, **given
  )


def params_at(x, y):
  return bj.BilevelParams(jnp.float32(x), jnp.float32(y))


def values_of_keys(make, params, batch, keys):
  """The value sequence after one update, for each key of the draws."""

  def one(key, batch):
    solver = make(key)
    _, state = solver.update(batch, solver.init(params), params)
    return bj.auxiliaries(state)['value']

  return jax.jit(jax.vmap(one))(keys, batch)


def test_error_falls_with_the_samples_of_the_outer_step():
  """The first inner step is exact, whatever is drawn: M is what is left."""
  exact = lambda batch, t: jax.tree.map(jnp.zeros_like, batch)
  solver = solver_of(2, value_rate=1.0, rate=0.1, batch_at=exact)

  @jax.jit
  def variance(keys, share):
    # Noise of M samples is that of one over the root of M.
    def step(carry, key):
      params, state = carry
      f, g = jax.random.normal(key, (2, 1)) * share
      updates, state = solver.update({'f': f, 'g': 0.5 * g}, state, params)
      return (bj.apply_updates(params, updates), state), params.upper

    def path(key):
      params = params_at(1, 1)
      start = (params, solver.init(params))
      return jax.lax.scan(step, start, jax.random.split(key, 800))[1]

    return jax.vmap(path)(keys)[:, 300:].var(1).mean()

  keys = jax.random.split(jax.random.key(0), 8)
  few, more, most = (variance(keys, m**-0.5) for m in (1, 8, 64))
  # As 1 / M: eight times fewer at each.
  assert 4 < few / more < 16, (few, more)
  assert 4 < more / most < 16, (more, most)


def test_error_falls_with_the_inner_steps_where_they_are_noisy():
  def error(steps):
    pick = lambda batch, t: {'f': batch['f'], 'g': batch['g'][t]}
    make = lambda key: solver_of(steps, key=key, batch_at=pick)
    keys = jax.random.split(jax.random.key(1), 500)
    noise = jax.random.normal(jax.random.key(2), (500, steps, 1))
    # The outer step is given one sample: its update is not looked at.
    batch = {'f': jnp.zeros((500, 1)), 'g': 0.5 * noise}
    found = values_of_keys(make, params_at(2, 0), batch, keys)
    return jnp.mean((found - 2.0) ** 2)

  assert error(32) < 0.6 * error(4)


# One coordinate, whose slope of one says which step was taken.
STRAIGHT = bj.BilevelProblem(
  upper=lambda x, y, batch: 0 * x * y, lower=lambda x, y, batch: y + 0 * x
)


def test_inner_steps_fall_and_points_are_drawn_as_often_as_they_say():
  make = lambda key: solver_of(5, problem=STRAIGHT, value_rate=1.0, key=key)
  keys = jax.random.split(jax.random.key(0), 2_000)
  none = jnp.zeros(len(keys))
  found = values_of_keys(make, params_at(0, 0), none, keys)
  ends = -np.cumsum(1 / np.sqrt(np.arange(1, 6)))
  which = np.abs(np.asarray(found)[:, None] - ends).argmin(1)
  np.testing.assert_allclose(found, ends[which], atol=1e-5)
  wanted = 1 / np.sqrt(np.arange(1, 6))
  share = np.bincount(which, minlength=5) / len(keys)
  np.testing.assert_allclose(share, wanted / wanted.sum(), atol=0.04)


def test_a_schedule_of_inner_steps_is_of_updates_and_draws_go_on():
  rate = lambda count: 1.0 / (1 + count)
  solver = solver_of(4, problem=STRAIGHT, value_rate=rate)
  params = params_at(0, 0)
  state, step = solver.init(params), jax.jit(solver.update)
  moves = []
  for k in range(12):
    _, state = step(None, state, params)
    moves.append(float(bj.auxiliaries(state)['value']) * (1 + k))
  ends = -np.cumsum(1 / np.sqrt([1, 2, 3, 4]))
  distance = np.abs(np.array(moves)[:, None] - ends).min(axis=1)
  np.testing.assert_allclose(distance, 0, atol=1e-5)
  assert len({round(m, 3) for m in moves}) > 1


def test_the_value_sequence_stays_in_the_lower_set():
  box = functools.partial(
    optax.projections.projection_box, lower=-0.1, upper=0.1
  )
  solver = solver_of(lower=S(optax.sgd(0.02), set=box))
  params = params_at(4, 0)
  _, state = jax.jit(solver.update)(ZERO, solver.init(params), params)
  np.testing.assert_allclose(bj.auxiliaries(state)['value'], 0.1, rtol=1e-6)


def test_steps_below_one():
  with pytest.raises(ValueError, match='inner steps >= 1'):
    solver_of(0)
