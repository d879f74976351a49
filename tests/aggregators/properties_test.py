"""Properties of aggregators for rows of all float32 lengths, and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests.aggregators import references_test
from tests.tiers import first, slow_where

A = bj.aggregators
SAMPLES, ROWS, COLUMNS = 256, 3, 5
ALL = {
  'mean': A.mean,
  'weighted': lambda n: A.weighted(np.arange(1.0, n + 1)),
  'mgda': A.mgda,
  'mgda, normalised': lambda n: A.mgda(n, normalise=True),
  'pcgrad': lambda n: A.pcgrad(n, key=0),
  'grad_vac': lambda n: A.grad_vac(n, key=0),
  'grad_drop': lambda n: A.grad_drop(n, key=0),
  'cagrad': A.cagrad,
  'imtl_g': A.imtl_g,
  'nash_mtl': A.nash_mtl,
  'fair_grad': A.fair_grad,
  'aligned_mtl': A.aligned_mtl,
  'upgrad': A.upgrad,
  'upgrad, preferences': lambda n: A.upgrad(n, preference=np.arange(float(n))),
  'dual_proj': A.dual_proj,
  'config': A.config,
  'stch': lambda n: A.stch(n, smoothing=0.1),
  'uncertainty_weighting': A.uncertainty_weighting,
  'moco': lambda n: A.moco(n, tracking=0.5),
  'moco, exact': lambda n: A.moco(n, tracking=1.0, weight_step=None),
  'grad_norm': A.grad_norm,
  'dwa': A.dwa,
  'imtl_l': A.imtl_l,
  'random_weights': lambda n: A.random_weights(n, key=0),
  'geometric_mean': A.geometric_mean,
  'db_mtl': A.db_mtl,
  'excess_mtl': A.excess_mtl,
  'cr_mogm': lambda n: A.cr_mogm(n, A.mgda(n)),
  'pcd': A.pcd,
  'constrained_mgda': lambda n: A.constrained_mgda(n - 1),
  'pmgda': lambda n: A.pmgda(n, preference=np.arange(1.0, n + 1)),
}
# Never conflict with a gradient.
NON_CONFLICTING = {
  'mgda',
  'mgda, normalised',
  'upgrad',
  'upgrad, preferences',
  'dual_proj',
  'nash_mtl',
  'fair_grad',
  'config',
  'moco, exact',
}
# Do not depend on the order of objectives.
SYMMETRIC = {
  'mean',
  'mgda',
  'mgda, normalised',
  'cagrad',
  'imtl_g',
  'nash_mtl',
  'fair_grad',
  'aligned_mtl',
  'upgrad',
  'dual_proj',
  'config',
  'moco, exact',
}
# The power by which the direction scales with the gradients.
DEGREE = {
  'mgda, normalised': 0,
  'nash_mtl': 0,
  'fair_grad': -1 / 3,
  'moco': None,
  'pcd': None,
  'stch': 1,
}


# Lengths for which weights and squares stay in the range of float32.
LIMITS = {
  'fair_grad': (1e-9, 1e9),
  'moco': (0, 1e18),
  'excess_mtl': (0, 1e18),
}


@functools.cache
def compiled(name):
  """Directions and weights of many matrices, in one program."""
  link = ALL[name](ROWS)

  def one(rows):
    state = link.init(jnp.zeros(COLUMNS))
    jacobian = bj.Jacobian(rows, values=jnp.linspace(1.0, 2.0, ROWS))
    direction, state = link.update(jacobian, state)
    return direction, state.weights

  return jax.jit(jax.vmap(one))


def aggregate(name, matrices):
  """Aggregates in float32; returns float64."""
  actual = compiled(name)(jnp.asarray(matrices, 'float32'))
  assert all(x.dtype == 'float32' for x in actual)
  return [np.asarray(x, np.float64) for x in actual]


def draw(seed, decades, together=False):
  """Random rows with lengths from 10^-decades to 10^decades."""
  rng = np.random.default_rng(seed)
  rows = rng.normal(size=(SAMPLES, ROWS, COLUMNS))
  rows /= np.linalg.norm(rows, axis=2, keepdims=True)
  count = 1 if together else ROWS
  powers = rng.uniform(-decades, decades, size=(SAMPLES, count, 1))
  # Rounded to float32, so that tests use the rows of the aggregator.
  return np.float64(np.float32(rows * 10.0**powers))


# Equal lengths, ratios of 300 and 1,000, the whole range, and all long or all
# short.
LENGTHS = {
  'one': (0.0, False),
  '300 apart': (np.log10(300) / 2, False),
  '1,000 apart': (1.5, False),
  'from 1e-15 to 1e15': (15.0, False),
  'all from 1e-30 to 1e30': (30.0, True),
}


@pytest.mark.parametrize(
  'name', slow_where(sorted(ALL), lambda name: ',' in name)
)
def test_properties_hold_in_float32(name):
  for label, (decades, together) in LENGTHS.items():
    rows = draw(3, decades, together)
    direction, weights = aggregate(name, rows)
    within = np.all(np.isfinite(direction), axis=1)
    sizes = np.linalg.norm(rows, axis=2)
    low, high = LIMITS.get(name, (0, np.inf))
    promised = (sizes.min(1) > low) & (sizes.max(1) < high)
    assert np.all(within[promised]) and promised.sum() > 40, label
    rows, direction, weights = rows[within], direction[within], weights[within]
    sizes = np.linalg.norm(rows, axis=2)
    # The size of the terms, to which the rounding of the direction is relative.
    parts = np.abs(weights * sizes).sum(1)
    if name in NON_CONFLICTING:
      cosines = np.einsum('smn,sn->sm', rows / sizes[..., None], direction)
      assert np.min(cosines / parts[:, None]) > -6e-6, label
    if name in SYMMETRIC and (name, decades) != ('aligned_mtl', 15.0):
      other, _ = aggregate(name, rows[:, [2, 0, 1]])
      moved = np.linalg.norm(direction - other, axis=1) / parts
      assert moved.max() < 3e-4, label
    if not together and DEGREE.get(name, 1) is not None:
      twice, _ = aggregate(name, 4 * rows)
      expected = 4.0 ** DEGREE.get(name, 1) * direction
      moved = np.linalg.norm(twice - expected, axis=1) / (parts + 1e-300)
      assert moved.max() < 3e-4 * 4, label


# The aggregators with the same arguments in both tables.
SAME = {*ALL} & {*references_test.CASES}
SAME -= {'moco', 'stch', 'uncertainty_weighting', 'grad_drop'}
SAME -= {'imtl_l', 'geometric_mean', 'db_mtl', 'pcd', 'pmgda'}
SAME -= {'grad_norm', 'excess_mtl', 'constrained_mgda', 'random_weights'}


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(SAME))
def test_float32_matches_numpy(name):
  rows = draw(3, 0.5)
  direction, _ = aggregate(name, rows)
  for matrix, actual in zip(rows[:8], direction):
    (expected,) = references_test.CASES[name][1](matrix[None])
    room = 2e-4 * (1 + np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, atol=room)


@pytest.mark.parametrize('name', first(sorted(NON_CONFLICTING), count=2))
def test_directions_of_extreme_length_ratios_are_nan(name):
  """Either accurate or NaN, and NaN only where documented."""
  rows = draw(7, 30.0)
  direction, weights = aggregate(name, rows)
  sizes = np.linalg.norm(rows, axis=2)
  ratio = sizes.max(1) / sizes.min(1)
  broken = np.isnan(direction).any(axis=1)
  assert np.all(broken[ratio > 1.1e31])
  if name != 'fair_grad':
    assert not np.any(broken[ratio < 0.9e31])
  fine = np.isfinite(direction).all(axis=1)
  assert fine.sum() > 40 and np.all(fine | broken)
  cosines = np.einsum('smn,sn->sm', rows / sizes[..., None], direction)
  parts = np.abs(weights * sizes).sum(1, keepdims=True)
  assert np.min((cosines / parts)[fine]) > -6e-6


@pytest.mark.parametrize('name', sorted(ALL))
def test_a_nan_row_gives_a_nan_direction(name):
  rows = np.ones((SAMPLES, ROWS, COLUMNS)) + draw(0, 0.0)
  rows[:, 1, 3] = np.nan
  assert np.isnan(aggregate(name, rows)[0][:, 3]).all()


def test_dynamic_barrier_and_two_samples_for_all_lengths():
  barrier = A.dynamic_barrier(0.5)
  params = jnp.zeros(COLUMNS)
  run = jax.jit(
    jax.vmap(
      lambda rows: barrier.update(bj.Jacobian(rows), barrier.init(params))[0]
    )
  )
  for decades, together in LENGTHS.values():
    rows = draw(5, decades, together)[:, :2]
    direction = np.float64(run(jnp.asarray(rows, 'float32')))
    size = np.linalg.norm(rows[:, 1], axis=1)
    falls = np.einsum('sn,sn->s', rows[:, 1] / size[:, None], direction)
    parts = np.linalg.norm(rows, axis=2).max(1)
    assert np.all(falls >= 0.5 * size - 1e-6 * parts)


def test_sdmgrad_defaults_avoid_conflicts_without_noise():
  link = A.sdmgrad(ROWS, samples=2)
  state = link.init(jnp.zeros(COLUMNS))
  rows = jax.random.normal(jax.random.key(0), (SAMPLES, ROWS, COLUMNS))
  run = jax.vmap(
    lambda x: link.update(bj.Jacobian(jnp.concatenate([x, x])), state)[0]
  )
  along = jnp.einsum('smn,sn->sm', rows, jax.jit(run)(rows))
  assert float(along.min()) > -1e-4


def test_grad_vac_stays_bounded_after_equal_gradients():
  """Their mean cosine is one, a target that no opposed gradient can reach."""
  link = A.grad_vac(2, key=0)
  rows = jnp.array([[1.0, 2.0], [1.0, 2.0]])
  conflict = jnp.array([[1.0, 0.1], [-1.0, 0.1]])
  sequence = jnp.stack([rows] * 40 + [conflict])
  step = lambda state, x: link.update(bj.Jacobian(x), state)[::-1]
  _, actual = jax.lax.scan(step, link.init(jnp.zeros(2)), sequence)
  assert np.linalg.norm(actual[-1]) < 2 * 7.1 * np.linalg.norm(conflict[0])


KEYED = {
  'random_weights': A.random_weights,
  'pcgrad': A.pcgrad,
  'grad_vac': A.grad_vac,
  'grad_drop': A.grad_drop,
}


@pytest.mark.parametrize('name', KEYED)
def test_all_forms_of_a_key_are_equivalent_and_copied(name):
  states = [
    KEYED[name](3, key=key).init(jnp.zeros(2))
    for key in (7, jax.random.PRNGKey(7), jax.random.key(7), np.int64(7))
  ]
  numbers = [
    [
      np.asarray(jax.random.key_data(leaf))
      for leaf in jax.tree.leaves(state)
      if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    for state in states
  ]
  assert len(numbers[0]) == 1
  for other in numbers[1:]:
    np.testing.assert_array_equal(numbers[0], other)
  original = jax.random.key(7)
  state = KEYED[name](3, key=original).init(jnp.zeros(2))
  jax.tree.map(lambda leaf: leaf.delete(), state)
  assert not original.is_deleted()
  with pytest.raises(TypeError, match=f'{name} draws random numbers: pass key'):
    KEYED[name](3, key=None).init(jnp.zeros(2))


def test_directions_keep_a_low_precision_dtype():
  rows = bj.Jacobian(jnp.eye(2, dtype=jnp.bfloat16) + 1, values=jnp.ones(2))
  params = jnp.zeros(2, jnp.bfloat16)
  for make in (A.mean, A.mgda, A.moco, A.upgrad, ALL['grad_drop']):
    link = make(2)
    direction, state = jax.jit(link.update)(rows, link.init(params))
    assert direction.dtype == jnp.bfloat16 and state.weights.dtype == 'float32'


def test_aliases_are_the_same_function():
  assert A.smg is A.mgda


@pytest.mark.parametrize('name', first(['mgda', 'cagrad', 'pcgrad', 'upgrad']))
def test_empty_leaves_change_nothing(name):
  """Leaves of size 0 have no largest entry."""
  losses = lambda p, batch: jnp.stack(
    [jnp.sum((p['a'] - 1) ** 2), jnp.sum((p['a'] + 1) ** 2)]
  )
  actual = []
  for more in ({}, {'empty': jnp.zeros((0, 3))}):
    params = {'a': jnp.array([0.5, 0.2])} | more
    factory = getattr(bj.aggregators, name)
    key = {'key': 0} if name == 'pcgrad' else {}
    link = optax.chain(bj.multi_objective(losses, 2), factory(2, **key))
    updates, _ = jax.jit(link.update)(None, link.init(params), params)
    actual.append(updates['a'])
  np.testing.assert_array_equal(*actual)


def test_numbers_out_of_range_are_errors():
  for make, words in {
    lambda: A.mean(0): 'whole number of objectives >= 1, got 0',
    lambda: A.mean(2.0): 'whole number of objectives',
    lambda: A.weighted(1.0): 'a number for each objective',
    lambda: A.grad_vac(2, key=0, rate=2): 'rate is in',
    lambda: A.cagrad(2, radius=-1.0): 'radius is a finite number >= 0',
    lambda: A.nash_mtl(2, max_norm=0.0): 'max_norm is a finite number > 0',
    lambda: A.fair_grad(2, alpha=0.0): 'alpha is a finite number > 0',
    lambda: A.upgrad(2, ridge=-1.0): 'ridge',
    lambda: A.upgrad(
      2, preference=[1.0, -1.0]
    ): 'preference is a finite number >= 0',
    lambda: A.dual_proj(2, preference=[1.0]): r'shape \(1,\)',
    lambda: A.config(2, preference=np.ones(3)): r'shape \(3,\)',
    lambda: A.stch(2, smoothing=0.0): 'smoothing',
    lambda: A.stch(2, smoothing=1.0, preference=[1.0]): r'shape \(1,\)',
    lambda: A.stch(2, smoothing=1.0, preference=[0.0, 1.0]): 'preference',
    lambda: A.moco(2, tracking=0.0): 'tracking',
    lambda: A.moco(2, tracking=2.0): r'tracking is in \(0, 1\], got 2.0',
    lambda: A.moco(2, radius=[1.0, 2.0, 3.0]): r'radius .* shape \(3,\)',
    lambda: A.moco(2, samples=0): 'samples',
    lambda: A.modo(2, samples=1): '2 or 3 samples',
    lambda: A.sdmgrad(2, momentum=1.0): 'momentum',
    lambda: A.sdmgrad(2, inner_steps=0): 'inner_steps',
  }.items():
    with pytest.raises(ValueError, match=words):
      make()


def test_errors_for_wrong_gradients_name_the_remedy():
  params = jnp.zeros(3)
  gramian = bj.types.Gramian(jnp.ones(2), jnp.eye(2), lambda weights: weights)
  for make in (*ALL.values(), lambda n: A.dynamic_barrier()):
    link = make(2)
    state = link.init(params)
    with pytest.raises(TypeError, match=r'multi_objective.*value_gap'):
      link.update(params, state, params)
    rows = bj.Jacobian(jnp.ones((4, 3)), values=jnp.ones(4))
    with pytest.raises(ValueError, match='2 rows, but the Jacobian has 4'):
      link.update(rows, state, params)
  for make in (
    *(A.moco, A.db_mtl, A.excess_mtl, ALL['grad_drop']),
    lambda n: A.dynamic_barrier(),
  ):
    with pytest.raises(TypeError, match='without gramian=True'):
      make(2).update(gramian, make(2).init(params))
  for make in (
    *(ALL['stch'], A.uncertainty_weighting, A.grad_norm, A.dwa, A.imtl_l),
    *(A.geometric_mean, A.db_mtl, ALL['pmgda']),
  ):
    with pytest.raises(ValueError, match='needs the losses'):
      make(2).update(bj.Jacobian(jnp.eye(2)), make(2).init(jnp.zeros(2)))


def test_a_missing_aggregator_is_an_error():
  losses = lambda p, batch: jnp.stack([p.x @ p.x, batch @ p.x])
  params = bj.sequences(x=jnp.ones(2))
  oracle = bj.multi_objective(losses, 2)
  rows, _ = oracle.update(jnp.ones(2), oracle.init(params), params)
  with pytest.raises(TypeError, match='put an aggregator between'):
    bj.apply_updates(params, rows)
  solver = bj.descend(oracle, x=optax.sgd(0.1))
  with pytest.raises(TypeError, match='put an aggregator between'):
    solver.update(jnp.ones(2), solver.init(params), params)
