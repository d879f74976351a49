"""What aggregators promise, over samplers of matrices; and their errors."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests.aggregators import quadratic_test

KEY = jax.random.key(0)
ALL = {
  'mean': bj.aggregators.mean,
  'weighted': lambda n: bj.aggregators.weighted(np.arange(1.0, n + 1)),
  'mgda': bj.aggregators.mgda,
  'mgda, normalised': lambda n: bj.aggregators.mgda(n, normalise=True),
  'pcgrad': lambda n: bj.aggregators.pcgrad(n, key=KEY),
  'grad_vac': lambda n: bj.aggregators.grad_vac(n, key=KEY),
  'grad_drop': lambda n: bj.aggregators.grad_drop(n, key=KEY),
  'cagrad': bj.aggregators.cagrad,
  'imtl_g': bj.aggregators.imtl_g,
  'nash_mtl': bj.aggregators.nash_mtl,
  'aligned_mtl': bj.aggregators.aligned_mtl,
  'upgrad': bj.aggregators.upgrad,
  'dual_proj': bj.aggregators.dual_proj,
  'stch': lambda n: bj.aggregators.stch(n, smoothing=0.1),
  'uncertainty_weighting': bj.aggregators.uncertainty_weighting,
  'moco': lambda n: bj.aggregators.moco(n, tracking=0.5),
  'moco, exact': lambda n: bj.aggregators.moco(n, tracking=0.7, exact=True),
}
# Never opposed to a gradient that they are given.
NON_CONFLICTING = (
  'mgda',
  'mgda, normalised',
  'upgrad',
  'dual_proj',
  'nash_mtl',
)
# Do not care in which order objectives come.
SYMMETRIC = (
  'mean',
  'mgda',
  'mgda, normalised',
  'cagrad',
  'imtl_g',
  'nash_mtl',
  'aligned_mtl',
  'upgrad',
  'dual_proj',
  'moco',
  'moco, exact',
)
# Twice the gradients give twice the direction.
HOMOGENEOUS = (
  'mean',
  'mgda',
  'cagrad',
  'imtl_g',
  'aligned_mtl',
  'upgrad',
  'dual_proj',
  'pcgrad',
  'grad_vac',
  'grad_drop',
  'moco, exact',
)
SAMPLER = {
  'seed': st.integers(0, 10_000),
  'rows': st.sampled_from([2, 3]),
  'kind': st.sampled_from(quadratic_test.KINDS),
}
COLUMNS = 5
_COMPILED = {}


def aggregate(name, matrix):
  """One update in float64; compiled once for each name and shape."""
  with jax.enable_x64(True):
    matrix = jnp.asarray(matrix)
    place = (name, matrix.shape)
    if place not in _COMPILED:
      link = ALL[name](len(matrix))

      def run(rows):
        params = jnp.zeros(rows.shape[1])
        values = jnp.linspace(1.0, 2.0, rows.shape[0])
        jacobian = bj.Jacobian(rows, values=values)
        return link.update(jacobian, link.init(params), params)[0]

      _COMPILED[place] = jax.jit(run)
    return np.asarray(_COMPILED[place](matrix))


@pytest.mark.parametrize('name', NON_CONFLICTING)
@hypothesis.given(**SAMPLER)
# A short row beside a long one, and two that nearly cancel.
@hypothesis.example(seed=5847, rows=2, kind='scales')
@hypothesis.example(seed=0, rows=2, kind='conflict')
def test_never_conflicts_where_it_promises(name, seed, rows, kind):
  matrix = quadratic_test.draw(seed, rows, COLUMNS, kind)
  direction = aggregate(name, matrix)
  lengths = np.linalg.norm(matrix, axis=1)
  # The programs have a ridge of a millionth, on gradients of length one.
  slack = 3e-6 * lengths * (lengths.max() + np.linalg.norm(direction))
  assert np.all(matrix @ direction >= -slack)


@pytest.mark.parametrize('name', SYMMETRIC)
@hypothesis.given(**SAMPLER)
def test_permuted_objectives_give_the_same_direction(name, seed, rows, kind):
  matrix = quadratic_test.draw(seed, rows, COLUMNS, kind)
  if name == 'cagrad' and kind == 'conflict':
    return  # The shortest combination is close to where it is set to zero.
  order = np.random.default_rng(seed).permutation(rows)
  here, there = aggregate(name, matrix), aggregate(name, matrix[order])
  # IMTL-G's pseudo-inverse is of a matrix whose scales lie far apart.
  share = 1e-5 if name == 'imtl_g' else 1e-6
  np.testing.assert_allclose(here, there, atol=share * np.abs(matrix).max())


@pytest.mark.parametrize('name', HOMOGENEOUS)
@hypothesis.given(**SAMPLER)
@hypothesis.example(seed=1959, rows=2, kind='scales')
def test_scaled_gradients_give_a_scaled_direction(name, seed, rows, kind):
  matrix = quadratic_test.draw(seed, rows, COLUMNS, kind)
  here, there = aggregate(name, matrix), aggregate(name, 4 * matrix)
  np.testing.assert_allclose(4 * here, there, atol=1e-5 * np.abs(matrix).max())


@pytest.mark.parametrize('name', sorted(set(ALL) - {'grad_drop'}))
@hypothesis.given(seed=st.integers(0, 10_000))
def test_the_direction_is_a_combination_of_rows(name, seed):
  matrix = quadratic_test.draw(seed, 3, COLUMNS, 'random')
  direction = aggregate(name, matrix)
  _, residual, _, _ = np.linalg.lstsq(matrix.T, direction, rcond=None)
  assert residual.max() < 1e-12 * max(1, np.abs(direction).max() ** 2)


def test_any_two_methods_give_different_parameters():
  """After some steps on noisy losses that conflict; smg is mgda by name."""

  def losses(x, batch):
    centres = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, -1.0], [-1.0, 0.0, 3.0]])
    curves = jnp.array([[1.0, 0.4, 0.1], [0.2, 2.0, 0.4], [0.3, 0.1, 1.0]])
    noisy = centres + batch[:, None, None]
    return jnp.mean(jnp.sum(curves * (x - noisy) ** 2, -1), 0)

  wide = {
    'modo': lambda n: bj.aggregators.modo(n, samples=2),
    'sdmgrad': lambda n: bj.aggregators.sdmgrad(n, samples=2),
    'moco, local': lambda n: bj.aggregators.moco(n, tracking=0.3, samples=2),
  }
  ends = {}
  for name, make in (ALL | wide).items():
    oracle = bj.multi_objective(losses, 3)
    if name in wide:
      oracle = bj.evaluation.independent(oracle, 2)
    solver = optax.chain(oracle, make(3), optax.sgd(0.02))
    ends[name] = descend(solver)
  ends['famo'] = descend(bj.solvers.famo(losses, 3, optimiser=optax.sgd(0.02)))
  for one, two in itertools.combinations(ends, 2):
    assert np.abs(ends[one] - ends[two]).max() > 1e-5, (one, two)


def descend(solver):
  """Thirty steps, the same noise for every method."""
  params = jnp.array([1.0, 2.0, -1.0])

  def step(carry, key):
    params, state = carry
    noise = jax.random.normal(key, (4,)) / 2
    updates, state = solver.update(noise, state, params)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def run(params):
    keys = jax.random.split(KEY, 30)
    return jax.lax.scan(step, (params, solver.init(params)), keys)[0][0]

  return np.asarray(run(params))


def test_weights_of_mgda_make_the_direction_for_rows_as_given():
  link = bj.aggregators.mgda(2, normalise=True)
  matrix = jnp.array([[4.0, 0.0], [0.0, 1.0]])
  params = jnp.zeros(2)
  direction, state = link.update(bj.Jacobian(matrix), link.init(params), params)
  np.testing.assert_allclose(direction, [0.5, 0.5], rtol=1e-6)
  np.testing.assert_allclose(state.weights @ matrix, direction, rtol=1e-6)


def test_cagrad_attains_its_maximum_and_stays_in_its_ball():
  rng = np.random.default_rng(2)
  for _ in range(5):
    matrix = rng.normal(size=(3, COLUMNS))
    direction = aggregate('cagrad', matrix)
    mean = matrix.mean(0)
    radius = 0.4 * np.linalg.norm(mean)
    assert np.linalg.norm(direction - mean) <= radius * (1 + 1e-6)
    best = (matrix @ direction).min()
    for _ in range(300):
      step = rng.normal(size=COLUMNS)
      other = mean + radius * step / np.linalg.norm(step)
      assert (matrix @ other).min() <= best + 1e-9


def test_smooth_maximum_follows_its_preference_and_schedule():
  values = jnp.array([1.0, 2.0, 4.0])
  jacobian = bj.Jacobian(jnp.eye(3), values=values)
  link = bj.aggregators.stch(
    3, smoothing=lambda count: 1e-3, preference=[8.0, 1.0, 1.0], reference=0.5
  )
  found, _ = link.update(jacobian, link.init(jnp.zeros(3)))
  np.testing.assert_allclose(found, [8.0, 0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize(
  ('make', 'error', 'words'),
  [
    (lambda: bj.aggregators.mean(0), ValueError, 'at least one objective'),
    (lambda: bj.aggregators.mean(2.0), TypeError, 'number of objectives first'),
    (
      lambda: bj.aggregators.weighted(1.0),
      ValueError,
      'a number for each objective',
    ),
    (lambda: bj.aggregators.grad_vac(2, key=KEY, rate=2), ValueError, 'share'),
    (
      lambda: bj.aggregators.cagrad(2, radius=-1.0),
      ValueError,
      'radius is a number >= 0',
    ),
    (lambda: bj.aggregators.nash_mtl(2, max_norm=0.0), ValueError, 'max_norm'),
    (lambda: bj.aggregators.upgrad(2, ridge=-1.0), ValueError, 'ridge'),
    (lambda: bj.aggregators.stch(2, smoothing=0.0), ValueError, 'smoothing'),
    (
      lambda: bj.aggregators.stch(2, smoothing=1.0, preference=[1.0]),
      ValueError,
      r'shape \(1,\)',
    ),
    (lambda: bj.aggregators.moco(2, tracking=0.0), ValueError, 'tracking'),
    (
      lambda: bj.aggregators.moco(2, radius=[1.0, 2.0, 3.0]),
      ValueError,
      'radius',
    ),
    (lambda: bj.aggregators.modo(2, samples=1), ValueError, '2 or 3 samples'),
    (lambda: bj.aggregators.sdmgrad(2, momentum=1.0), ValueError, 'momentum'),
  ],
)
def test_numbers_out_of_range(make, error, words):
  with pytest.raises(error, match=words):
    make()


@pytest.mark.parametrize('name', ALL)
def test_wrong_gradients_are_refused_with_the_mend(name):
  link = ALL[name](2)
  params = jnp.zeros(3)
  state = link.init(params)
  with pytest.raises(TypeError, match='multi_objective'):
    link.update(params, state, params)
  rows = bj.Jacobian(jnp.ones((4, 3)), values=jnp.ones(4))
  with pytest.raises(ValueError, match='2 rows, but the Jacobian has 4'):
    link.update(rows, state, params)


@pytest.mark.parametrize('name', ['stch', 'uncertainty_weighting'])
def test_missing_losses_are_named(name):
  link = ALL[name](2)
  with pytest.raises(ValueError, match='needs the losses'):
    link.update(bj.Jacobian(jnp.eye(2)), link.init(jnp.zeros(2)))


@pytest.mark.parametrize('name', ['moco', 'grad_drop'])
def test_a_gram_matrix_is_not_enough_for_who_needs_rows(name):
  link = ALL[name](2)
  gramian = bj.types.Gramian(jnp.eye(2), lambda weights: weights)
  with pytest.raises(TypeError, match='without gramian=True'):
    link.update(gramian, link.init(jnp.zeros(2)))
