"""The bilevel comparison: quadratic, calls per method, and a small run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.harness.app import flags as flags_lib
from experiments.harness.app import settings as settings_lib
from experiments.harness.study import comparison
from experiments.stsa import (
  bilevel_zoo,
  methods,
  quadratic,
  zoo_problems,
  zoo_run,
)
from tests.tiers import first

OPTIONS = harness.Options('stsa', 'b', 'quick', None, None, None, ())
SIZES = {'samples': 64, 'size': 4, 'coupling': 0.3}


@pytest.fixture(scope='module')
def small():
  return quadratic.make_quadratic(**SIZES, batch_size=16)


def full_batch(loss, batches):
  """The mean of a loss over its fixed batches."""

  def mean(x, y, batch):
    del batch
    one = lambda i: loss(x, y, {'upper': i, 'lower': i})
    return jnp.mean(jax.vmap(one)(jnp.arange(batches)))

  return mean


@pytest.mark.slow
def test_hypergradient_in_closed_form(small):
  problem = bj.BilevelProblem(
    *(full_batch(loss, small.batches) for loss in small.problem[:2])
  )
  params = small.start(jax.random.key(0))
  y = bj.diagnostics.lower_minimiser(problem, params, steps=30)
  gradient = bj.hypergradient(problem, params._replace(lower=y))
  np.testing.assert_allclose(
    gradient, small.hypergradient(params.upper), rtol=1e-3, atol=1e-4
  )
  np.testing.assert_allclose(small.hypergradient(small.solution), 0, atol=1e-6)
  # Eigenvalues of the Hessian are 0.1 to 1.
  hessian = jax.hessian(problem.lower, 1)(params.upper, y, None)
  values = np.linalg.eigvalsh(hessian)
  np.testing.assert_allclose(values[[0, -1]], [0.1, 1], rtol=1e-3)


def test_series_floor_agrees_with_a_noiseless_run(small):
  problem = bj.BilevelProblem(
    *(full_batch(loss, small.batches) for loss in small.problem[:2])
  )
  solver = bj.solvers.stocbio(
    problem,
    upper=optax.sgd(0.3),
    lower=bj.Sequence(optax.sgd(0.5), steps=10),
    terms=2,
    step_size=0.3,
  )
  params = small.start(jax.random.key(0))

  @jax.jit
  def run(params, state):
    def body(_, carry):
      params, state = carry
      updates, state = solver.update(None, state, params)
      return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, 400, body, (params, state))[0]

  end = run(params, solver.init(params))
  slope = small.hypergradient(end.upper)
  # `neumann` sums one more term than it has products.
  np.testing.assert_allclose(
    jnp.vdot(slope, slope), small.series_floor(3, 0.3), rtol=1e-2
  )


@pytest.mark.parametrize('name', first(methods.METHODS, count=4))
def test_calls_per_step(name, small):
  args = methods.Arguments(
    problem=small.problem,
    upper=lambda count: 0.01,
    lower=lambda count: 0.01,
    series=0.1,
    batches=(small.batches,) * 2,
    curvature=0.1,
    progress=lambda count: count / 10,
  )
  solver = methods.METHODS[name](args)
  params = small.start(jax.random.key(0))
  state, step = solver.init(params), jax.jit(solver.update)
  draws = jnp.zeros(methods.DRAWS, jnp.int32)
  batch = {
    'upper': jnp.int32(0),
    'lower': jnp.int32(1),
    'upper_more': draws,
    'lower_more': draws,
  }
  random = name in ('bsa', 'ttsa', 'sustain')
  steps = 60 if random else methods.VRBO_PERIOD
  for _ in range(steps):
    updates, state = step(batch, state, params)
  for leaf in jax.tree.leaves(updates):
    assert np.all(np.isfinite(leaf))
  calls = methods.count_calls(bj.counts(state), 4) / steps
  np.testing.assert_allclose(
    calls, methods.expected_calls(name, 4), rtol=0.15 if random else 1e-6
  )


@pytest.mark.slow
def test_a_small_run(tmp_path):
  settings = dataclasses.replace(
    bilevel_zoo.PRESETS['smoke'],
    calls=6_000,
    grid=bilevel_zoo.Grid((0.3,), (0.3,), max_grid_extensions=1),
    records=10,
    quadratic=zoo_problems.Quadratic(**SIZES),
  )
  options = harness.Options(
    'stsa', 'bilevel_zoo', 'smoke', settings, str(tmp_path), None, (0, 1)
  )
  harness.execute(bilevel_zoo.main, options)
  results = json.loads((tmp_path / 'results.json').read_text())
  metrics = results['metrics']
  assert not set(results['tuning_seeds']) & set(results['seeds'])
  assert metrics['final/saba'] < 1e-8
  assert metrics['final/soba'] < metrics['final/control/direct'] / 2
  assert metrics['worst_of_control'] == metrics['of_control/soba']
  assert metrics['worst_reduction'] == metrics['reduction/soba']
  assert metrics['soba_over_saba'] > 1e4
  assert metrics['calls_a_step/soba'] == 3
  assert metrics['trials/soba'] == metrics['trials/saba'] == 2
  assert len(results['per_seed']['final/soba']) == 2
  calls = harness.read_records(tmp_path / 'soba/metrics.jsonl')[-1]['calls']
  assert calls == pytest.approx([6_000] * 2, rel=0.01)
  assert (tmp_path / 'quadratic.png').exists()


def test_histories_of_tuning_seeds_are_merged(monkeypatch):
  def train(unused_solver, task, training, unused_measure):
    seeds = np.array(training.seeds)
    values = np.array([seeds, 2 * seeds]) + task.hyper['step']
    return harness.Trained((), (), (), 2, (1, 2), {'a': values}, (), 0.0, 0.0)

  monkeypatch.setattr(harness, 'train', train)
  problem = quadratic.as_problem(
    quadratic.make_quadratic(**SIZES, batch_size=16), '', 0.1
  )
  hyper = {'step': np.array([0.1, 0.1, 0.2, 0.2])}
  seeds = (7, 8, 7, 8)
  job = comparison.Job('soba', True, hyper, seeds, 'x', {}, OPTIONS)
  history = zoo_run.train(bilevel_zoo.Settings(), problem, job).history
  np.testing.assert_allclose(
    history['a'], [[7.1, 8.1, 7.2, 8.2], [14.1, 16.1, 14.2, 16.2]]
  )


def test_seeds_of_tuning_share_a_program():
  """They agree with separate runs."""
  traces = []
  problem = quadratic.as_problem(quadratic.make_quadratic(**SIZES), '', 0.1)

  def start(key):
    traces.append(key)
    return problem.start(key)

  def train(seeds):
    hyper = {
      'step': np.full(len(seeds), 0.1, np.float32),
      'ratio': np.ones(len(seeds), np.float32),
      'exponent': np.zeros(len(seeds), np.float32),
    }
    job = comparison.Job('soba', True, hyper, seeds, 'x', {}, OPTIONS)
    settings = bilevel_zoo.Settings(calls=300, records=5)
    return zoo_run.train(settings, problem._replace(start=start), job)

  one, other = train((7,)), train((8,))
  count, traces[:] = len(traces), []
  both = train((7, 8))
  assert len(traces) == count // 2 > 0
  for name, values in both.history.items():
    np.testing.assert_array_equal(values[:, :1], one.history[name])
    np.testing.assert_array_equal(values[:, 1:], other.history[name])
  assert (
    both.history['hypergradient'][-1, 0] != both.history['hypergradient'][-1, 1]
  )


def outcome(method, end, failure=''):
  history = {
    'hypergradient': np.array([[4.0, 4.0], [2.0, end]]),
    'calls': np.full((2, 2), 30.0),
  }
  trained = harness.Trained((), (), (), 10, (), history, (), 1.0, 0.0)
  return comparison.Outcome(
    method, {'step': 0.1}, trained=trained, members=[0, 1], failure=failure
  )


@pytest.mark.parametrize(
  'bad', [outcome('sustain', np.nan), outcome('sustain', 1.0, 'broken')]
)
@pytest.mark.parametrize('first', [True, False])
def test_worst_metrics_are_nan_if_a_method_stopped(bad, first):
  problem = quadratic.as_problem(
    quadratic.make_quadratic(**SIZES, batch_size=16), '', 0.1
  )
  names = ('sustain', 'soba') if first else ('soba', 'sustain')
  by_name = {
    'soba': outcome('soba', 1.0),
    'sustain': bad,
    'control/direct': outcome('control/direct', 2.0),
  }
  outcomes = {name: by_name[name] for name in (*names, 'control/direct')}
  results = harness.Results()
  bilevel_zoo.summarise(results, outcomes, problem)
  metrics = results.metrics()
  assert np.isnan(metrics['worst_reduction'])
  assert np.isnan(metrics['worst_of_control'])
  assert metrics['of_control/soba'] == 0.75


def test_wrong_settings():
  make, check = bilevel_zoo.Settings, bilevel_zoo.check
  with pytest.raises(ValueError, match='methods knows control/direct, soba'):
    settings_lib.check(make(methods=('sgd',)))
  with pytest.raises(ValueError, match='must be a multiple'):
    check(make(quadratic=zoo_problems.Quadratic(samples=100)))
  with pytest.raises(ValueError, match=r'table\.sizes takes 2'):
    check(make(table=zoo_problems.Tables(sizes=(64,))))


def test_former_flags_work():
  of = lambda *texts: flags_lib.settings_by(
    bilevel_zoo.PRESETS, 'quick', texts, bilevel_zoo.RENAMED
  )
  old = '--tables=a9a', '--table_sizes=1,2', '--samples=128', '--widen=1'
  new = '--table.names=a9a', '--table.sizes=1,2', '--quadratic.samples=128'
  assert of(*old) == of(*new, '--grid.max_grid_extensions=1') != of()


def test_methods_with_a_large_hessian_are_skipped():
  assert methods.affordable('stable', 100)
  assert not methods.affordable('stable', 7_850)
  assert methods.affordable('soba', 7_850)
