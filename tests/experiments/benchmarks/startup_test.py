"""First steps of all solvers of a bilevel problem can be measured."""

import jax
import pytest

from experiments.benchmarks import measure, startup


@pytest.mark.parametrize('name', startup.solvers())
def test_a_solver_of_each_name_is_made_and_takes_a_step(name):
  _, params, batch = startup.problem()
  solver = startup.solvers()[name]()
  step = measure.solver_step(solver)
  carry = params, jax.eval_shape(solver.init, params)
  moved, _ = jax.eval_shape(step, carry, batch)
  assert jax.tree.map(lambda z: z.shape, moved) == jax.tree.map(
    lambda z: z.shape, params
  )
