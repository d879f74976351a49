"""Every aggregator gives what another library recorded, on the same matrices.

The values are in `tests/data`, with the script that made them.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.aggregators import _rows, _surgery

RECORDED = json.loads(
  (pathlib.Path(__file__).parents[1] / 'data/torchjd_values.json').read_text()
)
KEY = jax.random.key(0)
MAKE = {
  'mean': bj.aggregators.mean,
  'weighted': lambda n: bj.aggregators.weighted(np.arange(1.0, n + 1)),
  'mgda': bj.aggregators.mgda,
  'cagrad': lambda n: bj.aggregators.cagrad(n, radius=0.4),
  'imtl_g': bj.aggregators.imtl_g,
  'nash_mtl': bj.aggregators.nash_mtl,
  'nash_mtl of norm one': lambda n: bj.aggregators.nash_mtl(n, max_norm=1.0),
  'aligned_mtl': bj.aggregators.aligned_mtl,
  'upgrad': bj.aggregators.upgrad,
  'dual_proj': bj.aggregators.dual_proj,
  'stch': lambda n: bj.aggregators.stch(n, smoothing=0.3),
  'uncertainty_weighting': bj.aggregators.uncertainty_weighting,
}
RANDOM = ('pcgrad', 'grad_drop', 'grad_vac')
DOUBLE = {
  'modo': lambda n: bj.aggregators.modo(
    n, weight_step=0.05, regularisation=0.1, samples=2
  ),
  'sdmgrad': lambda n: bj.aggregators.sdmgrad(n, weight_step=0.5, samples=2),
}


def rows_of(*methods):
  return [row for row in RECORDED['rows'] if row['method'] in methods]


def name_of(row):
  return f'{row["method"]}, {row["matrix"]}'


def jacobian_of(row):
  matrix = jnp.asarray(np.array(RECORDED['matrices'][row['matrix']]))
  return bj.Jacobian(matrix, values=jnp.linspace(0.5, 2.0, matrix.shape[0]))


def assert_same(ours, row):
  theirs = np.array(row['value'])
  scale = max(1.0, np.abs(theirs).max())
  np.testing.assert_allclose(
    np.asarray(ours) / scale, theirs / scale, atol=1e-4
  )


@pytest.fixture(autouse=True)
def double_precision():
  with jax.enable_x64(True):
    yield


def test_everything_that_is_recorded_is_compared():
  methods = {row['method'] for row in RECORDED['rows']}
  assert methods == set(MAKE) | set(RANDOM) | set(DOUBLE)
  assert len(RECORDED['rows']) > 150


@pytest.mark.parametrize('row', rows_of(*MAKE), ids=name_of)
def test_aggregation(row):
  jacobian = jacobian_of(row)
  link = MAKE[row['method']](jacobian.rows.shape[0])
  params = jnp.zeros(jacobian.rows.shape[1])
  ours, _ = jax.jit(link.update)(jacobian, link.init(params), params)
  if row['method'].startswith('nash') and row['matrix'] in NASH_FAILS:
    assert bargain_error(ours, jacobian) < 1e-6
    assert bargain_error(row['value'], jacobian) > 1e-2
    return
  assert_same(ours, row)


# There the recorded sequence of convex programs has not solved the equation
# that defines the bargain; ours has.
NASH_FAILS = ('three scales', 'more rows than columns')


def bargain_error(direction, jacobian):
  """How far a direction is from a sum of rows over their products with it."""
  matrix, direction = np.asarray(jacobian.rows), np.asarray(direction)
  again = (1 / (matrix @ direction)) @ matrix
  unit = lambda x: x / np.linalg.norm(x)
  return np.abs(unit(again) - unit(direction)).max()


def shuffles(drawn, size):
  """Recorded orders of the other rows, as orders of all rows."""
  if len(drawn[0]) == size:
    return jnp.asarray(drawn)
  others = [[j for j in range(size) if j != i] for i in range(size)]
  return jnp.asarray(
    [[others[i][k] for k in drawn[i]] + [i] for i in range(size)]
  )


@pytest.mark.parametrize('row', rows_of('pcgrad'), ids=name_of)
def test_pcgrad_in_the_recorded_order(row):
  matrix = jacobian_of(row).rows
  orders = shuffles(row['drawn'], matrix.shape[0])
  weights = _surgery.project_conflicts(matrix @ matrix.T, orders)
  assert_same(weights @ matrix, row)


@pytest.mark.parametrize('row', rows_of('grad_vac'), ids=name_of)
def test_grad_vac_twice_in_the_recorded_orders(row):
  matrix = jacobian_of(row).rows
  size = matrix.shape[0]
  targets = jnp.zeros((size, size))
  gramian = matrix @ matrix.T
  first = shuffles(row['drawn'][:size], size)
  second = shuffles(row['drawn'][-size:], size)
  _, targets = _surgery.vaccinate(gramian, targets, first, 0.5)
  weights, _ = _surgery.vaccinate(gramian, targets, second, 0.5)
  assert_same(weights @ matrix, row)


@pytest.mark.parametrize('row', rows_of('grad_drop'), ids=name_of)
def test_grad_drop_with_the_recorded_numbers(row):
  matrix = jacobian_of(row).rows
  drawn = jnp.asarray(row['drawn'][0])
  assert_same(_surgery.drop_signs(matrix, drawn), row)


@pytest.mark.parametrize('row', rows_of(*DOUBLE), ids=name_of)
def test_weights_from_two_jacobians_after_two_updates(row):
  first = jacobian_of(row).rows
  size = first.shape[0]
  link = DOUBLE[row['method']](size)
  params = jnp.zeros(first.shape[1])
  both = bj.Jacobian(jnp.concatenate([first, first + 0.1]))
  state = link.init(params)
  for _ in range(2):
    _, state = link.update(both, state, params)
  assert_same(state.weights, row)


def test_gram_matrix_in_chunks_equals_one_product():
  draw = np.random.default_rng(0)
  columns = 2 * _rows.CHUNK + 77
  ours, theirs = draw.normal(size=(2, 3, columns))
  tree = lambda x: {'a': jnp.asarray(x), 'b': jnp.asarray(x[:, :4])}
  found = _rows.products(tree(ours), tree(theirs))
  expected = ours @ theirs.T + ours[:, :4] @ theirs[:, :4].T
  np.testing.assert_allclose(found, expected, rtol=1e-10)
