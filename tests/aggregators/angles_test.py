"""Almost parallel and almost opposite rows: float32 against float64.

The references are the same aggregators in float64 on rows rounded to float32;
`references_test` compares aggregators in float64 with NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.aggregators import _rows
from tests.aggregators import exact, properties_test, references

A = bj.aggregators
ANGLE, SAMPLES, COLUMNS = 1e-4, 32, 5
# Half a float32 spacing: the error of rounding a row or a weight.
UNIT = 2.0**-24

# Aggregators whose weights are constant or depend smoothly on the rows.
SMOOTH = {
  'mean',
  'weighted',
  'stch',
  'uncertainty_weighting',
  'moco',
  'grad_norm',
  'dwa',
  'imtl_l',
  'geometric_mean',
  'excess_mtl',
}
# Aggregators whose weights grow as rows cancel, from the rows' factor.
FACTORED = {
  'config',
  'config, preferences',
  'aligned_mtl',
  'nash_mtl',
  'fair_grad',
  'imtl_g',
}
# Aggregators with bounded weights for which rows may cancel. Then the length of
# the direction is proportional to the angle. Rounding a weight in float32 moves
# the direction by UNIT times a row, UNIT / ANGLE = 6e-4 of its own length, and
# each weight has about ten roundings. So the error is small relative to the
# rows, but cannot be small relative to a vanishing direction.
CANCELLING = {
  'mgda',
  'mgda, normalised',
  'moco, exact',
  'upgrad',
  'dual_proj',
  'pcgrad',
  'grad_vac',
  'cr_mogm',
  'db_mtl',
  'pcd',
  'constrained_mgda',
  'pmgda',
}
ALL = properties_test.ALL | {
  'config, preferences': lambda n: A.config(n, preference=np.arange(1.0, n + 1))
}


def draw(opposite, ratio):
  """Two rows at an angle near 0 or pi, the second longer by a factor."""
  rng = np.random.default_rng(0)
  planes = [np.linalg.qr(rng.normal(size=(COLUMNS, 2)))[0].T] * SAMPLES
  planes = [np.linalg.qr(rng.normal(size=p.T.shape))[0].T for p in planes]
  second = np.array([np.cos(ANGLE), np.sin(ANGLE)]) * (-1) ** opposite
  rows = [np.stack([p[0], ratio * second @ p]) for p in planes]
  return np.float32(rows)


def rows_with_eigenvalue(smallest, objectives, seed):
  """Random rows whose cosines have a given smallest eigenvalue."""
  rng = np.random.default_rng(seed)
  common = rng.normal(size=COLUMNS)
  own = np.linalg.qr(rng.normal(size=(COLUMNS, objectives)))[0].T

  def mixed(share):
    rows = common + share * own
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

  low, high = 0.0, 100.0
  for _ in range(60):
    middle = (low + high) / 2
    value = np.linalg.svd(mixed(middle), compute_uv=False)[-1] ** 2
    low, high = (middle, high) if value < smallest else (low, middle)
  lengths = 10 ** rng.uniform(-1, 1, size=(objectives, 1))
  return np.float32(lengths * mixed(high))


PAIRS = [(0, 1.0), (0, 3.0), (1, 1.0), (1, 3.0)]


def run(make, rows, dtype):
  with jax.enable_x64(dtype == 'float64'):
    link = make(rows.shape[1])
    state = link.init(jnp.zeros(rows.shape[-1], dtype))
    values = jnp.arange(1, rows.shape[1] + 1, dtype=dtype)
    one = lambda x: link.update(bj.Jacobian(x, values=values), state)[0]
    return np.float64(jax.jit(jax.vmap(one))(jnp.asarray(rows, dtype)))


def errors(make):
  """The error, the length and the longest row of each sample."""
  rows = np.concatenate([draw(*pair) for pair in PAIRS])
  wide = run(make, rows, 'float64')
  gap = np.linalg.norm(run(make, rows, 'float32') - wide, axis=1)
  longest = np.linalg.norm(np.float64(rows), axis=2).max(1)
  return gap, np.linalg.norm(wide, axis=1), longest


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(SMOOTH | FACTORED))
def test_float32_resolves_small_angles(name):
  gap, length, _ = errors(ALL[name])
  assert np.all(gap <= 1e-3 * length), (gap / length).max()


@pytest.mark.slow
@pytest.mark.parametrize(
  'objectives', [2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_fast_and_slow_factor_agree_at_the_threshold(objectives):
  """On both sides of the smallest eigenvalue at which the factor changes."""
  threshold = np.finfo(np.float32).eps ** (1 / 3)
  rows = np.stack(
    [
      rows_with_eigenvalue(side * threshold, objectives, seed)
      for side in (0.98, 1.02)
      for seed in range(SAMPLES)
    ]
  )
  accurate = jax.jit(
    jax.vmap(lambda x: _rows.cosine_factor(_rows.gramian(bj.Jacobian(x)))[1])
  )(rows)
  assert not accurate[:SAMPLES].any() and accurate[SAMPLES:].all()
  for name in sorted(FACTORED):
    wide = run(ALL[name], rows, 'float64')
    gap = np.linalg.norm(run(ALL[name], rows, 'float32') - wide, axis=1)
    error = gap / np.linalg.norm(wide, axis=1)
    assert np.all(error <= 1e-3), (name, error.max())


@pytest.mark.slow
def test_a_gramian_of_separate_rows_gives_the_same_direction():
  rows = np.random.default_rng(0).normal(size=(SAMPLES, 3, COLUMNS))
  rows = np.float32(rows)
  for name in sorted(FACTORED):
    wide = run(ALL[name], rows, 'float64')
    link = ALL[name](3)
    state = link.init(jnp.zeros(COLUMNS))
    one = lambda x, link=link, state=state: link.update(
      _rows.gramian(bj.Jacobian(x)), state
    )[0]
    gap = np.linalg.norm(jax.jit(jax.vmap(one))(rows) - wide, axis=1)
    error = gap / np.linalg.norm(wide, axis=1)
    units = rows / np.linalg.norm(np.float64(rows), axis=2, keepdims=True)
    eigenvalue = np.linalg.svd(units)[1][:, -1] ** 2
    assert np.all(error <= 32 * np.finfo(np.float32).eps / eigenvalue), name


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(CANCELLING))
def test_directions_of_cancelling_rows_are_accurate_relative_to_the_rows(name):
  gap, length, longest = errors(ALL[name])
  # If the rows do not cancel, it is accurate relative to its own length.
  room = np.where(length > 0.1 * longest, 1e-3 * length, 32 * UNIT * longest)
  assert np.all(gap <= room), (gap / room).max()


def nearly_cancelling(shape, objectives, seed):
  """Rows whose hull is within 1e-4 to 1e-3 of zero, relative to their lengths.

  Args:
    shape: `line` for rows almost parallel or almost opposite to each other;
      `fan` for rows that cancel up to a small common part.
    objectives: the number of rows.
    seed: the seed of the draw.
  """
  rng = np.random.default_rng((seed, objectives))
  angle = 10 ** rng.uniform(-4, -3)
  basis = np.linalg.qr(rng.normal(size=(COLUMNS + 3, objectives)))[0].T
  if shape == 'line':
    signs = rng.permutation([1.0, -1.0, *rng.choice([-1, 1], objectives - 2)])
    own = rng.normal(size=(objectives, objectives - 1))
    rows = np.column_stack([signs, angle * own])
  else:
    corners = rng.normal(size=(objectives - 1, objectives - 1))
    last = -rng.uniform(0.5, 2, size=objectives - 1) @ corners
    corners = np.concatenate([corners, last[None]])
    corners /= np.linalg.norm(corners, axis=1, keepdims=True)
    rows = np.column_stack([np.full(objectives, angle), corners])
  lengths = 10 ** rng.uniform(-0.5, 0.5, size=(objectives, 1))
  return np.float32(lengths * (rows @ basis))


# The directions of several rows that nearly cancel, without rounding.
EXACT = {
  'mgda': exact.mgda,
  'mgda, normalised': lambda rows: exact.mgda(references.unit(rows)),
  'moco, exact': exact.mgda,
  'moco, regularised': lambda rows: exact.mgda(rows, 1e-7),
  'upgrad': exact.upgrad,
  'upgrad, no ridge': lambda rows: exact.upgrad(rows, 0),
  'dual_proj': lambda rows: exact.dual_proj(
    rows, np.full(len(rows), 1 / len(rows))
  ),
  'cagrad': references.cagrad,
}
MADE = ALL | {
  'moco, regularised': lambda n: A.moco(
    n, tracking=1.0, weight_step=None, regularisation=1e-7
  ),
  'upgrad, no ridge': lambda n: A.upgrad(n, ridge=0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'objectives'),
  [(name, 3) for name in sorted(EXACT)]
  + [(name, 6) for name in ('dual_proj', 'mgda', 'upgrad')],
)
def test_directions_of_several_cancelling_rows_are_accurate(name, objectives):
  """Accurate relative to the short direction itself, and without conflicts.

  A direction from the rows' factor has a relative error of one rounding per row
  times the condition number of the unit rows; from their Gram matrix it would
  be times the square of that number.
  """
  unit = np.finfo(np.float32).eps
  rows = np.stack(
    [
      nearly_cancelling(shape, objectives, seed)
      for shape in ('line', 'fan')
      for seed in range(8)
    ]
  )
  wide = np.float64(rows)
  true = np.stack([EXACT[name](sample) for sample in wide])
  actual = run(MADE[name], rows, 'float32')
  units = wide / np.linalg.norm(wide, axis=2, keepdims=True)
  sizes = np.linalg.svd(units, compute_uv=False)
  room = objectives * unit * sizes[:, 0] / sizes[:, -1]
  error = np.linalg.norm(actual - true, axis=1) / np.linalg.norm(true, axis=1)
  assert np.all(error <= room), (error / room).max()
  if name in {'mgda', 'mgda, normalised', 'moco, exact', 'upgrad, no ridge'}:
    # All rows make equal progress along the hull's shortest vector; other
    # directions conflict with no row.
    along = np.einsum('smn,sn->sm', units, actual).min(1)
    along = along / np.linalg.norm(actual, axis=1)
    assert np.all(along > (-4 * unit if name == 'upgrad, no ridge' else 0))


def test_cagrad_keeps_its_radius_and_progress_at_small_angles():
  """If rows cancel, so do their mean and the radius of the ball.

  The optimum is the point of the ball that is furthest along the bisector. Its
  distance from the mean is of the order of the squared angle, 1e-8, which is
  below the rounding of the cosines. So the test only requires a direction in
  the ball that is not worse than the mean, up to the rounding of the rows.
  """
  for pair in PAIRS:
    rows = np.float64(draw(*pair))
    actual = run(A.cagrad, np.float32(rows), 'float32')
    mean = rows.mean(1)
    sizes = np.linalg.norm(rows, axis=2)
    room = 32 * UNIT * sizes.max(1)
    radius = np.linalg.norm(actual - mean, axis=1)
    # A zero direction, if the mean is rounding, has the mean's distance.
    within = 0.4 * np.linalg.norm(mean, axis=1) * (1 + 1e-5) + room
    vanished = np.linalg.norm(actual, axis=1) < 1e-12
    assert np.all((radius <= within) | vanished)
    along = np.einsum('smn,sn->sm', rows, actual).min(1)
    before = np.einsum('smn,sn->sm', rows, mean).min(1)
    assert np.all((along >= before - room * sizes.max(1)) | vanished)


def test_grad_drop_is_discontinuous_where_rows_cancel():
  """A coordinate's sign is drawn with the share of its positive parts.

  For opposite rows the share is near one half in each coordinate at any angle,
  so rounding decides some draws and the direction jumps. For almost parallel
  rows, coordinates have one sign except near zero, and the direction is their
  sum.
  """
  rows = np.float64(draw(0, 3.0))
  actual = run(ALL['grad_drop'], np.float32(rows), 'float32')
  clear = np.all(np.abs(rows) > 1e-3, axis=1)
  total = rows.sum(1)
  np.testing.assert_allclose(actual[clear], total[clear], rtol=1e-5)


def test_every_aggregator_is_covered():
  # Random weights in float32 differ from those in float64.
  drawn = {'grad_drop', 'random_weights'}
  others = {'cagrad', 'upgrad, preferences'} | drawn
  assert SMOOTH | FACTORED | CANCELLING | others == {*ALL}
