"""Linear solvers against dense solutions in NumPy; products; errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax import linear_solvers
from tests import rounding

SIZE, COUNT = 6, 30
# Rank, condition, whether the right-hand side is in the range.
CASES = [
  (6, 10, True),
  (6, 1e3, True),
  (3, 10, True),
  (3, 1e3, True),
  (1, 1, True),
  (3, 10, False),
  (3, 100, False),
  (1, 1, False),
  (0, 1, False),
]


def product(basis, sizes, vectors):
  return np.einsum('kij,kj,klj,kl->ki', basis, sizes, basis, vectors)


def systems(seed=0):
  """Matrices, right-hand sides and solutions of least norm, case by case."""
  rng = np.random.default_rng(seed)
  out = []
  for rank, condition, inside in CASES:
    basis = np.linalg.qr(rng.normal(size=(COUNT, SIZE, SIZE)))[0]
    sizes = np.zeros((COUNT, SIZE))
    sizes[:, :rank] = condition ** -rng.uniform(size=(COUNT, rank))
    sizes[:, : min(rank, 1)] = 1
    kept = 1.0 * (sizes > 0)
    right = rng.normal(size=(COUNT, SIZE))
    right = product(basis, kept, right) if inside else right
    inverse = kept / np.where(sizes > 0, sizes, 1)
    matrix = np.einsum('kij,kj,klj->kil', basis, sizes, basis)
    out.append((matrix, right, product(basis, inverse, right)))
  return [np.concatenate(parts) for parts in zip(*out, strict=True)]


def as_tree(vector):
  return {'a': vector[:4].reshape(2, 2), 'b': vector[4:]}


def as_vector(tree):
  return jnp.concatenate([tree['a'].ravel(), tree['b']])


def mapped(solver):
  """The solver on many systems at once, each a pytree; solution, products."""

  def one(matrix, right, start=None):
    apply = lambda tree: as_tree(matrix @ as_vector(tree))
    start = None if start is None else as_tree(start)
    solution, products = solver.solve(apply, as_tree(right), start, None)
    return as_vector(solution), products

  run = jax.jit(jax.vmap(one))

  def call(*arrays, dtype='float32'):
    with jax.enable_x64(dtype == 'float64'):
      found = run(*(jnp.asarray(a, dtype) for a in arrays))
      return jax.tree.map(np.asarray, found)

  return call


def norms(vectors):
  return np.linalg.norm(np.float64(vectors), axis=-1)


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize(
  'solver',
  [
    bj.linear_solvers.conjugate_gradient(12),
    bj.linear_solvers.gmres(8),
    bj.linear_solvers.dense_solve(),
  ],
  ids=['cg', 'gmres', 'dense'],
)
def test_random_systems_of_all_ranks(solver, dtype):
  """The solution of least norm, to rounding times the condition."""
  matrix, right, expected = systems()
  found, _ = mapped(solver)(matrix, right, dtype=dtype)
  eps = np.finfo(dtype).eps
  error = norms(found - expected) / np.maximum(norms(expected), 1e-9)
  left = norms(right - np.einsum('kij,kj->ki', matrix, np.float64(found)))
  least = norms(right - np.einsum('kij,kj->ki', matrix, expected))
  for i, (_, condition, inside) in enumerate(CASES):
    part = slice(i * COUNT, (i + 1) * COUNT)
    if inside:
      assert error[part].max() < 30 * eps * condition, CASES[i]
    else:
      # Its residual is all but the least; to its norm, rounding is far.
      assert (left / least)[part].max() < 1.001, CASES[i]
      assert norms(found - expected)[part].max() < 30 * eps**0.5, CASES[i]


def test_warm_starts_do_not_drift_in_a_singular_system():
  """Updates that each start at rounding from the solution, in float32."""
  matrix, right, expected = systems(1)
  run = mapped(bj.linear_solvers.conjugate_gradient(10))
  part = slice(2 * COUNT, 4 * COUNT)
  matrix, right, x = matrix[part], right[part], expected[part]
  for _ in range(8):
    x, products = run(matrix, right, x)
  error = norms(x - expected[part]) / norms(expected[part])
  assert error[:COUNT].max() < 1e-5
  assert error.max() < 1e-3
  assert np.all(products == 11)


@pytest.mark.parametrize(
  'solver',
  [
    bj.linear_solvers.conjugate_gradient(12),
    bj.linear_solvers.gmres(8),
    bj.linear_solvers.nystrom(6, 1e-6),
  ],
  ids=['cg', 'gmres', 'nystrom'],
)
def test_right_hand_sides_of_any_size(solver):
  matrix, right, expected = (a[:COUNT] for a in systems())
  run = mapped(solver)
  for size in (1e-30, 1e30):
    found, _ = run(matrix, size * right)
    np.testing.assert_allclose(found / size, expected, rtol=1e-3, atol=1e-3)
  assert np.all(run(matrix, 0 * right)[0] == 0)
  assert np.all(np.isnan(run(np.nan * matrix, right)[0]))


def test_conjugate_gradients_are_those_of_the_textbook_until_they_end():
  matrix, right, _ = (a[COUNT] for a in systems())
  x, residual = np.zeros(SIZE), right
  direction = residual
  for _ in range(4):
    image = matrix @ direction
    length = residual @ residual / (direction @ image)
    x, new = x + length * direction, residual - length * image
    direction = new + (new @ new) / (residual @ residual) * direction
    residual = new
  run = mapped(bj.linear_solvers.conjugate_gradient(4, unroll=4))
  found, products = run(matrix[None], right[None], dtype='float64')
  np.testing.assert_allclose(found[0], x, rtol=1e-9)
  assert products == 4


def test_conjugate_gradients_end_at_the_tolerance():
  matrix, right, expected = systems()
  run = mapped(bj.linear_solvers.conjugate_gradient(50, tolerance=1e-2))
  found, products = run(matrix, right)
  left = norms(right - np.einsum('kij,kj->ki', matrix, np.float64(found)))
  least = norms(right - np.einsum('kij,kj->ki', matrix, expected))
  assert np.all(left <= 1e-2 * norms(right) + 1.001 * least)
  assert 1 <= products.min() < products.max() <= 9


def test_conjugate_gradients_stop_at_negative_curvature():
  """The least residual along the first direction: alpha = b'Hb / |Hb|^2."""
  curvature = jnp.array([3.0, 1.0, -2.0])
  right = jnp.array([1.0, 1.0, 1.0])
  solve = bj.linear_solvers.conjugate_gradient(10)
  found = solve(lambda v: curvature * v, right)
  assert np.linalg.norm(curvature * found - right) <= np.sqrt(3) * 0.99
  # No step is possible at all.
  np.testing.assert_array_equal(solve(lambda v: -v, right), 0)


@pytest.mark.parametrize(
  'solver',
  [
    bj.linear_solvers.conjugate_gradient(2),
    bj.linear_solvers.gmres(2),
    bj.linear_solvers.neumann(2, 1.0),
  ],
  ids=['cg', 'gmres', 'neumann'],
)
def test_starts(solver):
  matrix, right, exact = (a[:COUNT] for a in systems())
  starts = [shift * right + exact for shift in (0, 0.01, 1)]
  run = mapped(solver)
  still, near, far = (run(matrix, right, start)[0] for start in starts)
  np.testing.assert_allclose(still, exact, rtol=1e-5, atol=1e-5)
  # Each of them is linear in the right-hand side and the start together.
  np.testing.assert_allclose(near - exact, 0.01 * (far - exact), atol=1e-4)
  assert np.all(norms(near - exact) < 0.02 * norms(right))


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_nystrom_is_the_formula(dtype):
  """Sketches below, at and above the rank, of a small damping, in NumPy."""
  matrix, right, _ = (a[COUNT : 3 * COUNT] for a in systems())
  matrix[0], right[0] = 0, 1
  for rank, damping in ((2, 0.1), (4, 1e-3), (9, 1e-3)):
    drawn = jax.random.normal(jax.random.key(0), (rank, SIZE), jnp.float32)
    columns = np.linalg.qr(np.float64(drawn).T)[0]
    run = mapped(bj.linear_solvers.nystrom(rank, damping))
    found, products = run(matrix, right, dtype=dtype)
    assert np.all(products == min(rank, SIZE))
    sketch = matrix @ columns
    inner = np.linalg.pinv(columns.T @ sketch, rcond=1e-10, hermitian=True)
    low = sketch @ inner @ sketch.swapaxes(1, 2)
    expected = np.linalg.solve(low + damping * np.eye(SIZE), right[..., None])
    error = norms(found - expected[..., 0]) / norms(expected[..., 0])
    assert error.max() < 10 * np.finfo(dtype).eps / damping


def test_neumann_is_the_truncated_series():
  matrix, right, _ = (a[0] for a in systems())
  solve = bj.linear_solvers.neumann(3, 0.2)
  apply = lambda v: jnp.float32(matrix) @ v
  shrink = np.eye(SIZE) - 0.2 * matrix
  powers = sum(np.linalg.matrix_power(shrink, n) for n in range(4))
  found = solve(apply, jnp.float32(right))
  np.testing.assert_allclose(found, 0.2 * powers @ right, rtol=1e-5, atol=1e-5)
  # Its sum goes on growing in bfloat16.
  solve = bj.linear_solvers.neumann(1_000, 0.01)
  # The product and the solution are rounded to it, and 4e-5 are left out.
  room = rounding.tolerance(jnp.bfloat16, 2) + 1e-4
  np.testing.assert_allclose(solve(lambda v: v, jnp.bfloat16(1)), 1, rtol=room)


def test_random_neumann_has_the_series_as_its_mean_and_counts_its_length():
  matrix, right, _ = (a[0] for a in systems())
  bound, apply = 4, lambda v: jnp.float32(matrix) @ v
  shrink = np.eye(SIZE) - 0.2 * matrix
  terms = np.stack(
    [0.2 * bound * np.linalg.matrix_power(shrink, n) @ right for n in range(4)]
  )
  solver = bj.linear_solvers.random_neumann(bound, 0.2)
  run = lambda key: solver.solve(apply, jnp.float32(right), None, key)
  found, lengths = jax.vmap(run)(jnp.arange(20))
  # Each of the terms is as likely: their mean is the sum of four.
  np.testing.assert_allclose(found, terms[lengths], rtol=1e-4, atol=1e-5)
  assert set(np.asarray(lengths)) == {0, 1, 2, 3}
  exact = bj.linear_solvers.neumann(bound - 1, 0.2)(apply, jnp.float32(right))
  np.testing.assert_allclose(terms.mean(0), exact, rtol=1e-4, atol=1e-5)
  # All forms of a key.
  for key in (jax.random.key(7), jax.random.PRNGKey(7)):
    np.testing.assert_allclose(run(key)[0], found[7], rtol=1e-6)


def test_samples_are_taken_in_turn():
  sampled = linear_solvers.SampledOperator(
    lambda v: v, lambda v, t: v * (1 + t).astype(v.dtype)
  )
  # v <- v + (1 - (1 + t) v) / 4, from 1/4.
  q = bj.linear_solvers.neumann(2, 0.25)(sampled, jnp.float32(1.0))
  first = 0.25 + (1 - 0.25) / 4
  np.testing.assert_allclose(q, first + (1 - 2 * first) / 4, rtol=1e-6)


def test_gmres_needs_no_symmetry():
  matrix = np.array([[1.0, 2.0], [-3.0, 0.5]])
  found = bj.linear_solvers.gmres(2)(
    lambda v: jnp.asarray(matrix) @ v, jnp.array([1.0, -1.0])
  )
  np.testing.assert_allclose(found, np.linalg.solve(matrix, [1, -1]), rtol=1e-5)


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda s: s.conjugate_gradient(0), 'steps >= 1, got 0'),
    (lambda s: s.conjugate_gradient(3, unroll=0), 'unroll >= 1'),
    (lambda s: s.conjugate_gradient(3, tolerance=-1e-6), 'tolerance is in'),
    (lambda s: s.conjugate_gradient(3, tolerance=2.0), 'tolerance is in'),
    (lambda s: s.conjugate_gradient(3, tolerance=np.nan), 'tolerance is in'),
    (lambda s: s.neumann(-1, 0.1), 'steps >= 0'),
    (lambda s: s.neumann(3, 0.0), 'step_size'),
    (lambda s: s.neumann(3, -0.1), 'step_size'),
    (lambda s: s.neumann(3, np.inf), 'step_size'),
    (lambda s: s.random_neumann(0, 0.1), 'terms >= 1'),
    (lambda s: s.random_neumann(2, np.nan), 'step_size'),
    (lambda s: s.gmres(0), 'steps >= 1'),
    (lambda s: s.nystrom(0, 0.1), 'columns >= 1'),
    (lambda s: s.nystrom(3, 0.0), 'damping is a finite number > 0'),
  ],
)
def test_arguments_out_of_range(make, match):
  with pytest.raises(ValueError, match=match):
    make(bj.linear_solvers)


def test_a_random_solver_asks_for_its_key():
  with pytest.raises(TypeError, match='key='):
    bj.linear_solvers.random_neumann(2, 0.1)(lambda v: v, jnp.float32(1))


@pytest.mark.parametrize(
  ('solve', 'match'),
  [
    ('cg', "got 'cg': pass for instance bj.linear_solvers"),
    (jax.scipy.sparse.linalg.cg, r'solve\(\*args\)\[0\]'),
  ],
)
def test_what_is_no_solver_is_refused(solve, match):
  loss = lambda x, y, batch: (y - x) ** 2
  one = jnp.float32(1)
  params = bj.BilevelParams(one, one)
  with pytest.raises(TypeError, match=match):
    oracle = bj.implicit(bj.BilevelProblem(loss, loss), solve=solve)
    oracle.update(None, oracle.init(params), params)
