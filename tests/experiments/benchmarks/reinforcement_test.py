"""The actor-critic by hand takes the library's steps."""

import chex
import jax
import pytest

from experiments.benchmarks import measure, reinforcement


@pytest.mark.slow
def test_by_hand_is_the_same_step():
  sizes = reinforcement.Sizes(environments=6, steps=15)
  agent, solver = reinforcement.make_solver(sizes)
  params = agent.init(jax.random.key(0))
  ours = (params, jax.jit(solver.init)(params))
  step, start = reinforcement.by_hand(sizes)
  theirs = jax.jit(start)(*params)
  step, our_step = jax.jit(step), jax.jit(measure.solver_step(solver))
  for _ in range(4):
    ours, theirs = our_step(ours, None), step(theirs, None)
  chex.assert_trees_all_close(tuple(ours[0]), theirs[:2], rtol=1e-4, atol=1e-5)
  environments = ours[1].oracles[0].inner[0]
  chex.assert_trees_all_close(
    environments.observation, theirs[3][1], rtol=1e-4, atol=1e-5
  )
