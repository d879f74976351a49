import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import contract, problems
from tests.contract import RATE, Row


def _optimiser(name):
  def make(wrap, rate=RATE):
    oracle = wrap(bj.gradient(contract.flat_loss))
    return optax.chain(oracle, getattr(optax, name)(rate))

  return make


def _signed(wrap, rate):
  """Descends in one variable and ascends in the other."""
  loss = lambda p, batch: contract.lower_loss(p.upper, p.lower, batch)
  oracle = wrap(bj.gradient(loss, of={'upper': -1, 'lower': 1}))
  return contract.by_descent(oracle, upper=rate, lower=rate)


def _lower(wrap, rate):
  oracle = wrap(bj.lower_gradient(contract.PROBLEM))
  return contract.by_descent(oracle, lower=rate)


_COST = {'gradients/loss': 1}

ROWS = (
  Row(
    'gradient, sgd',
    _optimiser('sgd'),
    _COST,
    params=contract.flat_params,
    hyper={},
  ),
  Row(
    'gradient, adam',
    _optimiser('adam'),
    _COST,
    params=contract.flat_params,
    hyper={'rate': RATE},
    light=True,
  ),
  Row('gradient, with signs', _signed, _COST, light=True),
  Row('lower_gradient', _lower, {'gradients/lower': 1}, light=True),
)


def evaluate(oracle, params, batch=None):
  return jax.jit(oracle.update)(batch, oracle.init(params), params)


def test_closed_form_on_a_quadratic(x64):
  matrix = jnp.array([[2.0, 0.5], [0.5, 1.0]])
  loss = lambda z, b: z @ matrix @ z / 2 - b @ z
  z, b = jnp.array([0.3, -1.2]), jnp.array([1.0, 2.0])
  slope, state = evaluate(bj.gradient(loss), z, b)
  np.testing.assert_allclose(slope, matrix @ z - b, rtol=1e-14)
  np.testing.assert_allclose(bj.values(state)['loss'], loss(z, b), rtol=1e-14)


@pytest.mark.parametrize('of', [None, 'upper', 'lower'])
def test_finite_differences(x64, of):
  params, batch = problems.rough_params(), problems.rough_batch()
  loss = lambda p, b: problems.rough_lower(*p, b)  # Has an auxiliary.
  slope, state = evaluate(bj.gradient(loss, of=of), params, batch)
  exact = problems.by_differences(lambda p: loss(p, batch)[0], params)
  if of:
    exact = bj.BilevelParams(None, None)._replace(**{of: getattr(exact, of)})
  chex.assert_trees_all_close(slope, exact, atol=1e-8)
  np.testing.assert_allclose(bj.values(state)['loss'], loss(params, batch)[0])


def test_the_others_get_none():
  params = bj.sequences(a=jnp.ones(2), b=jnp.ones(3))
  oracle = bj.gradient(lambda p, b: p.a.sum() * p.b.sum(), of='b', name='n')
  slope, state = evaluate(oracle, params)
  assert slope.a is None
  np.testing.assert_array_equal(slope.b, [2.0, 2.0, 2.0])
  assert bj.counts(state) == {'gradients/n': 1}


def test_counts_under_another_name():
  oracle = bj.gradient(lambda z, b: z**2, name='value', counts_as='lower')
  _, state = evaluate(oracle, jnp.float32(1.0))
  assert bj.counts(state) == {'gradients/lower': 1}
  assert bj.values(state) == {'value': 1.0}


def test_random_losses_take_their_key_in_the_batch():
  loss = lambda z, batch: z * jax.random.normal(batch['key'])
  oracle = bj.gradient(loss)
  key = jax.random.key(3)
  slope, _ = evaluate(oracle, jnp.float32(1.0), {'key': key})
  np.testing.assert_allclose(slope, jax.random.normal(key), rtol=1e-6)
  again, _ = evaluate(oracle, jnp.float32(1.0), {'key': key})
  other, _ = evaluate(oracle, jnp.float32(1.0), {'key': jax.random.key(4)})
  assert slope == again and slope != other


@pytest.mark.parametrize(
  ('loss', 'message'),
  [
    (lambda z, b: z, r'energy loss returned an array of shape \(2,\).*mean'),
    (lambda z, b: (z, 'aux'), r'energy loss .* shape \(2,\)'),
    (lambda z, b: jnp.int32(3), 'energy loss returned int32.*float'),
    (lambda z, b: 1j * z.sum(), 'energy loss returned complex64'),
    (lambda z, b: None, 'energy loss returned NoneType.*scalar'),
    (lambda z, b: {'loss': 1.0}, 'energy loss returned dict'),
    (lambda z, b: (z.sum(), 1, 2), 'energy loss returned tuple'),
  ],
)
def test_a_loss_that_is_no_scalar_is_named(loss, message):
  oracle = bj.gradient(loss, name='energy')
  with pytest.raises(TypeError, match=message):
    evaluate(oracle, jnp.ones(2))


def test_a_missing_sequence_is_named():
  oracle = bj.gradient(lambda p, b: p.sum(), of='lower')
  with pytest.raises(TypeError, match='an oracle works on the sequences lower'):
    evaluate(oracle, jnp.ones(2))


def test_without_params():
  solver = optax.chain(bj.gradient(lambda z, b: z.sum()), optax.sgd(1.0))
  with pytest.raises(TypeError, match=r'update\(batch, state, params\)'):
    solver.update(None, solver.init(jnp.ones(2)))
