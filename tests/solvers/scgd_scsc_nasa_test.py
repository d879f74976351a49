"""SCGD, SCSC and NASA: recursions by hand, and the lag of a running mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract
from tests.contract import RATE, X_SET, Row

S = bj.Sequence


def _levels():
  """Two inner levels: a vector, and a tree of which two ways lead on."""

  def first(x, batch):
    return x['a'] * batch['w'].mean().astype(x['a'].dtype) + batch['d'].mean(
      (0, 1)
    )

  def second(y, batch):
    return {'b': 2 * y, 'c': jnp.sin(y)}

  def last(z, batch):
    fit = contract.flat_loss({'z': z['b'] / 2}, batch)
    return fit + ((z['c'] - z['b'] / 2) ** 2).sum()

  return first, second, last


def _starts(params):
  zero = jnp.zeros_like(params.main['a'])
  return zero, {'b': zero + 1, 'c': jnp.zeros_like(zero)}


def _main(seed, dtype=jnp.float32):
  return bj.sequences(main=contract.nested_params(seed, dtype).upper)


def _with_levels(seed, dtype=jnp.float32):
  params = _main(seed, dtype)
  one, two = _starts(params)
  return bj.sequences(main=params.main, level_1=one, level_2=two)


def _row(wrap, rate, tracking, solver, main_set=None, **given):
  solver = getattr(bj.solvers, solver)(
    _levels(),
    main=S(optax.sgd(rate), set=main_set),
    tracking=tracking,
    levels=_starts,
    **given,
  )
  return bj.evaluation.wrapped(solver, wrap)


def _bare(wrap, rate, tracking):
  oracle = wrap(bj.compositional(_levels()))
  return contract.by_descent(
    oracle, main=rate, level_1=tracking, level_2=tracking
  )


_COST = {f'values/level_{n}': 1 for n in range(2)}
_COST |= {f'gradients/level_{n}': 1 for n in range(3)}
_HYPER = {
  'params': _main,
  'hyper': {'rate': RATE, 'tracking': 0.5},
  # A mean of products of levels is no product of means.
  'parts': 'none',
}

ROWS = (
  Row('scgd', functools.partial(_row, solver='scgd'), _COST, **_HYPER),
  Row(
    'scgd, in a set',
    functools.partial(_row, solver='scgd', main_set=X_SET),
    _COST | {'projections/main': 1},
    sets={'main': X_SET},
    light=True,
    **_HYPER,
  ),
  Row(
    'nasa',
    functools.partial(_row, solver='nasa', averaging=0.5),
    _COST,
    **_HYPER,
  ),
  Row(
    'scsc',
    functools.partial(_row, solver='scsc'),
    _COST | {'values/level_0': 3, 'values/level_1': 3},
    devices=True,
    **_HYPER,
  ),
  Row(
    'compositional',
    _bare,
    _COST,
    same_as='scgd',
    light=True,
    **_HYPER | {'params': _with_levels},
  ),
)


def test_scsc_is_its_recursion():
  # y <- (1 - b)(y + f(x_k) - f(x_{k-1})) + b f(x_k), one sample in both.
  inside = lambda x, batch: jnp.sin(x) * batch
  solver = bj.solvers.scsc(
    [inside, lambda y, batch: y**2],
    main=optax.sgd(0.1),
    tracking=0.3,
    levels=lambda params: (jnp.zeros(()),),
  )
  params = bj.sequences(main=jnp.float32(1.0))
  state = solver.init(params)
  before, y = None, None
  for k in range(5):
    batch, x = 1.0 + 0.5 * k, float(params.main)
    new = np.sin(x) * batch
    y = new if k == 0 else 0.7 * (y + new - np.sin(before) * batch) + 0.3 * new
    before = x
    updates, state = solver.update(batch, state, params)
    params = bj.apply_updates(params, updates)
    np.testing.assert_allclose(bj.auxiliaries(state)['level_1'], y, rtol=1e-5)
    # The main sequence sees the new mean.
    np.testing.assert_allclose(
      updates.main, -0.1 * np.cos(x) * batch * 2 * y, rtol=1e-5
    )


def test_correction_takes_out_the_lag():
  # The inner value moves at a constant speed; a running mean lags behind.
  functions = [lambda x, batch: x, lambda y, batch: 1.0 * y]
  lags = {}
  for name in ('scgd', 'scsc'):
    solver = getattr(bj.solvers, name)(
      functions,
      main=optax.sgd(0.1),
      tracking=0.05,
      levels=lambda params: (params.main,),
    )
    params = bj.sequences(main=jnp.float32(0.0))
    state, step = solver.init(params), jax.jit(solver.update)
    for _ in range(200):
      seen = params.main
      updates, state = step(None, state, params)
      params = bj.apply_updates(params, updates)
    lags[name] = abs(float(bj.auxiliaries(state)['level_1'] - seen))
  # Speed over tracking, less the last step.
  np.testing.assert_allclose(lags['scgd'], 0.1 / 0.05 - 0.1, rtol=1e-3)
  assert lags['scsc'] < 1e-5


def test_nasa_averages_the_direction_of_scgd():
  """Constant slopes: the mean is short of them by (1 - a)^k."""
  solver = bj.solvers.nasa(
    [lambda x, batch: x, lambda y, batch: 3 * y],
    main=optax.sgd(1.0),
    tracking=0.5,
    averaging=0.25,
    levels=lambda params: (params.main,),
  )
  params = bj.sequences(main=jnp.float32(0.0))
  state = solver.init(params)
  for k in range(1, 4):
    updates, state = solver.update(None, state, params)
    np.testing.assert_allclose(updates.main, -3 * (1 - 0.75**k), rtol=1e-6)


def test_errors():
  functions = [lambda x, b: x, lambda x, b: x, lambda x, b: x.sum()]
  given = {'main': optax.sgd(0.1), 'tracking': 0.5}
  solver = bj.solvers.scgd(functions, levels=lambda params: (1.0,), **given)
  with pytest.raises(ValueError, match='2 inner levels'):
    solver.init(bj.sequences(main=jnp.ones(4)))
  for averaging in (0.0, 1.5):
    with pytest.raises(ValueError, match=r'averaging is in \(0, 1\]'):
      bj.solvers.nasa(
        functions, averaging=averaging, levels=lambda params: (), **given
      )
