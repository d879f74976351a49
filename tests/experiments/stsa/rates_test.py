"""Rates: Jacobians of problems, known powers, and a small run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import bilevel_jax as bj
from experiments import harness
from experiments.harness.app import flags as flags_lib
from experiments.harness.app import settings as settings_lib
from experiments.harness.study import slopes
from experiments.stsa import applications, chains, rates, risk
from tests.tiers import first

MAKERS = [chains.monotone_chain, chains.nonmonotone_chain]


def as_vector(z):
  return jnp.concatenate(list(z))


def increments(chain, size):
  quiet = bj.sequences(**dict.fromkeys(chain.names, jnp.zeros(size)))

  def function(vector):
    z = bj.sequences(
      **dict(zip(chain.names, vector.reshape(-1, size), strict=True))
    )
    moves = [chain.increments[name](z, quiet) for name in chain.names]
    return jnp.concatenate(moves)

  return function


@pytest.mark.parametrize('inner', first([3, 1]))
@pytest.mark.parametrize('make', MAKERS)
def test_jacobian_is_minus_the_derivative(make, inner):
  chain = make(inner, size=4)
  function = increments(chain, 4)
  # The non-monotone chain has its largest curvature at zero.
  at = jnp.zeros(4 * (inner + 1))
  jacobian = -jax.jacobian(function)(at)
  np.testing.assert_allclose(jacobian, chain.jacobian, atol=1e-5)


def test_solution_of_the_monotone_chain_and_its_errors():
  chain = chains.monotone_chain(2, size=4)
  function = increments(chain, 4)
  solution = np.linalg.solve(
    chain.jacobian, np.asarray(function(jnp.zeros(12)), np.float64)
  )
  z = bj.sequences(
    **dict(zip(chain.names, jnp.float32(solution).reshape(3, 4), strict=True))
  )
  for error in chain.errors(z).values():
    assert error < 1e-9
  starts = jax.vmap(chain.start)(jax.random.split(jax.random.key(0), 500))
  far = jax.vmap(chain.errors)(starts)['main'].mean()
  np.testing.assert_allclose(far, 1.0, rtol=0.15)


def test_gradient_norm_of_the_nonmonotone_chain():
  chain = chains.nonmonotone_chain(3, size=4)
  z = chain.start(jax.random.key(1))
  quiet = bj.sequences(**dict.fromkeys(chain.names, jnp.zeros(4)))
  # With the inner sequences at equilibrium, x descends the gradient.
  move = chain.increments['x'](z, quiet)
  errors = chain.errors(z)
  np.testing.assert_allclose(errors['main'], jnp.sum(move**2), rtol=1e-4)
  np.testing.assert_allclose(errors['inner'], 0, atol=1e-9)


def test_noise_has_mean_square_one():
  noise = chains.draw_noise(jax.random.key(0), ('x', 'y1'), 5000)
  for one in noise:
    np.testing.assert_allclose(jnp.sum(one**2), 1, rtol=0.1)


def test_assumptions_are_checked():
  chain = chains.nonmonotone_chain(5)
  with pytest.raises(chains.AssumptionError, match='unstable'):
    chains.check_assumptions(chain, ratio=1.0)
  assert chains.check_assumptions(chain, ratio=8.0).rate > 0
  chain = chains.monotone_chain(1)
  with pytest.raises(chains.AssumptionError, match='larger offset'):
    chains.check_assumptions(chain, scale=2.0, offset=1.0)
  with pytest.raises(chains.AssumptionError, match='needs c >'):
    chains.check_assumptions(chain, scale=0.3, offset=20.0)
  chains.check_assumptions(chain, scale=0.3, offset=20.0, fast=False)


def test_fit_finds_a_known_power():
  steps = np.arange(50, 20_001, 100.0)
  noise = np.random.default_rng(0).gamma(20, 1 / 20, (len(steps), 64))
  at, values = slopes.log_bins(
    steps, 3 * steps[:, None] ** -0.7 * noise, first=200, bins=16
  )
  slope = slopes.fit(at, values)
  assert abs(slope.mean + 0.7) < slope.half_width < 0.01
  assert at[0] >= 200 and len(at) == 16


def test_bins_are_means():
  steps, values = np.array([1.0, 2, 4, 8]), np.arange(4.0)[:, None]
  at, means = slopes.log_bins(steps, values, first=1, bins=2)
  np.testing.assert_allclose(at, [np.sqrt(2), np.sqrt(32)])
  np.testing.assert_allclose(means[:, 0], [0.5, 2.5])


@pytest.mark.slow
def test_order_of_slopes_in_a_small_run(tmp_path):
  settings = rates.Settings(
    steps=2_000,
    chunk=50,
    seeds=16,
    size=4,
    inner=(1,),
    nonmonotone=rates.NonMonotone((1,), (1.0,), (100, 400, 1_600), seeds=4),
    applications=('ridge',),
  )
  options = harness.Options(
    'stsa', 'rates', 'quick', settings, str(tmp_path), None, tuple(range(16))
  )
  harness.execute(rates.main, options)
  metrics = json.loads((tmp_path / 'results.json').read_text())['metrics']
  slope = lambda case: metrics[f'slope/{case}']
  single = slope('strongly_monotone/inner=1')
  assert single < slope('two_timescale/sum') < slope('ttsa/main')
  assert single < slope('control/small_c') < slope('control/constant_step')
  assert -0.8 < slope('nonmonotone/inner=1') < -0.3
  for name in ('monotone', 'schedules', 'nested', 'nonmonotone'):
    assert (tmp_path / f'{name}.png').exists()


NESTED = {
  'ridge': applications.ridge,
  'bilevel_quadratic': applications.bilevel_quadratic,
  'risk_averse': risk.risk_averse,
}


@pytest.mark.parametrize('name', first(NESTED))
def test_nested_problems_are_stationary_at_their_solution(name):
  nested = NESTED[name]()
  oracle = nested.oracle
  z = nested.solution
  directions, _ = oracle.update(nested.everything, oracle.init(z), z)
  for direction in jax.tree.leaves(directions):
    np.testing.assert_allclose(direction, 0, atol=2e-5)
  # Batches are unbiased.
  keys = jax.random.split(jax.random.key(0), 4_000)
  tracked = 'lower' if name != 'risk_averse' else 'level_1'

  def one(key):
    directions, _ = oracle.update(nested.draw(key), oracle.init(z), z)
    return ravel_pytree(getattr(directions, tracked))[0]

  drawn = jax.vmap(one)(keys)
  assert np.all(np.abs(drawn.mean(0)) <= 5 * drawn.std(0) / np.sqrt(4_000))
  steps = applications.steps_for(nested)
  assert steps.scale > 1 / (2 * steps.rate)
  assert steps.scale / steps.offset <= 1 / steps.largest


def test_wrong_settings():
  with pytest.raises(ValueError, match='must be a multiple'):
    rates.check(rates.Settings(steps=150))
  with pytest.raises(ValueError, match='applications knows ridge'):
    settings_lib.check(rates.Settings(applications=('bandit',)))
  with pytest.raises(ValueError, match='ratios'):
    wrong = rates.NonMonotone(ratios=(1.0,))
    rates.check(rates.Settings(nonmonotone=wrong))


def test_former_flags_work():
  of = lambda *texts: flags_lib.settings_by(
    rates.PRESETS, 'quick', texts, rates.RENAMED
  )
  old = '--horizons=100', '--nonmonotone_inner=1', '--ratios=2'
  new = '--nonmonotone.lengths=100', '--nonmonotone.inner=1'
  assert of(*old) == of(*new, '--nonmonotone.ratios=2') != of()
