"""Round robin against a loop over workers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.a3c import workers

WORKERS, ROUNDS = 4, 3


def make_oracle(key):
  """Makes an oracle of noisy gradients that mix both sequences."""

  def fn(params, batch, inner):
    key, drawn = jax.random.split(inner)
    noise = jax.random.normal(drawn, (3,))
    actor = params.actor + 0.5 * params.critic + noise
    critic = params.critic - 0.2 * params.actor - noise
    gradients = bj.oracles.base.gradients(params, actor=actor, critic=critic)
    return (jnp.sum(actor),), gradients, key, {'noise': noise}

  return bj.oracle(
    fn,
    ('loss',),
    lambda params: key,
    counts={'gradients/actor': 1},
    outputs=lambda params: {'noise': jnp.zeros(3)},
  )


def make(devices=1):
  falling = optax.linear_schedule(0.1, 0.0, WORKERS * ROUNDS)
  move = workers.mover(
    actor=optax.adam(falling), critic=optax.sgd(falling, momentum=0.9)
  )
  key = jax.random.key(5)
  return move, workers.round_robin(
    make_oracle, move, workers=WORKERS, key=key, devices=devices
  )


PARAMS = bj.rl.ActorCriticParams(jnp.array([1.0, -2.0, 0.5]), jnp.ones(3))


def run(solver):
  params, state, update = PARAMS, solver.init(PARAMS), jax.jit(solver.update)
  for _ in range(ROUNDS):
    updates, state = update(None, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def test_agrees_with_a_loop_over_workers():
  """A worker's gradient is at the parameters after its last update."""
  move, solver = make()
  now, moving = PARAMS, move.init(PARAMS)
  oracles = [make_oracle(k) for k in jax.random.split(jax.random.key(5), 4)]
  states = [oracle.init(PARAMS) for oracle in oracles]
  snapshots, delays, version = [(PARAMS, 0)] * WORKERS, [], 0
  apply = jax.jit(move.update)
  for _ in range(ROUNDS):
    for i, oracle in enumerate(oracles):
      snapshot, at = snapshots[i]
      gradient, states[i] = oracle.update(None, states[i], snapshot)
      updates, moving = apply({'gradient': gradient}, moving, now)
      now = optax.apply_updates(now, updates)
      delays.append(version - at)
      version += 1
      snapshots[i] = (now, version)
  params, state = run(solver)
  chex.assert_trees_all_close(params, now, rtol=1e-5, atol=1e-6)
  expected = np.bincount(delays, minlength=WORKERS)
  np.testing.assert_array_equal(state.delays, expected)
  assert expected[WORKERS - 1] == WORKERS * (ROUNDS - 1) + 1
  losses = [bj.values(s)['loss'] for s in states]
  np.testing.assert_allclose(
    bj.values(state)['loss'], np.mean(losses), rtol=1e-4
  )
  assert bj.counts(state) == {'gradients/actor': WORKERS * ROUNDS}
  assert bj.outputs(state)['noise'].shape == (WORKERS, 3)


def test_devices_change_rounding_only():
  one, two = run(make()[1])[0], run(make(devices=2)[1])[0]
  chex.assert_trees_all_close(one, two, rtol=1e-6)


def test_one_worker_has_no_delay():
  move, _ = make()
  solver = workers.round_robin(
    make_oracle, move, workers=1, key=jax.random.key(5)
  )
  _, state = run(solver)
  np.testing.assert_array_equal(state.delays, [ROUNDS])


def test_workers_that_do_not_divide():
  with pytest.raises(
    harness.SettingsError, match='4 workers cannot be split over 3 devices'
  ):
    make(devices=3)
  with pytest.raises(harness.SettingsError, match='there are 8'):
    workers.round_robin(
      make_oracle, make()[0], workers=64, key=jax.random.key(0), devices=64
    )


def test_agrees_with_delayed_gradients_without_worker_state():
  """A round equals N updates of `bj.evaluation.delayed`."""

  def slope(params, batch, inner):
    actor = jnp.sin(params.actor) + 0.5 * params.critic
    critic = params.critic - 0.2 * params.actor
    gradients = bj.oracles.base.gradients(params, actor=actor, critic=critic)
    return (jnp.sum(actor),), gradients, inner, {'actor': params.actor}

  def plain(key):
    del key
    return bj.oracle(
      slope, ('loss',), outputs=lambda params: {'actor': params.actor}
    )

  adam = optax.adam(0.1)
  move = workers.mover(actor=adam, critic=adam)
  key = jax.random.key(0)
  params, _ = run(workers.round_robin(plain, move, workers=WORKERS, key=key))
  late = bj.evaluation.delayed(plain(key), workers=WORKERS)
  solver = bj.descend(late, actor=adam, critic=adam)
  now, state, update = PARAMS, solver.init(PARAMS), jax.jit(solver.update)
  for _ in range(WORKERS * ROUNDS):
    updates, state = update(None, state, now)
    now = optax.apply_updates(now, updates)
  chex.assert_trees_all_close(params, now, rtol=1e-5, atol=1e-6)
