"""BSA, TTSA, stocBiO, ALSET, AmIGO: one method and a row of a table each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import INNER, X_SET, Row

S = bj.Sequence


def _row(wrap, rate, solver, steps=None, upper_set=None, terms=2, key=None):
  sgd = optax.sgd(rate)
  lower = sgd
  if steps is not None:
    lower = S(sgd, steps=steps, batch_at=contract.inner_batch)
  solver = getattr(bj.solvers, solver)(
    contract.PROBLEM,
    upper=S(sgd, set=upper_set),
    lower=lower,
    terms=terms,
    step_size=0.5,
    key=key,
  )
  return bj.evaluation.wrapped(solver, wrap)


def _cost(steps, terms):
  # One product more, for the cross term.
  return {
    'gradients/upper': 1,
    'gradients/lower': steps,
    'hessian_vector_products/lower': 1 + terms,
  }


_of = lambda solver, **given: functools.partial(_row, solver=solver, **given)

ROWS = (
  Row('stocbio', _of('stocbio', steps=INNER), _cost(INNER, 2), parts='none'),
  Row(
    'alset, in a set',
    _of('alset', upper_set=X_SET),
    _cost(1, 2) | {'projections/upper': 1},
    sets={'upper': X_SET},
    parts='none',
    light=True,
  ),
  Row(
    'amigo',
    _of('amigo', steps=INNER),
    _cost(INNER, 2),
    keys=True,
    parts='none',
    light=True,
  ),
  Row(
    'bsa',
    _of('bsa', steps=INNER, terms=4, key=0),
    {'gradients/upper': 1, 'gradients/lower': INNER},
    random_counts=('hessian_vector_products/lower',),
    keys=True,
    parts='none',
  ),
  Row(
    'ttsa',
    _of('ttsa', terms=4, key=0),
    {'gradients/upper': 1, 'gradients/lower': 1},
    random_counts=('hessian_vector_products/lower',),
    keys=True,
    parts='none',
    light=True,
  ),
)

NAMES = ('bsa', 'ttsa', 'stocbio', 'alset', 'amigo')


def test_a_bare_lower_optimiser_takes_as_many_steps_as_the_method_says():
  params = problems.start(jnp.float32)
  two = S(optax.sgd(0.1), steps=2)
  cases = dict(zip(NAMES, (10, 1, 10, 1, 10))) | {two: 2}

  @jax.jit
  def one_update():
    found = []
    for case in cases:
      name, lower = (case, optax.sgd(0.1)) if case != two else ('bsa', two)
      solver = getattr(bj.solvers, name)(
        problems.QUADRATIC,
        upper=optax.sgd(0.0),
        lower=lower,
        terms=1,
        step_size=0.5,
        key=0,
      )
      updates, state = solver.update(None, solver.init(params), params)
      found.append((updates.lower, bj.counts(state)['gradients/lower']))
    return found

  for wanted, (update, count) in zip(cases.values(), one_update()):
    assert count == wanted
    y = np.asarray(params.lower)
    for _ in range(wanted):
      y = y - 0.1 * problems.lower_slope(params.upper, y)
    np.testing.assert_allclose(params.lower + update, y, rtol=1e-5)


def test_only_amigo_goes_on_where_its_linear_system_ended():
  """So that one product an update solves it in the end, without bias."""
  ends = {}
  for name in ('stocbio', 'amigo'):
    solver = getattr(bj.solvers, name)(
      problems.QUADRATIC,
      upper=optax.sgd(0.1),
      lower=optax.sgd(0.5),
      terms=1,
      step_size=0.5,
    )
    params, _ = problems.solve(solver, 1_000, problems.start(jnp.float32))
    ends[name] = np.abs(params.upper - problems.SOLUTION).max()
  assert ends['amigo'] < 1e-5
  assert ends['stocbio'] > 1e-2


@pytest.mark.parametrize('name', ['bsa', 'ttsa'])
def test_random_lengths_need_a_key(name):
  solver = getattr(bj.solvers, name)(
    problems.QUADRATIC,
    upper=optax.sgd(0.1),
    lower=optax.sgd(0.1),
    terms=2,
    step_size=0.5,
  )
  with pytest.raises(TypeError, match='draws random numbers: pass key='):
    solver.init(problems.start(jnp.float32))


def test_each_has_a_docstring_of_its_own():
  texts = {getattr(bj.solvers, name).__doc__ for name in NAMES}
  assert len(texts) == len(NAMES)
  for name in NAMES:
    assert getattr(bj.solvers, name).__name__ == name
