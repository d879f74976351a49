"""Solvers without losses and counts take the same steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

SGD = optax.sgd(0.05)
PROBLEM = bj.BilevelProblem(
  upper=lambda x, y, batch: jnp.sum((y - batch) ** 2) + jnp.sum(x**2),
  lower=lambda x, y, batch: jnp.sum((y - jnp.sin(x)) ** 2),
)


def storm():
  gradient = bj.gradient(lambda z, batch: PROBLEM.upper(*z, batch))
  return bj.descend(bj.evaluation.storm(gradient, 0.5), upper=SGD, lower=SGD)


SOLVERS = {
  'v_pbgd': lambda: bj.v_pbgd(
    PROBLEM,
    penalty=10.0,
    upper=bj.Sequence(optax.adam(0.1), set=lambda x: jnp.clip(x, -1, 1)),
    lower=SGD,
  ),
  'f2sa': lambda: bj.f2sa(
    PROBLEM, penalty=10.0, upper=SGD, lower=bj.Sequence(SGD, steps=3)
  ),
  'saba': lambda: bj.saba(
    PROBLEM, parts=2, index=lambda b: jnp.int32(0), upper=SGD, lower=SGD
  ),
  'storm': storm,
  'chain': lambda: optax.chain(
    bj.multi_objective(
      lambda z, batch: jnp.stack(
        [PROBLEM.upper(*z, batch), jnp.sum(z[1] ** 2)]
      ),
      2,
    ),
    bj.aggregators.moco(2),
    SGD,
  ),
}


@pytest.mark.parametrize('name', SOLVERS)
def test_takes_the_same_steps(name):
  solver = SOLVERS[name]()
  params = bj.BilevelParams(jnp.ones(3), jnp.zeros(3))
  batches = jnp.linspace(-1.0, 1.0, 5)[:, None] * jnp.ones(3)

  def run(solver):
    def body(carry, batch):
      params, state = carry
      updates, state = solver.update(batch, state, params)
      return (bj.apply_updates(params, updates), state), None

    start = (params, solver.init(params))
    return jax.jit(lambda c: jax.lax.scan(body, c, batches)[0])(start)

  wanted, full = run(solver)
  assert bj.values(full) and all(bj.counts(full).values())
  actual, lean = run(bj.evaluation.unmeasured(solver))
  jax.tree.map(np.testing.assert_array_equal, actual, wanted)
  assert not bj.values(lean) and not bj.counts(lean)
  jax.tree.map(
    np.testing.assert_array_equal, bj.auxiliaries(lean), bj.auxiliaries(full)
  )


def test_the_program_computes_and_returns_only_updates_and_sequences():
  params = bj.BilevelParams(jnp.ones(3), jnp.zeros(3))
  solver = bj.v_pbgd(PROBLEM, penalty=10.0, upper=SGD, lower=SGD)
  solver = bj.evaluation.unmeasured(solver)
  compiled = jax.jit(solver.update).lower(
    jnp.ones(3), solver.init(params), params
  )
  assert len(jax.tree.leaves(compiled.out_info)) == 3
