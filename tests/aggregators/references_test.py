"""Every aggregator against plain NumPy, over updates, in both precisions.

Square matrices would hide a confusion of objectives and coordinates, so there
are also matrices with three rows and five columns. Some have a zero row, equal
rows or dependent rows.
"""

import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.aggregators import _pcgrad_grad_vac
from tests.aggregators import references, stateful
from tests.tiers import first

STEPS = 3
RECORDED = json.loads(
  (pathlib.Path(__file__).parents[1] / 'data/torchjd_values.json').read_text()
)


def draw(rows, columns):
  """Matrices of each kind and update: (kinds, STEPS, rows, columns)."""
  rng = np.random.default_rng(rows)
  kinds = []
  for kind in ('generic', 'zero', 'twins', 'dependent', 'scales')[: rows + 2]:
    matrix = rng.normal(size=(STEPS, rows, columns))
    if kind == 'zero':
      matrix[:, 0] = 0
    elif kind == 'twins':
      matrix[:, -1] = matrix[:, 0]
    elif kind == 'dependent' and rows > 2:
      matrix[:, 2] = 0.3 * matrix[:, 0] + 0.5 * matrix[:, 1]
    elif kind == 'scales':
      matrix *= 10.0 ** np.linspace(-1, 1, rows)[:, None]
    kinds.append(matrix)
  return np.stack(kinds)


def losses(rows):
  return np.linspace(0.5, 2.0, rows)


def each(aggregate):
  """The reference of a stateless aggregator."""
  return lambda matrices: [aggregate(matrix) for matrix in matrices]


def remembered(make):
  """The reference of a stateful aggregator, from a number of rows."""

  def over_updates(matrices):
    rows = matrices.shape[1]
    step = make(rows)
    return [step(matrix, losses(rows)) for matrix in matrices]

  return over_updates


def drawn_weights(rows):
  return stateful.random_weights(rows, jax.random.key(0), jnp.zeros([]).dtype)


def halves(count):
  return 0.5


def orders(rows, steps=STEPS):
  """The random orders of key 0, update by update."""
  key, directions = jax.random.key(0), []
  for _ in range(steps):
    key, drawn = _pcgrad_grad_vac._orders(key, rows)
    directions.append(np.asarray(drawn))
  return directions


def pcgrad(matrices):
  pairs = zip(matrices, orders(matrices.shape[1]))
  return [references.pcgrad(*pair) for pair in pairs]


def grad_vac(matrices):
  rows = matrices.shape[1]
  targets, directions = np.zeros((rows, rows)), []
  for matrix, order in zip(matrices, orders(rows)):
    direction, targets = references.grad_vac(matrix, order, targets)
    directions.append(direction)
  return directions


def grad_drop(matrices):
  key, directions = jax.random.key(0), []
  for matrix in matrices:
    key, now = jax.random.split(key)
    (now,) = jax.random.split(now, 1)
    uniform = np.asarray(jax.random.uniform(now, matrix.shape[1:]))
    directions.append(references.grad_drop(matrix, uniform))
  return directions


def stch(matrices):
  rows = matrices.shape[1]
  preference = np.arange(1.0, rows + 1)
  return [
    references.stch(
      matrix, losses(rows), 0.3 / (k + 1), preference, reference=0.1
    )
    for k, matrix in enumerate(matrices)
  ]


def uncertainty(matrices):
  rows = matrices.shape[1]
  variance, directions = np.zeros(rows), []
  for matrix in matrices:
    direction, variance = references.uncertainty_weighting(
      matrix, losses(rows), variance, 0.5
    )
    directions.append(direction)
  return directions


def moco(matrices, **kwargs):
  rows = matrices.shape[1]
  weights, tracked = np.full(rows, 1 / rows), np.zeros(matrices.shape[1:])
  directions = []
  for k, matrix in enumerate(matrices):
    direction, weights, tracked = references.moco(
      matrix, tracked, weights, 1.5 / (k + 1), 0.4 / (k + 1), **kwargs
    )
    directions.append(direction)
  return directions


def _moco(rows, **kwargs):
  kwargs = {'weight_step': lambda k: 0.4 / (k + 1)} | kwargs
  return bj.aggregators.moco(rows, tracking=lambda k: 1.5 / (k + 1), **kwargs)


def local_moco(matrices):
  """Two samples per update: the gradients are tracked twice."""
  rows = matrices.shape[1] // 2
  weights, tracked = np.full(rows, 1 / rows), np.zeros_like(matrices[0, :rows])
  directions = []
  for matrix in matrices:
    tracked = references.moco(matrix[:rows], tracked, weights, 0.5, 0.1)[2]
    direction, weights, tracked = references.moco(
      matrix[rows:], tracked, weights, 0.5, 0.1
    )
    directions.append(direction)
  return directions


def modo(matrices):
  """Three samples per update, with a decreasing step size."""
  rows = matrices.shape[1] // 3
  weights, directions = np.full(rows, 1 / rows), []
  for k, (one, two, three) in enumerate(split(matrices, 3)):
    weights = references.modo(one, two, weights, 0.3 / (k + 1), 0.1)
    directions.append(weights @ three)
  return directions


def sdmgrad(matrices):
  rows = matrices.shape[1] // 2
  weights, directions = np.full(rows, 1 / rows), []
  for one, two in split(matrices, 2):
    taken, weights = references.sdmgrad(one, two, weights, 1.0)
    directions.append(taken @ (one + two) / 2)
  return directions


def split(matrices, samples):
  return matrices.reshape(len(matrices), samples, -1, matrices.shape[2])


A = bj.aggregators
# For each aggregator: its factory for a number of rows, its reference over
# updates, and its number of samples.
CASES = {
  'mean': (A.mean, each(lambda m: m.mean(0))),
  'weighted': (
    lambda n: A.weighted(np.arange(1.0, n + 1)),
    each(lambda m: np.arange(1.0, len(m) + 1) @ m),
  ),
  'mgda': (A.mgda, each(references.mgda)),
  'mgda, normalised': (
    lambda n: A.mgda(n, normalise=True),
    each(lambda m: references.mgda(references.unit(m))),
  ),
  'upgrad': (A.upgrad, each(references.upgrad)),
  'upgrad, preferences': (
    lambda n: A.upgrad(n, preference=np.arange(float(n))),
    each(lambda m: references.upgrad(m, np.arange(float(len(m))))),
  ),
  'dual_proj': (A.dual_proj, each(references.dual_proj)),
  'dual_proj, preferences': (
    lambda n: A.dual_proj(n, preference=np.arange(float(n))),
    each(lambda m: references.dual_proj(m, np.arange(float(len(m))))),
  ),
  'cagrad': (A.cagrad, each(references.cagrad)),
  'nash_mtl': (A.nash_mtl, each(references.nash_mtl)),
  'nash_mtl, normalised': (
    lambda n: A.nash_mtl(n, normalise=True),
    each(functools.partial(references.nash_mtl, normalise=True)),
  ),
  'nash_mtl, of norm one': (
    lambda n: A.nash_mtl(n, max_norm=1.0),
    each(functools.partial(references.nash_mtl, max_norm=1.0)),
  ),
  'fair_grad': (A.fair_grad, each(lambda m: references.fair(m, 2))),
  'fair_grad, of one half': (
    lambda n: A.fair_grad(n, alpha=0.5),
    each(lambda m: references.fair(m, 0.5)),
  ),
  'imtl_g': (A.imtl_g, each(references.imtl_g)),
  'aligned_mtl': (A.aligned_mtl, each(references.aligned_mtl)),
  'config': (A.config, each(references.config)),
  'config, preferences': (
    lambda n: A.config(n, preference=np.arange(float(n))),
    each(lambda m: references.config(m, np.arange(float(len(m))))),
  ),
  'pcgrad': (lambda n: A.pcgrad(n, key=0), pcgrad),
  'grad_vac': (lambda n: A.grad_vac(n, key=0), grad_vac),
  'grad_drop': (lambda n: A.grad_drop(n, key=0), grad_drop),
  'stch': (
    lambda n: A.stch(
      n,
      smoothing=lambda k: 0.3 / (k + 1),
      preference=np.arange(1.0, n + 1),
      reference=0.1,
    ),
    stch,
  ),
  'uncertainty_weighting': (
    lambda n: A.uncertainty_weighting(n, rate=0.5),
    uncertainty,
  ),
  'moco': (
    functools.partial(_moco, regularisation=0.05),
    functools.partial(moco, rho=0.05),
  ),
  'moco, in balls': (
    lambda n: _moco(n, radius=np.linspace(0.5, 1.5, n)),
    lambda m: moco(m, radius=np.linspace(0.5, 1.5, m.shape[1])[:, None]),
  ),
  'moco with exact weights': (
    functools.partial(_moco, weight_step=None, regularisation=0.05),
    functools.partial(moco, exact=True, rho=0.05),
  ),
  'moco, of two samples': (
    lambda n: A.moco(n, tracking=0.5, weight_step=0.1, samples=2),
    local_moco,
    2,
  ),
  'grad_norm': (
    lambda n: A.grad_norm(n, rate=0.1),
    remembered(lambda n: stateful.grad_norm(n, 0.1)),
  ),
  'dwa': (A.dwa, remembered(lambda n: stateful.dwa(n, 2.0, 1))),
  'imtl_l': (
    lambda n: A.imtl_l(n, rate=0.2),
    remembered(lambda n: stateful.imtl_l(n, 0.2)),
  ),
  'random_weights': (
    lambda n: A.random_weights(n, key=0),
    remembered(drawn_weights),
  ),
  'geometric_mean': (A.geometric_mean, remembered(stateful.geometric_mean)),
  'db_mtl': (A.db_mtl, remembered(lambda n: stateful.db_mtl(n, 0.9))),
  'excess_mtl': (
    lambda n: A.excess_mtl(n, rate=0.5),
    remembered(lambda n: stateful.excess_mtl(n, 0.5)),
  ),
  'pcd': (
    lambda n: A.pcd(n, progress=0.3),
    remembered(lambda n: stateful.pcd(n, 0.3)),
  ),
  'constrained_mgda': (
    lambda n: A.constrained_mgda(n - 1, rate=0.4, averaging=0.5),
    remembered(lambda n: stateful.constrained_mgda(n, 0.4, halves)),
  ),
  'pmgda': (
    lambda n: A.pmgda(n, preference=np.arange(1.0, n + 1)[::-1], rate=0.5),
    remembered(lambda n: stateful.pmgda(n, np.arange(1.0, n + 1)[::-1], 0.5)),
  ),
  'modo': (
    lambda n: A.modo(
      n, weight_step=lambda k: 0.3 / (k + 1), regularisation=0.1
    ),
    modo,
    3,
  ),
  'sdmgrad': (lambda n: A.sdmgrad(n, samples=2), sdmgrad, 2),
}


def run(link, matrices, values, dtype):
  """Directions and weights over updates, of many sequences of matrices."""
  params = jnp.zeros(matrices.shape[-1], dtype)

  def update(state, rows):
    jacobian = bj.Jacobian(rows, values=values)
    direction, state = link.update(jacobian, state, params)
    return state, (direction, state.weights)

  one = lambda rows: jax.lax.scan(update, link.init(params), rows)[1]
  directions = jax.jit(jax.vmap(one))(jnp.asarray(matrices, dtype))
  assert all(x.dtype == dtype for x in directions)
  return [np.asarray(x, np.float64) for x in directions]


# Their directions are not weighted sums of the current rows.
WITHOUT_WEIGHTS = ('grad_drop', 'moco,', 'moco', 'db_mtl')


# A parameter of shape (2,) with two objectives in float32, and a larger one in
# float64; `properties_test` compares the precisions. Variants use one of them.
@pytest.mark.parametrize(
  ('name', 'shape', 'dtype'),
  [(name, (3, 5), 'float64') for name in CASES]
  + first(
    ((name, (2, 2), 'float32') for name in CASES if ',' not in name), count=3
  ),
)
def test_directions_and_weights_match_numpy(name, shape, dtype):
  make, reference, *samples = CASES[name]
  rows, columns = shape
  count = samples[0] if samples else 1
  matrices = draw(rows, columns)
  if count > 1:
    noise = np.random.default_rng(1).normal(size=(count, *matrices.shape))
    matrices = np.concatenate(list(matrices + noise / 2), axis=2)
  with jax.enable_x64(dtype == 'float64'):
    expected = np.array([reference(m) for m in matrices])
    values = jnp.tile(jnp.asarray(losses(rows), dtype), count)
    directions, weights = run(make(rows), matrices, values, dtype)
  share = {'float64': 5e-6, 'float32': 5e-5}[dtype]
  sizes = np.maximum(
    np.abs(expected).max((1, 2)), np.abs(matrices).max((1, 2, 3))
  )
  room = share * sizes[:, None, None]
  assert np.all(np.abs(directions - expected) <= room), (directions, expected)
  if count == 1 and name.split()[0] not in WITHOUT_WEIGHTS:
    again = np.einsum('ktm,ktmn->ktn', weights, matrices)
    np.testing.assert_allclose(again, directions, atol=share)


def test_any_two_methods_differ():
  matrices = draw(3, 5)
  ends = {
    name: np.array([reference(m) for m in matrices])
    for name, (_, reference, *samples) in CASES.items()
    if not samples
  }
  for one, two in itertools.combinations(ends, 2):
    assert np.max(np.abs(ends[one] - ends[two])) > 1e-3, (one, two)


def shuffles(drawn, size):
  """Converts recorded orders of the other rows to orders of all rows."""
  others = [[j for j in range(size) if j != i] for i in range(size)]
  if len(drawn[0]) == size:
    return drawn
  return [[others[i][k] for k in drawn[i]] for i in range(size)]


def with_two_jacobians(matrix, update):
  first, weights = matrix, np.full(len(matrix), 1 / len(matrix))
  for _ in range(2):
    taken, weights = update(first, first + 0.1, weights)
  return taken


def sdmgrad_as_recorded(one, two, weights):
  """The recorded step size is in units of mean squared lengths."""
  cross = one @ two.T
  scale = np.abs(cross).sum(1).max()
  unit = np.mean(np.sqrt(np.maximum(np.diag(cross), 0))) ** 2 + 1e-8
  return references.sdmgrad(one, two, weights, 0.5 * scale / unit)


def modo_as_recorded(one, two, weights):
  weights = references.modo(one, two, weights, 0.05, 0.1)
  return weights, weights


# Maps a matrix and the recorded draws to the direction.
AS_RECORDED = {
  'mean': lambda m, drawn: m.mean(0),
  'weighted': lambda m, drawn: np.arange(1.0, len(m) + 1) @ m,
  'mgda': lambda m, drawn: references.mgda(m),
  'cagrad': lambda m, drawn: references.cagrad(m),
  'imtl_g': lambda m, drawn: references.imtl_g(m),
  'nash_mtl': lambda m, drawn: references.nash_mtl(m),
  'nash_mtl of norm one': lambda m, drawn: references.nash_mtl(m, 1.0),
  'aligned_mtl': lambda m, drawn: references.aligned_mtl(m),
  'upgrad': lambda m, drawn: references.upgrad(m),
  'dual_proj': lambda m, drawn: references.dual_proj(m),
  'stch': lambda m, drawn: references.stch(m, losses(len(m)), 0.3),
  'uncertainty_weighting': lambda m, drawn: np.full(len(m), 0.5) @ m,
  'pcgrad': lambda m, drawn: references.pcgrad(m, shuffles(drawn, len(m))),
  'grad_drop': lambda m, drawn: references.grad_drop(m, drawn[0]),
  'modo': lambda m, drawn: with_two_jacobians(m, modo_as_recorded),
  'sdmgrad': lambda m, drawn: with_two_jacobians(m, sdmgrad_as_recorded),
}
# For these the recorded sequence of convex programs does not solve the equation
# of the bargaining solution.
UNSOLVED = ('three scales', 'more rows than columns')


def test_references_match_another_library():
  compared = 0
  for row in RECORDED['rows']:
    matrix = np.array(RECORDED['matrices'][row['matrix']])
    size, method = len(matrix), row['method']
    if method.startswith('nash') and row['matrix'] in UNSOLVED:
      continue
    if method == 'grad_vac':
      one, two = row['drawn'][:size], row['drawn'][-size:]
      zeros = np.zeros((size, size))
      _, targets = references.grad_vac(matrix, shuffles(one, size), zeros)
      computed, _ = references.grad_vac(matrix, shuffles(two, size), targets)
    else:
      computed = AS_RECORDED[method](matrix, row['drawn'])
    if method == 'imtl_g' and row['matrix'] == 'more rows than columns':
      # All projections are zero, but those of the recorded least-squares
      # direction differ.
      assert np.abs(computed).max() < 1e-12
      continue
    recorded = np.array(row['value'])
    scale = max(1.0, np.abs(recorded).max())
    np.testing.assert_allclose(
      computed / scale, recorded / scale, atol=1e-4, err_msg=str(row)
    )
    compared += 1
  assert compared > 140
