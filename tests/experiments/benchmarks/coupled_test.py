"""The steps by hand are the library's, and what is counted is plausible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import coupled, measure


@pytest.mark.parametrize('method', coupled.Settings().methods)
def test_by_hand_is_the_same_step(method):
  case = coupled.make_case(6, 8, batches=3)
  solver = coupled.solver_of(method, case)
  ours = (case.start, solver.init(case.start))
  by_hand, theirs = coupled.by_hand(method, case)
  step = jax.jit(coupled.step_of(solver))
  for i in (0, 1, 0, 2):
    batch = {'upper': jnp.int32(i), 'lower': jnp.int32(i)}
    ours, theirs = step(ours, batch), by_hand(theirs, batch)
    for one, two in zip(ours[0], theirs[0]):
      np.testing.assert_allclose(one, two, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize('method', coupled.Settings().methods)
def test_operations_are_within_the_bound(method):
  case = coupled.make_case(100, 64)
  batch = {'upper': jnp.int32(0), 'lower': jnp.int32(1)}
  solver = coupled.solver_of(method, case)
  carry = (case.start, solver.init(case.start))
  ours = measure.Program(coupled.step_of(solver), carry, batch)
  theirs = measure.Program(*coupled.by_hand(method, case), batch)
  assert ours.flops <= coupled.FLOPS_BOUND * theirs.flops
