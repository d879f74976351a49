"""Comparisons of methods: trials, choices and dm %."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.harness.app import settings as settings_lib
from experiments.moco import bias, compare, methods
from experiments.moco import problem as problems

GRID = compare.Grid((1e-3, 1e-1, 1e3), (1e-1,), max_grid_extensions=0)
SETTINGS = compare.Settings(steps=60, chunk=60, grid=GRID)


def line_problem(noise):
  """Two parabolas in a scalar head and a scalar trunk."""

  def losses(params, batch):
    trunk = params.trunk + params.heads
    slope = trunk * batch
    return jnp.stack([(trunk - 1) ** 2 + slope[0], (trunk + 1) ** 2 + slope[1]])

  zero = jnp.zeros(2)
  return problems.Problem(
    name='line',
    tasks=('one', 'two'),
    metric='loss',
    higher_is_better=False,
    init=lambda key: bj.sequences(
      trunk=4 + jax.random.normal(key), heads=jnp.zeros([])
    ),
    oracle=lambda: bj.multi_objective(losses, 2, rest=('heads',)),
    losses=losses,
    batch=lambda key, data, size: noise * jax.random.normal(key, (2,)),
    split=lambda batch, parts: jnp.stack([batch] * parts),
    score=losses,
    data={'train': zero, 'validation': zero, 'test': zero},
  )


@pytest.mark.slow
def test_equal_trials_and_choice_by_validation(options):
  problem = line_problem(0.1)
  runs = compare.Runs(problem, options(SETTINGS, seeds=(0, 1, 2)))
  mean, moco = runs.compare(('mean', 'moco')).values()
  for outcome in (mean, moco):
    last = outcome.trained.history['validation/mean'][-1]
    assert last.shape == (9,)  # Three trials of three seeds.
    by_trial = last.reshape(3, 3).mean(axis=1)
    assert outcome.members[0] == 3 * np.argmin(by_trial)
    assert runs.scores(outcome).mean() < 1.5
  assert mean.point['rate'] == moco.point['rate'] == 0.1
  outcomes = {'mean': mean, 'moco': moco}
  results = harness.Results()
  ratios = bias.measure(results, problem, (1,), outcomes)
  metrics = results.metrics()
  own = [f'bias_ratio/moco/line/batch=1/own={i}' for i in range(3)]
  assert set(own) <= set(metrics)
  chosen = metrics[own[int(moco.point['own'])]]
  assert metrics['bias_ratio/moco/line'] == ratios['moco'].mean == chosen
  # Constant weights have no bias except rounding.
  assert not metrics['bias_ratio/mean/line'] < 1e3


def test_trial_with_a_stopped_seed_is_not_chosen(options):
  problem = line_problem(0.0)
  overflow = lambda params, part: jnp.where(
    jnp.abs(params.trunk) < 2, jnp.nan, problem.score(params, part)
  )
  runs = compare.Runs(
    problem._replace(score=overflow), options(SETTINGS, seeds=(0, 1, 2))
  )
  outcome = runs.run('mean')
  bad = np.isnan(outcome.trained.history['validation/mean'][-1])
  assert bad.any() and not bad[3:6].all()
  assert outcome.point['rate'] != 0.1


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'methods': ('guess',)}, '=guess: methods knows .*smg'),
    ({'methods': ()}, 'needs at least one'),
    ({'grid': compare.Grid((1.0, 2.0), (1.0,))}, 'got 2 and 1'),
    ({'grid': compare.Grid((1.0,), (1.0, 2.0))}, 'got 1 and 2'),
  ],
)
def test_unfair_comparisons(changes, message):
  settings = dataclasses.replace(SETTINGS, **changes)
  with pytest.raises(harness.SettingsError, match=message):
    settings_lib.check(settings)
    compare.check(settings)


def test_grid_of_one_point():
  grid = compare.Grid((1.0,), (2.0,))
  compare.check(dataclasses.replace(SETTINGS, grid=grid))
  assert grid.axes('mean') == {'own': (0,), 'rate': (1.0,)}
  assert grid.axes('moco')['own'].values == (0,)


@pytest.mark.parametrize(
  'name', [n for n in methods.EVERY if methods.hyperparameter(n)]
)
def test_hyperparameters_have_equally_many_values(name):
  own = methods.hyperparameter(name)
  assert len(set(own.values)) == compare.VALUES
  assert len({own.label(i) for i in range(compare.VALUES)}) == compare.VALUES
  for i, value in enumerate(own.values):
    np.testing.assert_allclose(
      methods.hyperparameter_value(name, i), value, rtol=1e-6
    )


def test_relative_change_by_hand():
  change = methods.relative_change(
    np.array([[0.9, 2.0], [1.0, 1.0]]), np.array([1.0, 1.0]), [True, False]
  )
  np.testing.assert_allclose(change, [(10 + 100) / 2, 0.0], rtol=1e-5)


def test_side_by_side_equals_separate_solvers():
  one = bj.gradient(lambda x, batch: batch * x**2)
  two = bj.gradient(lambda x, batch: batch * x)
  both = methods.side_by_side({'a': one, 'b': two})
  params = bj.sequences(a=jnp.float32(3.0), b=jnp.float32(1.0))
  updates, state = both.update(jnp.float32(2.0), both.init(params), params)
  assert (updates.a, updates.b) == (12.0, 2.0)
  assert bj.values(state.parts['a'])['loss'] == 18.0


def test_only_the_non_finite_solver_stops():
  stable = bj.gradient(lambda x, batch: x**2)
  unstable = bj.gradient(lambda x, batch: jnp.log(x - batch))
  both = methods.side_by_side({'a': stable, 'b': unstable})
  params = bj.sequences(a=jnp.float32(3.0), b=jnp.float32(1.0))
  state, step = both.init(params), jax.jit(both.update)
  for batch, stopped in ((0.0, False), (9.0, True), (0.0, True)):
    updates, state = step(jnp.float32(batch), state, params)
    assert updates.a == 6.0
    assert bool(state.stopped['b']) == stopped
    assert updates.b == (0.0 if stopped else 1.0)
    assert not any(bj.diagnostics.nonfinite(params, state).values())
