"""The steps by hand are the library's, and what is counted is plausible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments.benchmarks import coupled, coupled_steps, measure
from tests.tiers import first

METHODS = ('soba', 'saba', 'f2sa', 'stocbio')


@pytest.mark.parametrize('method', METHODS)
def test_by_hand_is_the_same_step(method):
  case = coupled_steps.make_case(6, 8)
  solver = coupled_steps.make_solver(method, case)
  ours = (case.start, solver.init(case.start))
  by_hand, theirs = coupled_steps.by_hand(method, case)
  step = jax.jit(measure.solver_step(solver))
  for i in (0, 1, 0, 2):
    batch = {'upper': jnp.int32(i), 'lower': jnp.int32(i)}
    ours, theirs = step(ours, batch), by_hand(theirs, batch)
    for one, two in zip(ours[0], theirs[0]):
      np.testing.assert_allclose(one, two, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize('method', first(METHODS))
def test_operations_are_within_the_bound(method):
  ours, theirs = coupled_steps.hand_pair(
    method, coupled_steps.make_case(100, 64)
  )
  assert ours.flops <= coupled.BOUND_FLOPS * theirs.flops


def test_an_epoch_sees_each_batch_once(monkeypatch):
  case = coupled_steps.make_case(2, 1, 'dense')
  seen = coupled_steps.jnp.zeros(case.batches)

  class Counting:
    """Counts the batches of the lower loss."""

    def init(self, params):
      return seen

    def update(self, batch, state, params):
      zeros = jax.tree.map(jnp.zeros_like, params)
      return zeros, state.at[batch['lower']].add(1)

  program = coupled_steps.epochs(case, Counting(), 2 * case.batches)
  program.run(1)
  np.testing.assert_array_equal(program.carry[0][1], 2)


def test_clients_agree_after_a_step():
  program = coupled._clients(3, 4)
  program.run(2)
  for copies in program.carry[0]:
    assert np.ptp(copies, axis=0) == pytest.approx(0, abs=1e-6)
    assert np.abs(copies).max() > 0


def test_a_tiny_solver_has_losses_in_its_state_or_none():
  for measured in (True, False):
    solver, params = coupled_steps.tiny('v_pbgd', measured=measured)
    state = solver.init(params)
    assert bool(bj.values(state)) is bool(bj.counts(state)) is measured
