"""`wrapped` equals wrappers placed by hand inside a solver, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract

SGD = optax.sgd(0.05)
BOTH = {'upper': SGD, 'lower': SGD}
PROBLEM = contract.PROBLEM


def halves(oracle):
  return bj.evaluation.accumulate(oracle, 2)


def late(oracle):
  return bj.evaluation.delayed(oracle, 2)


def run(solver, params):
  step, state = jax.jit(solver.update), solver.init(params)
  for t in range(3):
    updates, state = step(contract.random_batch(t), state, params)
    params = bj.apply_updates(params, updates)
  return params, state


def require_equal(one, two, params=contract.nested_params):
  actual, expected = run(one, params(0)), run(two, params(0))
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for one, two in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
      one, two = jax.random.key_data(one), jax.random.key_data(two)
    np.testing.assert_array_equal(one, two)


def by_hand(*oracles, **more):
  return bj.descend(*oracles, **BOTH, **more)


VALUE = bj.Sequence(SGD, start=lambda p: p.lower)
LINEAR = bj.Sequence(SGD, start=lambda p: optax.tree.zeros_like(p.lower))


@pytest.mark.parametrize('wrapper', [halves, late])
@pytest.mark.parametrize('fused', [True, False])
def test_wrapped_v_pbgd_equals_v_pbgd_of_a_wrapped_oracle(wrapper, fused):
  solver = bj.v_pbgd(PROBLEM, penalty=3.0, fused=fused, **BOTH)
  gap = bj.value_gap(PROBLEM, penalty=3.0)
  if not fused:  # The oracle and its aggregator are wrapped together.
    weigh = bj.aggregators.scale_by_penalty(3.0)
    gap = bj.oracles.aggregated(bj.value_gap(PROBLEM), weigh)
  follow = bj.lower_gradient(PROBLEM, of='value')
  require_equal(
    bj.evaluation.wrapped(solver, wrapper),
    by_hand(wrapper(follow), wrapper(gap), value=VALUE),
  )


def test_corrections_are_of_wrapped_oracles():
  solver = bj.solvers.fsla(PROBLEM, decay=0.5, **BOTH)
  turn = lambda of: late(bj.oracles.implicit_directions(PROBLEM, of=of))
  upper = bj.evaluation.storm(turn('upper'), 0.5)
  require_equal(
    bj.evaluation.wrapped(solver, late),
    by_hand(turn('lower'), turn('linear'), upper, linear=LINEAR),
  )


def test_tables_are_of_wrapped_oracles():
  solver = bj.saba(PROBLEM, parts=2, **BOTH)
  directions = late(bj.implicit_directions(PROBLEM))
  require_equal(
    bj.evaluation.wrapped(solver, late),
    by_hand(bj.evaluation.saga(directions, 2), linear=LINEAR),
  )


def test_each_oracle_of_together_is_wrapped():
  solver = bj.solvers.mrbo(PROBLEM, decay=0.5, terms=3, step_size=0.2, **BOTH)
  series = bj.linear_solvers.neumann(3, 0.2)
  system = bj.linear_solvers.LinearSystem(series, warm_start=False)
  both = bj.evaluation.together(
    late(bj.lower_gradient(PROBLEM)),
    late(bj.implicit(PROBLEM, solve=system)),
  )
  require_equal(
    bj.evaluation.wrapped(solver, late), by_hand(bj.evaluation.storm(both, 0.5))
  )


def test_each_objective_of_select_is_wrapped():
  losses = [contract.flat_loss, contract.flat_loss]
  arguments = {'weights': [0.5, 0.5], 'key': 0}
  same = {'batch_at': lambda batch, t: batch}
  oracle = bj.solvers.alright(losses, **arguments, **same)
  parts = {
    f'objective_{i}': halves(bj.gradient(f, name=f'objective_{i}'))
    for i, f in enumerate(losses)
  }
  rule = bj.evaluation.at_random(**arguments)
  require_equal(
    optax.chain(bj.evaluation.wrapped(oracle, halves), SGD),
    optax.chain(bj.evaluation.select(parts, rule, **same), SGD),
    contract.flat_params,
  )


def test_wrappers_nest_also_around_unmeasured_solvers():
  solver = bj.soba(PROBLEM, **BOTH)
  directions = late(halves(bj.implicit_directions(PROBLEM)))
  wrapped = bj.evaluation.wrapped(bj.evaluation.wrapped(solver, halves), late)
  hand = by_hand(directions, linear=LINEAR)
  require_equal(wrapped, hand)
  lean = bj.evaluation.unmeasured
  require_equal(
    bj.evaluation.wrapped(lean(bj.evaluation.wrapped(solver, halves)), late),
    lean(hand),
  )


def test_a_solver_exposes_its_parts():
  solver = bj.f2sa(
    PROBLEM, penalty=2.0, upper=SGD, lower=bj.Sequence(SGD, steps=3)
  )
  assert [oracle.moves for oracle in solver.oracles] == [
    ('value',),
    ('lower',),
    ('upper',),
  ]
  assert {n: s.steps for n, s in solver.sequences.items()} == {
    'upper': 1,
    'lower': 3,
    'value': 3,
  }
  assert isinstance(solver, optax.GradientTransformationExtraArgs)
  init, update = solver
  assert (init, update) == (solver.init, solver.update)


def test_a_chain_has_no_parts_and_the_error_names_the_remedy():
  rows = bj.multi_objective(contract.three_losses, 3)
  links = (bj.aggregators.mgda(3), optax.adam(0.1))
  chain = optax.chain(rows, *links)
  combined = bj.oracles.aggregated(rows, *links)
  require_equal(chain, combined, contract.flat_params)
  with pytest.raises(TypeError, match=r'bj\.oracles\.aggregated'):
    bj.evaluation.wrapped(chain, halves)
  with pytest.raises(ValueError, match=r'bj\.oracles\.aggregated'):
    halves(chain)
  require_equal(
    bj.evaluation.wrapped(combined, halves),
    optax.chain(halves(rows), *links),
    contract.flat_params,
  )


def test_seal_takes_no_wrapper():
  solver = bj.solvers.seal(
    lambda y, batch: jnp.sum(y**2),
    lambda y, batch: batch['c'][:, 0] * y.sum(),
    scores=bj.solvers.RowScores(SGD, 4, lambda batch: batch['at']),
    penalty=1.0,
    lower=SGD,
  )
  assert set(solver.sequences) == {'selector', 'lower'}
  with pytest.raises(ValueError, match='take no wrapper'):
    bj.evaluation.wrapped(solver, halves)


def test_an_oracle_is_a_value():
  oracle = bj.gradient(contract.flat_loss)
  with pytest.raises(AttributeError, match=r'_replace\(linear=...\)'):
    oracle.linear = False
  other = oracle._replace(init=lambda params: ())
  assert (other.linear, other.update) == (True, oracle.update)
  with pytest.raises(TypeError, match=r'expected an oracle.*got function'):
    bj.descend(contract.flat_loss, z=SGD)
