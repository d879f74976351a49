"""Compositions: the chain rule at tracked values, and the corrections."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_at_the_true_values_it_is_the_gradient():
  batch = 0.7

  def both(functions, x):
    def whole(x):
      for function in functions:
        x = function(x, batch)
      return x

    params = at_true_values(functions, x, batch)
    oracle = bj.compositional(functions)
    found, state = oracle.update(batch, oracle.init(params), params)
    ours = {'main': found.main, 'loss': bj.values(state)['loss']}
    loss, expected = jax.value_and_grad(whole)(x)
    return ours, {'main': expected, 'loss': loss}, found[1:]

  @jax.jit
  def of_all_depths(points):
    cases = [functools.partial(both, chain(depth)) for depth in range(5)]
    return [jax.vmap(case)(points) for case in cases]

  points = jax.random.normal(jax.random.key(0), (8, 4))
  for ours, expected, levels in of_all_depths(points):
    chex.assert_trees_all_close(ours, expected, rtol=2e-4, atol=1e-5)
    for leaf in jax.tree.leaves(levels):
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


def test_errors():
  with pytest.raises(ValueError, match='at least one function'):
    bj.compositional([])
  with pytest.raises(ValueError, match="'all', 'main' or 'levels'"):
    bj.compositional(chain(1), of='none')
  params = bj.sequences(main=jnp.ones(4))
  oracle = bj.compositional(chain(1))
  with pytest.raises(TypeError, match='level_1'):
    oracle.update(0.1, oracle.init(params), params)
