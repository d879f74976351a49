"""The implicit hypergradient against finite differences, under constraints."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import rounding

UPPER, LOWER, ROWS = 4, 7, 4


def upper(x, y, batch):
  both = jnp.concatenate([x['a'], y['b'].ravel(), y['c']])
  return jnp.sin(batch['f'] @ both) + jnp.log1p(jnp.sum(both**2))


def lower(x, y, batch):
  """Strongly convex in y, and no quadratic."""
  flat = jnp.concatenate([y['b'].ravel(), y['c']])
  error = batch['g'] @ flat - jnp.tanh(batch['m'] @ x['a'])
  pull = jnp.sum(error**2) / 2 + jnp.sum(flat**2) / 2
  return pull + jnp.sum(jnp.logaddexp(flat, -flat)), error


def coupling(matrix, h, x):
  return matrix @ jnp.tanh(h @ x['a'])


PROBLEM = bj.BilevelProblem(upper, lower)


def as_lower(flat):
  return {'b': flat[:6].reshape(3, 2), 'c': flat[6:]}


def draw(seed, rank):
  """Batch, matrix of a rank, what h is made of, right-hand side and point."""
  rng = np.random.default_rng(seed)
  batch = {
    'f': rng.normal(size=UPPER + LOWER) / 3,
    'g': rng.normal(size=(LOWER, LOWER)) / 2,
    'm': rng.normal(size=(LOWER, UPPER)),
  }
  matrix = rng.normal(size=(ROWS, rank)) @ rng.normal(size=(rank, LOWER))
  h = rng.normal(size=(LOWER, UPPER)) / 2
  right = matrix @ rng.normal(size=LOWER)
  return batch, matrix, h, right, {'a': jnp.asarray(rng.normal(size=UPPER))}


@functools.partial(jax.jit, static_argnames='steps')
def minimiser(x, factors, h, right, batch, steps=40):
  """The lower minimiser in the set, by Newton's method along it."""
  basis = jnp.asarray(factors.null_space)
  target = right - coupling(factors.matrix, h, x)
  start = factors.row_space.T @ (factors.weights @ target)
  loss = lambda u: lower(x, as_lower(start + basis @ u), batch)[0]

  def newton(_, u):
    step = jnp.linalg.solve(jax.hessian(loss)(u), jax.grad(loss)(u))
    # Damped where far: the loss is no quadratic.
    return u - step / jnp.maximum(1, jnp.linalg.norm(step))

  u = jax.lax.fori_loop(0, steps, newton, jnp.zeros(basis.shape[1]))
  return as_lower(start + basis @ u)


@jax.jit
def dense_hypergradient(x, y, factors, h, right, batch):
  set_ = bj.projections.affine_set(
    factors, right, coupling=functools.partial(coupling, factors.matrix, h)
  )
  oracle = bj.implicit(
    PROBLEM, solve=bj.linear_solvers.dense_solve(), lower_set=set_
  )
  params = bj.BilevelParams(x, y)
  gradient, state = oracle.update(batch, oracle.init(params), params)
  return gradient.upper, bj.values(state)['outside_range']


@jax.jit
def differences(x, factors, h, right, batch):
  """Central finite differences, extrapolated once, coordinate by coordinate."""

  def total(point):
    x = {'a': point}
    return upper(x, minimiser(x, factors, h, right, batch), batch)

  def slope(step):
    units = step * jnp.eye(UPPER)
    ahead, behind = (jax.vmap(total)(x['a'] + s * units) for s in (1, -1))
    return (ahead - behind) / (2 * step)

  return (4 * slope(5e-4) - slope(1e-3)) / 3


@pytest.mark.parametrize('rank', [ROWS, 2])
def test_equals_finite_differences_on_random_constrained_problems(rank):
  """Twenty problems, half of them with rank-deficient equations."""
  with jax.enable_x64(True):
    for seed in range(10):
      batch, matrix, h, right, x = draw(seed, rank)
      factors = bj.projections.affine_factors(matrix)
      assert factors.row_space.shape[0] == rank
      y = minimiser(x, factors, h, right, batch)
      found, outside = dense_hypergradient(x, y, factors, h, right, batch)
      expected = differences(x, factors, h, right, batch)
      error = jnp.linalg.norm(found['a'] - expected)
      assert error <= 1e-6 * jnp.linalg.norm(expected)
      assert outside < 1e-12


def other_solvers(factors, right, h):
  """The set in both forms; each solver that should be exact on it."""
  given = {'coupling': functools.partial(coupling, factors.matrix, h)}
  dense = bj.projections.affine_set(factors, right, **given)
  free = bj.projections.affine_operator_set(
    lambda y: factors.matrix @ jnp.concatenate([y['b'].ravel(), y['c']]),
    right,
    **given,
  )

  def scipy_like(operator, right, start):
    return jax.scipy.sparse.linalg.cg(operator, right, x0=start, tol=1e-13)[0]

  for set_ in (dense, free):
    yield set_, bj.linear_solvers.conjugate_gradient(12)
    yield set_, bj.linear_solvers.gmres(7)
    yield set_, bj.linear_solvers.neumann(4_000, 0.05)
    yield set_, bj.linear_solvers.nystrom(7, 1e-7)
    yield set_, scipy_like
  yield free, bj.linear_solvers.dense_solve()


@pytest.mark.slow
def test_solvers_and_forms_of_a_set_agree():
  with jax.enable_x64(True):
    batch, matrix, h, right, x = draw(3, 2)
    factors = bj.projections.affine_factors(matrix)
    y = minimiser(x, factors, h, right, batch)
    expected, _ = dense_hypergradient(x, y, factors, h, right, batch)
    params = bj.BilevelParams(x, y)
    oracles = [
      bj.implicit(
        PROBLEM,
        solve=bj.linear_solvers.LinearSystem(solve, warm_start=False),
        lower_set=set_,
      )
      for set_, solve in other_solvers(factors, right, h)
    ]
    states = [oracle.init(params) for oracle in oracles]

    @jax.jit
    def gradients(states):
      return [
        oracle.update(batch, state, params)[0].upper
        for oracle, state in zip(oracles, states, strict=True)
      ]

    for i, gradient in enumerate(gradients(states)):
      np.testing.assert_allclose(
        gradient['a'], expected['a'], atol=1e-5, err_msg=f'solver {i}'
      )


@pytest.mark.slow
def test_without_constraints_equals_the_diagnostic():
  with jax.enable_x64(True):
    batch, *_, x = draw(0, 2)
    problem = bj.BilevelProblem(upper, lower)
    params = bj.BilevelParams(x, as_lower(jnp.ones(LOWER)))
    oracle = bj.implicit(problem, solve=bj.linear_solvers.dense_solve())
    gradient, _ = oracle.update(batch, oracle.init(params), params)
    exact = bj.hypergradient(problem, params, batch, tolerance=1e-14)
    chex.assert_trees_all_close(gradient.upper, exact, rtol=1e-9)


def test_without_the_direct_gradient_the_rest_is_the_correction():
  with jax.enable_x64(True):
    batch, *_, x = draw(1, 2)
    params = bj.BilevelParams(x, as_lower(jnp.ones(LOWER)))
    gradients = []
    for direct in (True, False):
      oracle = bj.implicit(PROBLEM, direct=direct)
      gradients.append(
        oracle.update(batch, oracle.init(params), params)[0].upper['a']
      )
    slope = jax.grad(upper)(x, params.lower, batch)['a']
    np.testing.assert_allclose(gradients[0] - gradients[1], slope, atol=1e-12)


@pytest.mark.slow
def test_warm_start_converges_over_updates_and_a_cold_one_does_not():
  batch, *_, x = draw(2, 2)
  batch = jax.tree.map(jnp.float32, batch)
  params = jax.tree.map(
    jnp.float32, bj.BilevelParams(x, as_lower(jnp.ones(LOWER)))
  )
  exact = bj.hypergradient(PROBLEM, params, batch)['a']
  errors = {}
  for warm in (True, False):
    series = bj.linear_solvers.neumann(3, 0.1)
    system = bj.linear_solvers.LinearSystem(series, warm_start=warm)
    oracle = bj.implicit(PROBLEM, solve=system)
    state, step = oracle.init(params), jax.jit(oracle.update)
    for _ in range(40):
      gradient, state = step(batch, state, params)
    errors[warm] = float(jnp.linalg.norm(gradient.upper['a'] - exact))
    assert (state.inner.linear is None) is not warm
  assert errors[True] < 1e-4 < errors[False]


def test_a_random_solver_is_unbiased_over_its_lengths_and_its_samples():
  """H_t is 1 or 3, in turn; the mean of both is 2."""
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: y,
    lower=lambda x, y, batch: batch * y**2 / 2 - x * y,
  )
  params = bj.BilevelParams(jnp.float32(0.0), jnp.float32(0.0))
  system = bj.linear_solvers.LinearSystem(
    bj.linear_solvers.random_neumann(3, 0.25),
    batch_at=lambda batch, t: batch + jnp.where(t % 2, 1.0, -1.0),
    warm_start=False,
    key=4,
  )
  oracle = bj.implicit(problem, solve=system)
  state, step = oracle.init(params), jax.jit(oracle.update)
  batch = jnp.float32(2.0)
  drawn, products = [], []
  for _ in range(30):
    before = bj.counts(state)['hessian_vector_products/lower']
    gradient, state = step(batch, state, params)
    after = bj.counts(state)['hessian_vector_products/lower']
    # The cross term is one product; the rest is the random length.
    products.append(after - before - 1)
    drawn.append(float(gradient.upper))
  terms = {0: 1.0, 1: 1 - 0.25 * 1, 2: (1 - 0.25 * 1) * (1 - 0.25 * 3)}
  expected = [0.75 * terms[n] for n in products]
  np.testing.assert_allclose(drawn, expected, rtol=1e-6)
  assert set(products) == {0, 1, 2}


def test_consensus_takes_the_mean_matrix_and_counts_rounds():
  """Hessians 1, 2, 6 and slopes 3, 3, 3: the mean system is 3 q = 3."""
  curvature = jnp.array([1.0, 2.0, 6.0])
  problem = bj.BilevelProblem(
    upper=lambda x, y, h: 3 * y,
    lower=lambda x, y, h: jnp.mean(h) * (y**2 / 2 - x * y),
  )
  oracle = bj.implicit(
    problem,
    solve=bj.linear_solvers.LinearSystem(
      bj.linear_solvers.conjugate_gradient(1), warm_start=False
    ),
    lower_set=bj.projections.consensus_set('clients'),
  )
  params = bj.BilevelParams(jnp.zeros(3), jnp.zeros(3))
  halves = curvature[:, None] * jnp.array([0.5, 1.5])
  for one, batch, parts in (
    (oracle, curvature, 1),
    (bj.evaluation.accumulate(oracle, 2), halves, 2),
  ):
    state = jax.vmap(one.init)(params)
    gradient, state = jax.vmap(one.update, axis_name='clients')(
      batch, state, params
    )
    # -grad_xy g q = h q, each client's own.
    np.testing.assert_allclose(gradient.upper, curvature, rtol=1e-6)
    counts = {name: int(n[0]) for name, n in state.counts.items()}
    # Each product is averaged over parts, and then over clients once.
    assert counts == {
      'gradients/upper': parts,
      'hessian_vector_products/lower': 2 * parts,
      'rounds/linear': 2,
    }


def test_large_trees_need_no_matrix(x64):
  """In float64: a float32 sum of so many terms depends on their order."""
  size = 200_000
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: jnp.sum(y['w'] ** 2) / 2,
    lower=lambda x, y, batch: (
      jnp.sum((1 + jnp.arange(size) % 3) * (y['w'] - x['w']) ** 2) / 2
    ),
  )
  ones = {'w': jnp.ones(size)}
  oracle = bj.implicit(problem, solve=bj.linear_solvers.conjugate_gradient(3))
  params = bj.BilevelParams(ones, ones)
  compiled = (
    jax.jit(oracle.update).lower(None, oracle.init(params), params).compile()
  )
  gradient, _ = compiled(None, oracle.init(params), params)
  # Coefficients of three steps are ratios of sums of `size` terms.
  rtol = rounding.tolerance(jnp.float64, 100 * size)
  np.testing.assert_allclose(gradient.upper['w'], 1.0, rtol=rtol)
  assert compiled.memory_analysis().temp_size_in_bytes < 30 * 8 * size


def test_sets_without_equations_are_refused():
  box = optax.projections.projection_non_negative
  with pytest.raises(TypeError, match='v_pbgd'):
    bj.implicit(PROBLEM, lower_set=box)


def test_a_set_without_a_point_is_refused_at_the_start():
  _, matrix, _, right, x = draw(0, 2)
  bad = bj.projections.affine_set(matrix, right + np.arange(4))
  oracle = bj.implicit(PROBLEM, lower_set=bad)
  params = bj.BilevelParams(x, as_lower(jnp.zeros(LOWER)))
  with pytest.raises(ValueError, match='lower is empty'):
    oracle.init(params)
