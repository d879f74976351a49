"""Delayed actor-critic against a loop with a list of parameters."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.a3c import delay_sweep, gymnax, workers

KEY, RATE, UPDATES = jax.random.key(3), 0.01, 6
SETTINGS = delay_sweep.Settings(
  delays=(0, 1, 4),
  updates=40,
  block=10,
  environments=2,
  rollout=4,
  window=10,
  tuning=workers.Tuning(rates=(0.01, 0.1), seeds=2),
  seeds=3,
)


def train(solver, params):
  def body(carry, _):
    params, state = carry
    updates, state = solver.update(None, state, params)
    return (bj.apply_updates(params, updates), state), None

  run = jax.jit(lambda x: jax.lax.scan(body, (x, solver.init(x)), length=6)[0])
  return run(params)


def loop(agent, oracle, params, delay):
  """Applies each gradient by hand, with all parameters in a list."""
  adam = optax.chain(
    optax.clip_by_global_norm(0.5), optax.scale_by_adam(eps=1e-5)
  )
  state = oracle.init(params)
  moments = {name: adam.init(getattr(params, name)) for name in params._fields}
  compute, every = jax.jit(oracle.update), [params]
  for k in range(UPDATES):
    gradients, state = compute(None, state, every[max(k - delay, 0)])
    now = {}
    for name, factor in (('actor', 1), ('critic', 3)):
      direction, moments[name] = adam.update(
        getattr(gradients, name), moments[name]
      )
      now[name] = jax.tree.map(
        lambda x, d, factor=factor: x - factor * RATE * d,
        getattr(every[-1], name),
        direction,
      )
    every.append(type(params)(**now))
  return every[-1]


def test_agrees_with_a_list_of_parameters():
  """One mapped program of all delays, each against its own loop."""
  agent, make_oracle = gymnax.make_agent(SETTINGS, SETTINGS.window)
  params, delays = agent.init(KEY), jnp.array(SETTINGS.delays)

  def one(delay):
    _, solver = delay_sweep.make_solver(SETTINGS, KEY, delay, RATE)
    return train(solver, params)

  actual, state = jax.vmap(one)(delays)
  np.testing.assert_array_equal(bj.values(state)['delay'], delays)
  for i, delay in enumerate(SETTINGS.delays):
    expected = loop(agent, make_oracle(KEY), params, delay)
    chex.assert_trees_all_close(
      jax.tree.map(lambda x, i=i: x[i], actual), expected, atol=2e-5
    )
  # The delays matter by far more than the tolerance.
  head = np.asarray(jax.tree.leaves(actual.actor)[0])
  assert np.abs(head[1] - head[0]).max() > 1e-3
  assert np.abs(head[2] - head[1]).max() > 1e-3


def test_without_delay_updates_are_equal_to_the_bit():
  agent, make_oracle = gymnax.make_agent(SETTINGS, SETTINGS.window)
  params = agent.init(KEY)
  _, solver = delay_sweep.make_solver(SETTINGS, KEY, jnp.int32(0), RATE)
  adam = lambda rate: optax.chain(
    optax.clip_by_global_norm(0.5), optax.adam(rate, eps=1e-5)
  )
  plain = bj.descend(make_oracle(KEY), actor=adam(RATE), critic=adam(3 * RATE))
  chex.assert_trees_all_equal(train(solver, params)[0], train(plain, params)[0])


def score(delay, rate):
  """A return that is best at 0.1 without delay, and at 0.01 with one."""
  return 100 * rate if delay < 2 else 1 / rate


def fake_run(options, name, cells, seeds):
  """Returns of `score`, plus the seed, doubled in the last quarter."""
  del name
  records = options.settings.updates // options.settings.block
  returns = np.array(
    [[score(c.delay, c.rate) + seed for seed in seeds] for c in cells]
  )
  returns = np.stack([returns] * (records - 1) + [2 * returns])
  return delay_sweep.Curves(10 * np.arange(1, records + 1), returns, 0.0)


def test_steps_by_delay(options, results, monkeypatch):
  monkeypatch.setattr(delay_sweep, 'run', fake_run)
  monkeypatch.setattr(gymnax, 'random_return', lambda settings, key: 20.0)
  given = options(SETTINGS, seeds=(0, 1, 2), paper='a3c', binary='delay_sweep')
  harness.execute(delay_sweep.main, given)
  metrics = results()['metrics']
  expected = {
    'fixed/delay=0': 10,
    'fixed/delay=1': 10,
    'fixed/delay=4': 10,
    'divided/delay=1': 5,
    'divided/delay=4': 50,
    'square_root/delay=4': 10 * 5**0.5,
    'tuned/delay=1': 10,
    'tuned/delay=4': 100,
  }
  for name, value in expected.items():
    final = metrics[f'final_return/{name}']
    assert final == pytest.approx(2 * (value + 1)), name
    area = metrics[f'training_area/{name}']
    assert area == pytest.approx(1.25 * (value + 1)), name
  assert len(results()['trials']) == 6


@pytest.mark.slow
def test_a_run(options, results):
  """Delays are those of the cells; without delay, all steps are the same."""
  given = options(SETTINGS, seeds=(0, 1, 2), paper='a3c', binary='delay_sweep')
  harness.execute(delay_sweep.main, given)
  metrics = results()['metrics']
  assert metrics['largest_delay_error'] == 0
  assert metrics['frames'] == 320
  at = [metrics[f'final_return/{x}/delay=0'] for x in ('fixed', 'divided')]
  assert at[0] == at[1] > 5


def test_wrong_settings():
  for changed, message in (
    ({'updates': 45}, 'a multiple of --block=10'),
    ({'delays': (1, 4)}, 'start with 0'),
    ({'delays': (0, 4, 4)}, 'no number twice'),
  ):
    with pytest.raises(harness.SettingsError, match=message):
      delay_sweep.check(dataclasses.replace(SETTINGS, **changed))
