"""Tests of the benchmark: fair opponents, operations within the bound.

Times are never asserted: they say more about the machine than the code.
"""

import functools

import chex
import jax
import pytest

from experiments.benchmarks import cleaning, measure
from experiments.benchmarks import cleaning_steps as steps
from tests.tiers import first

SIZES = steps.Sizes(rows=64, features=49, hidden=16, classes=10)
FORMS = [
  ('linear', 'v_pbgd', False),
  ('linear', 'v_pbgd', True),
  ('linear', 'g_pbgd', False),
  ('linear', 'g_pbgd', True),
  ('mlp', 'v_pbgd', True),
  ('mlp', 'g_pbgd', False),
]


def _advance(step, carry, data):
  step = jax.jit(step)
  for _ in range(3):
    carry = step(carry, data)
  return carry


@pytest.mark.parametrize('model, name, fused', first(FORMS, count=2))
def test_library_takes_the_step_by_hand_at_its_cost(model, name, fused):
  case = steps.hyper_cleaning(model, SIZES)
  ours, theirs = (
    measure.Program(*make(case, name, fused=fused), case.data)
    for make in (steps.library, steps.by_hand)
  )
  assert ours.flops / theirs.flops <= cleaning.BOUND_FLOPS
  ours.run(3)
  theirs.run(3)
  (params, _), (x, y, *_) = ours.carry, theirs.carry
  chex.assert_trees_all_close(tuple(params), (x, y), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('model', ['linear', 'mlp'])
def test_a_step_costs_at_most_the_bound_of_a_single_level_one(model):
  case = steps.hyper_cleaning(model, SIZES)
  ours = measure.Program(*steps.library(case, 'v_pbgd', fused=True), case.data)
  single = measure.Program(*steps.single_level(case), case.data)
  assert 1 < ours.flops / single.flops <= cleaning.BOUND_SINGLE_LEVEL


@pytest.mark.parametrize('model', ['linear', 'mlp'])
def test_both_modes_of_the_slope_penalty_agree(model):
  case = steps.hyper_cleaning(model, SIZES)
  forward, reverse = (
    _advance(*steps.slope_penalty(case, forward=mode), case.data)
    for mode in (True, False)
  )
  chex.assert_trees_all_close(forward, reverse, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('at_once', [None, 2])
def test_seeds_together_are_the_seeds_one_by_one(at_once):
  case = functools.partial(steps.hyper_cleaning, 'linear', SIZES)
  step, carry, batch = steps.seeds_together(case, 3, at_once)
  together, _ = _advance(step, carry, batch)
  for seed in range(3):
    one = case(seed)
    alone, _ = _advance(*steps.library(one, 'v_pbgd', fused=True), one.data)
    ours = jax.tree.map(lambda x, seed=seed: x[seed], together)
    chex.assert_trees_all_close(ours, alone, rtol=1e-5, atol=1e-7)
