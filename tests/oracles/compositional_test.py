"""Compositions: the chain rule at tracked values, and the corrections."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bilevel_jax as bj


def chain(depth):
  """Smooth functions between dictionaries and vectors of various sizes."""

  def level(n):
    def function(value, batch):
      leaves = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(value)])
      mixed = jnp.sin(leaves * (n + 1)) + batch * leaves[::-1]
      return {'a': mixed, 'b': mixed[:1] ** 2} if n % 2 == 0 else mixed[:3]

    return function

  outside = lambda value, batch: sum(
    (jnp.cos(leaf) * batch).sum() for leaf in jax.tree.leaves(value)
  )
  return [level(n) for n in range(depth)] + [outside]


def at_true_values(functions, x, batch):
  values = []
  value = x
  for function in functions[:-1]:
    value = function(value, batch)
    values.append(value)
  names = {f'level_{n}': v for n, v in enumerate(values, 1)}
  return bj.sequences(main=x, **names)


@given(st.integers(0, 4), st.integers(0, 100))
def test_at_the_true_values_it_is_the_gradient(depth, seed):
  functions = chain(depth)
  x = jax.random.normal(jax.random.key(seed), (4,))
  batch = 0.7

  def whole(x):
    for function in functions:
      x = function(x, batch)
    return x

  params = at_true_values(functions, x, batch)
  oracle = bj.compositional(functions)
  found, state = oracle.update(batch, oracle.init(params), params)
  loss, expected = jax.value_and_grad(whole)(x)
  np.testing.assert_allclose(found.main, expected, rtol=2e-4, atol=1e-5)
  np.testing.assert_allclose(bj.values(state)['loss'], loss, rtol=1e-5)
  for name in params._fields[1:]:
    for leaf in jax.tree.leaves(getattr(found, name)):
      np.testing.assert_allclose(leaf, 0, atol=1e-6)


def test_chain_rule_at_tracked_values_and_a_batch_for_each_level():
  functions = [
    lambda x, batch: batch * x**2,
    lambda y, batch: batch * y**3,
    lambda z, batch: batch * z**2,
  ]
  batch = (1.0, 10.0, 100.0)
  params = bj.sequences(main=2.0, level_1=3.0, level_2=5.0)
  params = jax.tree.map(jnp.float32, params)
  oracle = bj.compositional(functions, batch_of=lambda b, n: b[n])
  found, _ = oracle.update(batch, oracle.init(params), params)
  np.testing.assert_allclose(found.main, 2 * 2 * 30 * 9 * 200 * 5)
  np.testing.assert_allclose(found.level_1, 3 - 4)
  np.testing.assert_allclose(found.level_2, 5 - 270)


def test_parts_alone():
  functions, x = chain(2), jnp.ones(4)
  params = at_true_values(functions, x, 0.3)._replace(level_2=jnp.zeros(3))
  whole = bj.compositional(functions)
  both, _ = whole.update(0.3, whole.init(params), params)
  for of, names in (('main', ('main',)), ('levels', ('level_1', 'level_2'))):
    oracle = bj.compositional(functions, of=of)
    found, _ = oracle.update(0.3, oracle.init(params), params)
    for name in params._fields:
      if name in names:
        jax.tree.map(
          np.testing.assert_allclose, getattr(found, name), getattr(both, name)
        )
      else:
        assert getattr(found, name) is None


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
    solver = getattr(bj, name)(
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


def test_errors():
  with pytest.raises(ValueError, match='at least one function'):
    bj.compositional([])
  with pytest.raises(ValueError, match="'all', 'main' or 'levels'"):
    bj.compositional(chain(1), of='none')
  params = bj.sequences(main=jnp.ones(4))
  oracle = bj.compositional(chain(1))
  with pytest.raises(TypeError, match='level_1'):
    oracle.update(0.1, oracle.init(params), params)
  solver = bj.solvers.scgd(
    chain(2), main=optax.sgd(0.1), tracking=0.5, levels=lambda params: (1.0,)
  )
  with pytest.raises(ValueError, match='2 inner levels'):
    solver.init(params)
