"""Lazy projection: by hand, its coin, its control variate, its errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj

MATRIX = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, -1.0]])
SET = bj.projections.affine_set(MATRIX, [1.0, 0.5])
START = bj.BilevelParams(None, jnp.array([0.3, 0.1, -0.2]))


def run(link, steps, params=START, pull=1.0):
  """Descends |z - pull|^2 / 2 by steps of 0.2; all points and states."""

  @jax.jit
  def step(params, state):
    updates = params._replace(lower=0.2 * (pull - params.lower))
    updates, state = link.update(updates, state, params)
    return bj.apply_updates(params, updates), state

  state, points = link.init(params), []
  for _ in range(steps):
    params, state = step(params, state)
    points.append((params, state))
  return points


def test_by_hand():
  p, beta = 0.4, 0.2
  z, r = np.asarray(START.lower), np.zeros(3)
  seen = set()
  before = 0
  for params, state in run(bj.lazy_projection(p, key=5, lower=SET), 12):
    # The published form: r in units of a gradient.
    free = z - beta * ((z - 1) - r)
    now = bj.counts(state)['projections/lower']
    heads, before = now > before, now
    seen.add(heads)
    if heads:
      z = np.asarray(SET(jnp.asarray(free - beta / p * r, jnp.float32)))
      r = r + p / beta * (z - free)
    else:
      z = free
    np.testing.assert_allclose(params.lower, z, atol=1e-5)
    np.testing.assert_allclose(state.control['lower'], beta * r, atol=1e-5)
  assert seen == {True, False}


def test_probability_one_is_project_bit_for_bit():
  lazy = run(bj.lazy_projection(1.0, lower=SET), 6)
  eager = run(bj.project(lower=SET), 6)
  for one, two in zip(lazy, eager, strict=True):
    chex.assert_trees_all_equal(one[0], two[0])


def test_converges_to_the_constrained_minimum_only_with_the_control_variate():
  goal = SET(jnp.ones(3))
  ends = {}
  for control in (True, False):
    link = bj.lazy_projection(0.3, key=1, control_variate=control, lower=SET)
    step = jax.jit(link.update)
    params, state, gap = START, link.init(START), 0.0
    for t in range(400):
      updates = params._replace(lower=0.2 * (1 - params.lower))
      updates, state = step(updates, state, params)
      params = bj.apply_updates(params, updates)
      if t >= 350:
        gap = max(gap, float(jnp.max(jnp.abs(params.lower - goal))))
    ends[control] = gap
  assert ends[True] < 1e-5
  assert ends[False] > 0.1


def test_coins_have_the_probability_and_differ_with_the_key():
  heads = lambda key: [
    bj.counts(state)['projections/lower']
    for _, state in run(bj.lazy_projection(0.3, key=key, lower=SET), 200)
  ]
  first = heads(0)
  assert abs(first[-1] - 60) < 4 * (200 * 0.3 * 0.7) ** 0.5
  assert first != heads(1)
  assert first == heads(jax.random.key(0))


def test_one_coin_for_all_sequences():
  link = bj.lazy_projection(0.5, key=2, upper=SET, lower=SET)
  params = bj.BilevelParams(START.lower, START.lower)
  state = link.init(params)
  counts = []
  for _ in range(20):
    updates = bj.BilevelParams(*(0.1 * jnp.ones(3),) * 2)
    _, state = link.update(updates, state, params)
    counts.append(bj.counts(state))
  assert all(c['projections/upper'] == c['projections/lower'] for c in counts)
  assert 0 < counts[-1]['projections/lower'] < 20


def test_probability_may_be_a_schedule_of_the_updates():
  never_then_always = lambda count: jnp.where(count < 3, 0.0, 1.0)
  points = run(bj.lazy_projection(never_then_always, lower=SET), 6)
  counts = [bj.counts(state)['projections/lower'] for _, state in points]
  assert counts == [0, 0, 0, 1, 2, 3]


def test_a_sequence_without_an_update_stays():
  link = bj.lazy_projection(1.0, upper=SET, lower=SET)
  params = bj.BilevelParams(START.lower, START.lower)
  updates, state = link.update(
    bj.BilevelParams(None, jnp.ones(3)), link.init(params), params
  )
  assert updates.upper is None
  assert bj.counts(state) == {'projections/upper': 0, 'projections/lower': 1}
  assert not np.any(state.control['upper'])


def test_the_key_outlives_a_donated_state():
  key = jax.random.key(3)
  link = bj.lazy_projection(0.5, key=key, lower=SET)
  step = jax.jit(link.update, donate_argnums=1)
  for _ in range(2):
    step(START, link.init(START), START)
  assert not key.is_deleted()


@pytest.mark.parametrize('probability', [0.0, -0.1, 1.5])
def test_probabilities_outside_are_errors(probability):
  with pytest.raises(ValueError, match='probability is in'):
    bj.lazy_projection(probability, lower=SET)


def test_a_jacobian_is_an_error():
  link = bj.lazy_projection(0.5, lower=SET)
  with pytest.raises(TypeError, match='aggregator'):
    link.update(bj.Jacobian(START), link.init(START), START)


def test_clients_stay_together_over_devices():
  """In a checked shard_map, where a mean is of another type than its terms."""
  mesh = jax.make_mesh(
    (4,), ('clients',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec
  link = bj.lazy_projection(
    0.5, key=1, lower=bj.projections.consensus_set('clients')
  )
  local = bj.lazy_projection(0.5, key=1, lower=bj.projections.consensus_set())

  def one(params, pull):
    state = link.init(params)
    for _ in range(8):
      updates = params._replace(lower=0.2 * (pull - params.lower))
      updates, state = link.update(updates, state, params)
      params = bj.apply_updates(params, updates)
    return params.lower

  copies, pulls = jnp.zeros((4, 2)), jnp.arange(8.0).reshape(4, 2)
  over = jax.jit(
    jax.shard_map(
      lambda y, pull: one(bj.BilevelParams(None, y), pull),
      mesh=mesh,
      in_specs=(spec('clients'), spec('clients')),
      out_specs=spec('clients'),
    )
  )
  found = jax.block_until_ready(over(copies, pulls))
  points = run(local, 8, bj.BilevelParams(None, copies), pulls)
  np.testing.assert_allclose(found, points[-1][0].lower, atol=1e-6)
  spread = [float(jnp.std(p.lower[:, 0])) for p, _ in points]
  assert min(spread) < 1e-6 < max(spread)
