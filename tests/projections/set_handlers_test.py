"""Lazy and relaxed sets: references, coins and control variates."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from bilevel_jax.projections import _set_handlers

S = bj.Sequence
Lazy, Relaxed = bj.projections.Lazy, bj.projections.Relaxed
MATRIX = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, -1.0]])
SET = bj.projections.affine_set(MATRIX, [1.0, 0.5])
START = bj.sequences(z=jnp.array([0.3, 0.1, -0.2]))
PULL = bj.gradient(lambda p, goal: jnp.sum((p.z - goal) ** 2) / 2, of='z')
RATE = 0.2


def make_solver(set_):
  return bj.descend(PULL, z=S(optax.sgd(RATE), set=set_))


def run(set_, steps, start=START, goal=1.0):
  """Descends |z - goal|^2 / 2; returns points, states of the set, counts."""
  solver = make_solver(set_)

  def body(carry, _):
    params, state = carry
    updates, state = solver.update(goal, state, params)
    params = bj.apply_updates(params, updates)
    set_ = state.sets.get('z', ())
    return (params, state), (params.z, set_, bj.counts(state))

  start = (start, solver.init(start))
  run_all = jax.jit(lambda c: jax.lax.scan(body, c, length=steps)[1])
  points, states, counts = run_all(start)
  return np.asarray(points), states, counts


# On a flat set the projection removes any multiple of the control variate.
BOX = lambda z: jnp.clip(z, -0.2, 0.3)


@pytest.mark.parametrize('set_', [SET, BOX], ids=['flat', 'box'])
def test_lazy_projections_match_the_published_form(set_):
  """There the control variate r is in units of a gradient."""
  p = 0.4
  points, states, counts = run(Lazy(set_, p, key=5), 12)
  z, r, before, sides = np.asarray(START.z), np.zeros(3), 0, set()
  for k in range(12):
    free = z - RATE * ((z - 1) - r)
    now = counts['projections/z'][k]
    heads, before = bool(now > before), now
    sides.add(heads)
    if heads:
      z = np.asarray(set_(jnp.asarray(free - RATE / p * r, jnp.float32)))
      r = r + p / RATE * (z - free)
    else:
      z = free
    np.testing.assert_allclose(points[k], z, atol=1e-5)
    np.testing.assert_allclose(states.control[k], RATE * r, atol=1e-5)
  assert sides == {True, False}


def test_probability_one_always_projects():
  lazy, *_ = run(Lazy(SET, 1.0, key=0), 6)
  eager, *_ = run(SET, 6)
  np.testing.assert_allclose(lazy, eager, rtol=1e-6, atol=1e-6)


def test_converges_to_the_constrained_minimum_only_with_the_control_variate():
  goal = SET(jnp.ones(3))
  for control, room in ((True, 1e-5), (False, 0.1)):
    points, *_ = run(Lazy(SET, 0.3, 1, control), 400)
    gap = np.abs(points[350:] - goal).max()
    assert (gap < room) == control


def test_coins_have_the_probability_and_differ_with_key_and_name():
  key = jax.random.key(0)
  heads = lambda key, name='z': [
    int(n) for n in np.diff(coins(Lazy(SET, 0.3, key), name, 200), prepend=0)
  ]
  first = heads(0)
  assert abs(sum(first) - 60) < 4 * (200 * 0.3 * 0.7) ** 0.5
  # An integer, a typed key and a raw key are equivalent.
  assert first == heads(key) == heads(jax.random.PRNGKey(0))
  assert first != heads(1)
  assert first != heads(0, 'w')


def coins(set_, name, steps):
  """The number of projections so far, after each step."""
  handler = _set_handlers.make_handler(name, set_)
  point = bj.sequences(**{name: START.z})

  def body(state, _):
    _, state = handler.each(point, point, state)
    return state, state.counts[f'projections/{name}']

  run_all = jax.jit(lambda s: jax.lax.scan(body, s, length=steps)[1])
  return np.asarray(run_all(handler.init(point)))


def test_probability_may_be_a_schedule():
  never_then_always = lambda count: jnp.where(count < 3, 0.0, 1.0)
  *_, counts = run(Lazy(SET, never_then_always, 0), 6)
  totals = counts['projections/z']
  np.testing.assert_array_equal(totals, [0, 0, 0, 1, 2, 3])


def test_the_key_survives_the_donation_of_the_state():
  key = jax.random.key(3)
  solver = make_solver(Lazy(SET, 0.5, key=key))
  step = jax.jit(solver.update, donate_argnums=1)
  for _ in range(2):
    step(1.0, solver.init(START), START)
  assert not key.is_deleted()


def test_vmap_with_a_key_per_member():
  def last(key):
    solver = make_solver(Lazy(SET, 0.5, key))
    params, state = START, solver.init(START)
    for _ in range(4):
      updates, state = solver.update(1.0, state, params)
      params = bj.apply_updates(params, updates)
    return params.z

  keys = jax.random.split(jax.random.key(0), 3)
  together = jax.jit(jax.vmap(last))(keys)
  one_by_one = jax.jit(lambda keys: jax.lax.map(last, keys))(keys)
  chex.assert_trees_all_close(together, one_by_one, rtol=1e-6)
  assert len(np.unique(np.asarray(together)[:, 0])) > 1


def test_a_relaxed_step_extrapolates_before_projection():
  points, *_ = run(Relaxed(SET, lambda k: 1.0 + k), 3)
  z = np.asarray(START.z)
  for k, point in enumerate(points):
    z = np.asarray(SET(jnp.asarray(z + (1 + k) * RATE * (1 - z), jnp.float32)))
    np.testing.assert_allclose(point, z, atol=1e-5)


def test_clients_on_devices_match_one_device():
  """In a checked shard_map, where the type of a mean differs from its terms."""
  mesh = jax.make_mesh(
    (4,), ('clients',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec
  set_ = lambda *axis: Lazy(bj.projections.consensus_set(*axis), 0.5, 1)
  solver = make_solver(set_('clients'))

  def one(z, goal):
    params = bj.sequences(z=z)
    state = solver.init(params)
    for _ in range(4):
      updates, state = solver.update(goal, state, params)
      params = bj.apply_updates(params, updates)
    return params.z

  copies, goals = jnp.zeros((4, 2)), jnp.arange(8.0).reshape(4, 2)
  over = jax.jit(
    jax.shard_map(
      one,
      mesh=mesh,
      in_specs=(spec('clients'), spec('clients')),
      out_specs=spec('clients'),
    )
  )
  totals = jax.block_until_ready(over(copies, goals))
  points, *_ = run(set_(), 4, bj.sequences(z=copies), goals)
  np.testing.assert_allclose(totals, points[-1], atol=1e-6)
  spread = points[..., 0].std(1)
  assert spread.min() < 1e-6 < spread.max()
