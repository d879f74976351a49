"""All solvers return the auxiliary outputs that a problem asks for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import named_solvers, tiers


def _with_outputs(loss):
  """A loss whose outputs hold its value, and whole numbers beside it."""

  def full(x, y, batch):
    value = loss(x, y, batch)
    return value, {'twice': 2 * value, 'row': batch['row'], 'y': y}

  return full


def _announced(params):
  one = {'twice': jnp.zeros([]), 'row': jnp.zeros(2, int), 'y': params.lower}
  return {'upper': one, 'lower': one}


def _problem(*asked):
  losses = map(_with_outputs, named_solvers.PROBLEM[:2])
  wanted = lambda params: {n: _announced(params)[n] for n in asked}
  return bj.BilevelProblem(*losses, outputs=wanted)


def _check(state, asked):
  found, values = bj.outputs(state), bj.values(state)
  assert set(found) == set(asked)
  for name in asked:
    rows = named_solvers.BATCH['row']
    np.testing.assert_array_equal(found[name]['row'], rows)
    assert found[name]['twice'] != 0
    if name in values:
      np.testing.assert_array_equal(found[name]['twice'], 2 * values[name])


@pytest.mark.parametrize(
  'solver',
  tiers.slow_where(
    named_solvers.NESTED_SOLVERS, named_solvers.VARIANTS.__contains__
  ),
)
def test_a_solver_returns_the_outputs_of_the_losses_measured(solver):
  both = ('upper', 'lower')
  found = []
  with jax.disable_jit():
    for problem in (_problem(*both), named_solvers.PROBLEM):
      case = named_solvers.make_case(solver, problem)
      made = case.make(**named_solvers.make_records(solver))
      state = made.init(case.params)
      updates, state = made.update(named_solvers.BATCH, state, case.params)
      found.append((updates, state))
  (updates, state), (without, _) = found
  _check(state, both)
  jax.tree.map(np.testing.assert_array_equal, updates, without)


@pytest.mark.slow
@pytest.mark.parametrize(
  'settings',
  [
    {'mode': 'mixed'},
    {'mode': 'forward'},
    {'checkpoint': 2},
    {'mode': 'mixed', 'checkpoint': 2, 'truncate': 3},
  ],
  ids=str,
)
def test_outputs_of_an_unrolled_loop_in_each_mode(settings):
  sgd = optax.sgd(0.1)
  lower = bj.Sequence(sgd, steps=4)
  params, batch = named_solvers.NESTED, named_solvers.BATCH
  for asked in (('upper', 'lower'), ('lower',), ('upper',)):
    solver = bj.rhg(_problem(*asked), upper=sgd, lower=lower, **settings)
    _, state = jax.jit(solver.update)(batch, solver.init(params), params)
    _check(state, asked)


def test_outputs_of_a_loop_that_were_not_announced():
  sgd = optax.sgd(0.1)
  wanted = lambda params: {'lower': {'twice': jnp.zeros([])}}
  problem = _problem('lower')._replace(outputs=wanted)
  solver = bj.rhg(problem, upper=sgd, lower=sgd)
  params = named_solvers.NESTED
  with pytest.raises(ValueError, match='announced'):
    solver.update(named_solvers.BATCH, solver.init(params), params)
