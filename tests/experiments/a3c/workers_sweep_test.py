"""Sweep of the number of workers against NumPy and loops."""

import dataclasses

import chex
import jax
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.a3c import gymnax, workers, workers_sweep
from experiments.harness.study import comparison

KEY, RATE, WORKERS, ROUNDS = jax.random.key(3), 0.01, 3, 3
SETTINGS = workers_sweep.Settings(
  workers=(1, 2, 4),
  updates=64,
  block=4,
  environments=2,
  rollout=4,
  episodes=3,
  target=50.0,
  tuning=workers.Tuning(rates=(0.01, 0.1, 1.0), seeds=2),
  seeds=3,
)


def loop(oracle, states, params):
  """Workers in turn, with all parameters in a list; returns the last ones.

  Also returns the version of each gradient's parameters.
  """
  adam = optax.chain(
    optax.clip_by_global_norm(0.5), optax.scale_by_adam(eps=1e-5)
  )
  moments = {name: adam.init(getattr(params, name)) for name in params._fields}
  compute, every, read = jax.jit(oracle.update), [params], []
  latest = [0] * len(states)
  for k in range(len(states) * ROUNDS):
    i = k % len(states)
    read.append(latest[i])
    gradients, states[i] = compute(None, states[i], every[latest[i]])
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
    latest[i] = k + 1
  return every[-1], np.array(read)


def test_agrees_with_workers_in_turn():
  """Environments differ between workers; delays are those of versions."""
  agent, make_oracle = gymnax.make_agent(SETTINGS, 1)
  params = agent.init(KEY)
  context = harness.Context((), (), {'rate': RATE}, KEY, KEY, 0)
  solver = workers_sweep.make_functions(SETTINGS, WORKERS).solver(context)

  def body(carry, _):
    params, state = carry
    updates, state = solver.update(None, state, params)
    return (bj.apply_updates(params, updates), state), None

  run = jax.jit(lambda x: jax.lax.scan(body, x, length=ROUNDS)[0])
  actual, state = run((params, solver.init(params)))
  keys = jax.random.split(KEY, WORKERS)
  states = [make_oracle(key).init(params) for key in keys]
  expected, read = loop(make_oracle(KEY), states, params)
  chex.assert_trees_all_close(actual, expected, atol=2e-5)
  count = np.arange(WORKERS * ROUNDS)
  np.testing.assert_array_equal(count - read, np.minimum(count, WORKERS - 1))
  np.testing.assert_array_equal(state.delays, np.bincount(count - read))
  assert workers_sweep.count_wrong_delays(state.delays, len(count)) == 0
  # Without the delay, parameters differ by far more than the tolerance.
  oracle, single = make_oracle(KEY), [make_oracle(keys[0]).init(params)]
  undelayed, _ = loop(oracle, single, params)
  head = lambda x: np.asarray(jax.tree.leaves(x.actor)[0])
  assert np.abs(head(undelayed) - head(actual)).max() > 1e-3


def test_wrong_delays_are_counted():
  """By a simulation of two runs, also without delay and out of turn."""
  k = np.arange(12)
  histogram = lambda delays: np.bincount(delays, minlength=4)
  right = histogram(np.minimum(k, 3))
  count = lambda *rows: workers_sweep.count_wrong_delays(np.stack(rows), 12)
  assert count(right, right) == 0
  assert count(right, histogram(0 * k)) == 11
  assert count(histogram(np.minimum(k, 2)), right) == 9


def add_rows(curves):
  results = harness.Results()
  for n, curve in curves.items():
    workers_sweep.add_row(results, {'workers': n}, curve, curves[1], SETTINGS)
  return results


def test_equal_curves_have_a_speedup_of_n():
  """Lines of three seeds: every number is known."""
  updates = 4.0 * np.arange(17)
  line = updates[:, None] * [1.0, 2.0, 3.0]  # Their mean reaches 50 at 25.
  results = add_rows(dict.fromkeys((1, 2, 4), line))
  for n in (1, 2, 4):
    at = f'/workers={n}'
    assert results[f'updates{at}'].mean == 25
    speedup = results[f'speedup{at}']
    assert (speedup.mean, speedup.half_width) == (n, 0)
    # The last quarter of 64 updates: records at 52, 56, 60 and 64.
    last = results[f'return_at_equal_updates{at}'].per_seed
    np.testing.assert_allclose(last, 58 * np.array([1, 2, 3]))
    assert results[f'mean_return{at}'].mean == 2 * np.mean(updates[1:])
  # At 16, 32 and 64 updates.
  equal = [
    results[f'return_at_equal_frames/workers={n}'].per_seed[0]
    for n in (1, 2, 4)
  ]
  np.testing.assert_allclose(equal, [16, 30, 58])


def test_speedup_of_slower_and_failing_workers():
  updates = 4.0 * np.arange(17)[:, None] * np.ones(3)
  results = add_rows({1: 4 * updates, 2: 2 * updates, 4: 0 * updates})
  assert results['speedup/workers=1'].mean == 1
  assert results['speedup/workers=2'].mean == 2 * 13 / 25
  assert results['speedup/workers=4'].mean == 0
  assert np.isnan(results['updates/workers=4'].mean)


def fake_train(job, settings, number):
  """Returns that are best at 0.1, and at 0.01 with 4 workers, plus the seed."""
  best = 0.01 if number == 4 else 0.1
  final = 100 - 20 * np.abs(np.log10(job.hyper['rate'] / best))
  final = final + np.array(job.seeds) % 1000 - number
  records = 1 + settings.updates // settings.block
  delays = np.ones(number, int)
  delays[-1] += settings.updates - number
  return harness.Trained(
    (),
    workers.RoundRobinState(*[()] * 5, np.tile(delays, (len(final), 1)), ()),
    (),
    settings.updates // number,
    settings.block // number * np.arange(records),
    {'evaluation_return': np.linspace(0, 1, records)[:, None] * final},
    (),
    1.0,
    0.0,
  )


def test_steps_by_workers(options, results, monkeypatch, tmp_path):
  monkeypatch.setattr(workers_sweep, 'train', fake_train)
  monkeypatch.setattr(gymnax, 'random_return', lambda settings, key: 20.0)
  given = options(
    SETTINGS, seeds=(0, 1, 2), paper='a3c', binary='workers_sweep'
  )
  harness.execute(workers_sweep.main, given)
  metrics = results()['metrics']
  quarter = np.mean([52, 56, 60, 64]) / 64
  for name, value in {
    'tuned/workers=1': 100,
    'tuned/workers=2': 99,
    'tuned/workers=4': 97,
    'fixed/workers=2': 99,
    'fixed/workers=4': 77,
  }.items():
    final = metrics[f'return_at_equal_updates/{name}']
    assert final == pytest.approx(quarter * value), name
  # 4 workers were tuned once more, below the smallest step of the grid.
  assert len(results()['trials']) == 3 + 3 + 4
  pair = [f'return_at_equal_updates/tuned/workers={n}' for n in (4, 1)]
  paired = harness.paired_interval(results(), *pair)
  assert paired.mean == pytest.approx(-3 * quarter)
  assert paired.half_width == pytest.approx(0, abs=1e-6)
  assert metrics['wrong_delays'] == 0
  assert metrics['frames'] == 512
  assert (tmp_path / 'workers.png').exists()


@pytest.mark.slow
def test_a_run(options, results):
  """Delays are those of round robin; reported seeds do not tune."""
  smoke = workers_sweep.PRESETS['smoke']
  given = options(smoke, seeds=(0, 1), paper='a3c', binary='workers_sweep')
  harness.execute(workers_sweep.main, given)
  metrics = results()['metrics']
  assert metrics['wrong_delays'] == 0
  assert metrics['return_at_equal_updates/tuned/workers=4'] > 5
  assert not set(comparison.tuning_seeds(smoke.tuning.seeds)) & {0, 1}


def test_wrong_settings():
  for changed, message in (
    ({'workers': (4, 16)}, 'must start with 1'),
    ({'workers': (1,)}, 'at least one other'),
    ({'workers': (1, 4, 4)}, 'no number twice'),
    ({'workers': (1, 3)}, 'a multiple of each of'),
    ({'updates': 72}, 'times the largest'),
  ):
    with pytest.raises(harness.SettingsError, match=message):
      workers_sweep.check(dataclasses.replace(SETTINGS, **changed))
