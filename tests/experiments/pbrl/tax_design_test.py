"""Tax design: the process of a household and its derivatives."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.harness.app import settings as settings_lib
from experiments.pbrl import contextual, contextual_methods, tax_design

SETTINGS = tax_design.Settings(assets=7, span=12.0, hours=3, amounts=3)


def plain(x, taste):
  """The process with loops, in Python numbers."""
  *vat, income = [2 / (1 + math.exp(-z)) for z in x]
  grid = [-12 + 4 * i for i in range(7)]
  cdf = lambda z: (1 + math.erf(z / 5 / math.sqrt(2))) / 2
  moves, rewards, gains = [], [], []
  for assets in grid:
    for hours in (0, 4, 8):
      for goods in np.ndindex(3, 3, 3):
        amounts = [2.5 * n for n in goods]
        real = [c / (1 + v) for c, v in zip(amounts, vat, strict=True)]
        utility = math.prod(
          c**p for c, p in zip(real, tax_design.TASTES[taste], strict=True)
        )
        asset_utility = math.log(1 + assets / 20) if assets > 0 else assets
        rewards.append(asset_utility + utility - 0.1 * hours**2)
        paid = sum(v * c for v, c in zip(vat, real, strict=True))
        gains.append(
          15 * sum(real) / 3 / 5 + 5 * math.log(1 + paid + income * hours)
        )
        after = assets + (1 - income) * hours - sum(amounts)
        after = min(max(after, -12), 12)
        bounds = [-math.inf, *(g + 2 for g in grid[:-1]), math.inf]
        moves.append([
          cdf(high - after) - cdf(low - after)
          for low, high in itertools.pairwise(bounds)
        ])  # fmt: skip
  return (np.reshape(z, (7, 81, -1)).squeeze() for z in (moves, rewards, gains))


def test_the_process_is_that_of_its_equations(x64):
  households = tax_design.Households(SETTINGS)
  assert households.shape == (7, 81)
  x = np.array([0.3, -1.0, 0.5, -0.7])
  process_at = jax.jit(households.process)
  for taste in (0, 1):
    process = process_at(x, taste)
    table, member = process.transitions
    moves = jnp.einsum('shkt,kb->shbt', table, member).reshape(7, 81, 7)
    actual_parts = moves, process.rewards, process.leader_rewards
    expected_parts = plain(x, taste)
    for actual, expected in zip(actual_parts, expected_parts, strict=True):
      np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(process.start.sum(), 1, rtol=1e-6)
  # The derivative is finite where no goods are bought.
  mix = np.random.default_rng(0).normal(size=(7, 81))
  total = lambda x: jnp.sum(mix * process_at(x, 0).rewards)
  slope, away = jax.grad(total)(x), np.array([1e-5, 2e-5, -1e-5, 1e-5])
  ahead, behind = (mixed_rewards(plain(x + s * away, 0), mix) for s in (1, -1))
  np.testing.assert_allclose(slope @ away, (ahead - behind) / 2, rtol=1e-4)


def mixed_rewards(parts, mix):
  _, rewards, _ = parts
  return np.sum(mix * rewards)


@pytest.mark.slow
def test_the_leader_and_its_penalty_descend():
  """A few updates raise the welfare at the optimum."""
  study = tax_design.make_study(SETTINGS)
  study = study._replace(cells=study.cells[:1])
  welfare = {}
  for method in ('value_penalty', 'amd'):
    solver, params = _started(study, method)
    state, step = solver.init(params), jax.jit(solver.update)
    evaluate = jax.jit(
      lambda params: contextual_methods.measure(
        study, _context(0.1), params, ()
      )
    )
    welfare[method] = [evaluate(params)['leader_return']]
    for k in range(20):
      updates, state = step(jax.random.key(k), state, params)
      params = bj.apply_updates(params, updates)
    welfare[method].append(evaluate(params)['leader_return'])
    if method == 'value_penalty':  # Logits stay normalised.
      off = jax.nn.logsumexp(params.lower, axis=-1)
      np.testing.assert_allclose(off, 0, atol=1e-5)
  for before, after in welfare.values():
    assert after > before + 1


def _context(rate):
  hyper = {'temperature': 0.2, 'rate': rate}
  return harness.Context((), (), hyper, jax.random.key(0), None, 0)


def _started(study, method):
  settings = tax_design.Settings(steps=20)
  solver = contextual_methods.make_solver(
    study, method, settings, _context(0.1)
  )
  table = jnp.zeros((study.contexts, *study.shape))
  return solver, bj.BilevelParams(study.start(jax.random.key(1)), table)


def test_grids_have_two_points():
  with pytest.raises(harness.SettingsError, match='hours must be at least 2'):
    settings_lib.check(tax_design.Settings(hours=1))


@pytest.mark.slow
def test_all_methods_start_from_one_return(options, results):
  """The first record is of the start, not of a later update."""
  given = options(tax_design.PRESETS['smoke'], preset='smoke')
  harness.execute(tax_design.main, given)
  metrics = results()['metrics']
  starts = [metrics[f'start_return/{method}'] for method in contextual.TITLES]
  np.testing.assert_allclose(starts, starts[0], rtol=1e-5)
