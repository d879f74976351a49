"""Runs of stateful aggregators on coupled losses, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests.aggregators import references, stateful
from tests.references import problem
from tests.tiers import first

A = bj.aggregators
OBJECTIVES, UPDATES, RATE = 3, 7, 0.05
RAY = np.array([1.0, 2.0, 1.5])


def falling(count):
  return 0.1 / (1 + count)


def share(count):
  return (count + 1.0) ** -0.75


def _smooth_maximum(matrix, losses):
  powers = np.exp(losses / 3 / 0.4)
  return powers / powers.sum() / 3


# By name: the aggregator, and a function from a dtype to its NumPy step.
CASES = {
  'grad_norm': (
    lambda: A.grad_norm(3, rate=falling, alpha=0.7),
    lambda dtype: stateful.grad_norm(3, falling, 0.7),
  ),
  'dwa': (
    lambda: A.dwa(3, temperature=0.2, period=2),
    lambda dtype: stateful.dwa(3, 0.2, 2),
  ),
  'imtl_l': (
    lambda: A.imtl_l(3, rate=0.2),
    lambda dtype: stateful.imtl_l(3, 0.2),
  ),
  'random_weights': (
    lambda: A.random_weights(3, key=5),
    lambda dtype: stateful.random_weights(3, jax.random.key(5), dtype),
  ),
  'geometric_mean': (
    lambda: A.geometric_mean(3),
    lambda dtype: stateful.geometric_mean(3),
  ),
  'db_mtl': (
    lambda: A.db_mtl(3, decay=lambda count: 0.9 / (count + 1.0) ** 0.5),
    lambda dtype: stateful.db_mtl(3, lambda k: 0.9 / (k + 1.0) ** 0.5),
  ),
  'excess_mtl': (
    lambda: A.excess_mtl(3, rate=0.8),
    lambda dtype: stateful.excess_mtl(3, 0.8),
  ),
  'cr_mogm': (
    lambda: A.cr_mogm(3, A.stch(3, smoothing=0.4), decay=0.7),
    lambda dtype: stateful.cr_mogm(3, 0.7, _smooth_maximum),
  ),
  'pcd': (
    lambda: A.pcd(3, progress=0.4, decay=0.9),
    lambda dtype: stateful.pcd(3, 0.4, 0.9),
  ),
  'constrained_mgda': (
    lambda: A.constrained_mgda(2, rate=0.3, averaging=share),
    lambda dtype: stateful.constrained_mgda(3, 0.3, share),
  ),
  'pmgda': (
    lambda: A.pmgda(3, preference=RAY, rate=0.5),
    lambda dtype: stateful.pmgda(3, RAY, 0.5),
  ),
}


@pytest.mark.parametrize('dtype', first(['float64', 'float32']))
@pytest.mark.parametrize('name', CASES)
def test_a_run_on_coupled_losses_matches_numpy(name, dtype):
  make, reference = CASES[name]
  batches = problem.batches(count=UPDATES, seed=3)
  rows = jax.jit(jax.jacrev(problem.objectives))
  losses = jax.jit(problem.objectives)
  with jax.enable_x64(True):
    step, x = reference(dtype), problem.START[0]
    expected = []
    for batch in batches:
      matrix = np.asarray(rows(jnp.asarray(x), batch))
      x = x - RATE * step(matrix, np.asarray(losses(jnp.asarray(x), batch)))
      expected.append(x)
  with jax.enable_x64(dtype == 'float64'):
    solver = optax.chain(
      bj.multi_objective(problem.objectives, OBJECTIVES),
      make(),
      optax.sgd(RATE),
    )
    params = jnp.asarray(problem.START[0], dtype)
    state, update = solver.init(params), jax.jit(solver.update)
    for k, batch in enumerate(batches):
      cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), batch)
      moves, state = update(cast, state, params)
      params = optax.apply_updates(params, moves)
      assert params.dtype == dtype
      room = {'float64': 1e-6, 'float32': 1e-4}[dtype]
      np.testing.assert_allclose(
        params, expected[k], rtol=room, atol=room, err_msg=str(k)
      )


ONE = {
  'grad_norm': A.grad_norm,
  'dwa': A.dwa,
  'imtl_l': A.imtl_l,
  'random_weights': lambda n: A.random_weights(n, key=0),
  'geometric_mean': A.geometric_mean,
  'db_mtl': lambda n: A.db_mtl(n, decay=0.0),
  'excess_mtl': A.excess_mtl,
  'cr_mogm': lambda n: A.cr_mogm(n, A.mgda(n)),
  'pcd': A.pcd,
  'pmgda': lambda n: A.pmgda(n, preference=np.ones(n)),
}


@pytest.mark.parametrize('name', ONE)
def test_one_objective_gives_its_own_gradient(name):
  """Or the gradient of its logarithm for scale-free aggregators."""
  link, params = ONE[name](1), jnp.zeros(2)
  row = jnp.array([[3.0, -4.0]])
  state = link.init(params)
  for _ in range(3):
    jacobian = bj.Jacobian(row, values=jnp.array([2.0]))
    direction, state = link.update(jacobian, state, params)
    unit = np.asarray(direction) / np.linalg.norm(direction)
    np.testing.assert_allclose(unit, [0.6, -0.8], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ONE)
def test_zero_or_equal_gradients(name):
  """Zero gradients give zero, equal gradients their common direction."""
  params, values = jnp.zeros(2), jnp.ones(3)
  for row in ([0.0, 0.0], [1.0, 2.0]):
    link = ONE[name](3)
    state = link.init(params)
    for _ in range(3):
      rows = jnp.tile(jnp.array(row), (3, 1))
      direction, state = link.update(
        bj.Jacobian(rows, values=values), state, params
      )
      size = np.linalg.norm(direction)
      expected = np.array(row) / np.sqrt(5) * size
      np.testing.assert_allclose(direction, expected, rtol=1e-4, atol=1e-6)
      assert (size > 0) == any(row)


def test_grad_norm_skips_a_step_that_removes_all_weights():
  link, params = A.grad_norm(2, rate=10.0, alpha=0.5), jnp.zeros(2)
  state, update = link.init(params), jax.jit(link.update)
  # Both are longer than their targets, 0.1 and 1.41.
  for lengths, losses in [([1, 1], [1, 1])] + 2 * [([0.4, 1.6], [0.01, 1.99])]:
    jacobian = bj.Jacobian(
      jnp.diag(jnp.array(lengths, jnp.float32)),
      values=jnp.array(losses, jnp.float32),
    )
    direction, state = update(jacobian, state, params)
  np.testing.assert_allclose(direction, [0.4, 1.6], rtol=1e-6)


def test_pcd_accepts_long_gradients():
  """Squares of the gradients leave the range of float32."""
  link, params = A.pcd(2, progress=0.0), jnp.zeros(2)
  rows = 1e25 * jnp.array([[1.0, 0.0], [-0.5, 0.5]])
  direction, _ = link.update(bj.Jacobian(rows), link.init(params), params)
  # At a right angle to the second gradient, as long as the first.
  expected = 1e25 * np.sqrt([0.5, 0.5])
  np.testing.assert_allclose(direction, expected, rtol=1e-5)


@pytest.mark.slow
def test_constrained_mgda_of_one_objective_is_the_dynamic_barrier():
  rng = np.random.default_rng(0)
  one, barrier = A.constrained_mgda(1, rate=0.5), A.dynamic_barrier(0.5)
  params = jnp.zeros(4)
  for rows in jnp.asarray(rng.normal(size=(20, 2, 4)), jnp.float32):
    constrained, _ = one.update(bj.Jacobian(rows), one.init(params), params)
    barrier_direction, _ = barrier.update(
      bj.Jacobian(rows), barrier.init(params), params
    )
    np.testing.assert_allclose(
      constrained, barrier_direction, rtol=1e-4, atol=1e-5
    )


def test_the_penalty_decreases_at_the_rate_and_a_zero_penalty_has_no_effect():
  link = A.constrained_mgda(3, rate=0.4)
  params = jnp.zeros(6)
  run = jax.jit(
    jax.vmap(
      lambda rows: link.update(bj.Jacobian(rows), link.init(params), params)[0]
    )
  )
  rows = np.random.default_rng(1).normal(size=(200, 4, 6))
  rows *= 10.0 ** np.random.default_rng(2).uniform(-1, 1, size=(200, 4, 1))
  actual = np.asarray(run(jnp.asarray(rows, jnp.float32)), np.float64)
  penalty = rows[:, 3]
  fall = np.einsum('sn,sn->s', penalty, actual)
  assert np.all(fall >= (0.4 - 1e-3) * (penalty**2).sum(1))
  rows[:, 3] = 0
  actual = np.asarray(run(jnp.asarray(rows, jnp.float32)), np.float64)
  for matrix, direction in zip(rows[:20], actual):
    nearest = references.mgda(matrix[:3])
    room = 2e-3 * np.linalg.norm(nearest) + 1e-5
    np.testing.assert_allclose(direction, nearest, atol=room)


def test_conflicting_secondary_objectives_have_no_effect():
  """No direction makes progress on both, so the first gradient remains."""
  rows = jnp.array([[1.0, 0.5], [0.0, 2.0], [0.0, -3.0]])
  link = A.pcd(3, progress=0.5)
  direction, _ = link.update(bj.Jacobian(rows), link.init(rows[0]), rows[0])
  np.testing.assert_allclose(direction, rows[0], rtol=1e-6)


def test_pmgda_reaches_the_preferred_proportion(x64):
  """On a known front between minimisers at -1 and 1."""
  losses = lambda x, batch: jnp.stack(
    [((x - batch) ** 2).sum(), ((x + batch) ** 2).sum()]
  )
  for ratio in (0.25, 1.0, 4.0):
    solver = optax.chain(
      bj.multi_objective(losses, 2),
      A.pmgda(2, preference=[1.0, ratio], rate=1.0, tolerance=1e-3),
      # A constant step size oscillates around the ray.
      optax.sgd(lambda count: 0.02 / (1 + count / 50)),
    )
    start = jnp.array([0.3, -0.8])
    x, _ = bj.testing.run(solver, start, 3_000, jnp.array([1.0, 0.0]))
    one, two = np.asarray(losses(x, jnp.array([1.0, 0.0])))
    np.testing.assert_allclose(two / one, ratio, rtol=2e-2)
    np.testing.assert_allclose(x[1], 0, atol=2e-2)


def test_heads_are_not_tracked():
  """The state of stateful aggregators has no entries for heads."""
  losses = lambda p, batch: jnp.stack(
    [(p.trunk - 1) ** 2 + p.heads**2, (p.trunk + 2) ** 2 + (p.heads - 1) ** 2]
  )
  params = bj.sequences(trunk=jnp.float32(0.5), heads=jnp.float32(3.0))
  oracle = bj.multi_objective(losses, 2, rest=('heads',))
  for make in (A.db_mtl, A.excess_mtl):
    solver = optax.chain(oracle, make(2, rest=('heads',)))
    actual, _ = solver.update(None, solver.init(params), params)
    np.testing.assert_allclose(actual.heads, 2 * 3.0 + 2 * 2.0)
    solver = optax.chain(oracle, make(2))
    with pytest.raises(ValueError, match='the oracle the same `rest`'):
      solver.update(None, solver.init(params), params)


def test_numbers_out_of_range_and_missing_weights_are_errors():
  for make, words in {
    lambda: A.grad_norm(2, rate=-1.0): 'rate is a finite number >= 0',
    lambda: A.grad_norm(2, alpha=-1.0): 'alpha',
    lambda: A.dwa(2, temperature=0.0): 'temperature',
    lambda: A.dwa(2, period=0): 'updates in a period >= 1',
    lambda: A.imtl_l(2, rate=-1.0): 'rate',
    lambda: A.db_mtl(2, decay=1.5): r'decay is in \[0, 1\]',
    lambda: A.excess_mtl(2, rate=-1.0): 'rate',
    lambda: A.cr_mogm(2, A.mgda(2), decay=2.0): r'decay is in \[0, 1\]',
    lambda: A.pcd(2, progress=2.0): r'progress is in \[0, 1\]',
    lambda: A.constrained_mgda(0): 'objectives >= 1',
    lambda: A.constrained_mgda(2, rate=-1.0): 'rate',
    lambda: A.constrained_mgda(2, averaging=0.0): r'averaging is in \(0, 1\]',
    lambda: A.pmgda(2, preference=[1.0]): r'shape \(1,\)',
    lambda: A.pmgda(2, preference=[1.0, 0.0]): 'preference',
  }.items():
    with pytest.raises(ValueError, match=words):
      make()
  with pytest.raises(TypeError, match='averages the weights of an aggregator'):
    A.cr_mogm(2, A.dynamic_barrier()).init(jnp.zeros(2))
  with pytest.raises(TypeError, match='random_weights draws random numbers'):
    A.random_weights(2, key=None).init(jnp.zeros(2))
