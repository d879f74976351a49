"""Affine sets against quadratic programs; ranks, right-hand sides, trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

S = bj.Sequence


def quadratic_program(matrix, right, point):
  """The nearest point with A z = r, from the optimality conditions."""
  rows, columns = matrix.shape
  system = np.block(
    [[np.eye(columns), matrix.T], [matrix, np.zeros((rows,) * 2)]]
  )
  solution = np.linalg.lstsq(system, np.concatenate([point, right]))[0]
  return solution[:columns]


def draw(seed, rows, columns, rank):
  """A matrix of given rank, a right-hand side in its range, and a point."""
  rng = np.random.default_rng(seed)
  matrix = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
  right = matrix @ rng.normal(size=columns)
  return matrix, right, rng.normal(size=columns)


def dense(matrix, right):
  return bj.projections.affine_set(matrix, right)


def matrix_free(matrix, right):
  return bj.projections.affine_operator_set(
    lambda z: jnp.asarray(matrix) @ z, right
  )


def with_adjoint(matrix, right):
  return bj.projections.affine_operator_set(
    lambda z: jnp.asarray(matrix) @ z,
    right,
    adjoint=lambda r: jnp.asarray(matrix).T @ r,
  )


MAKERS = [dense, matrix_free, with_adjoint]


SIZES = [(3, 5, 3), (4, 5, 2), (6, 4, 3)]


@pytest.mark.slow
def test_projections_match_a_quadratic_program(x64):
  """Also for rank-deficient sets, with their tangent directions."""
  cases = [draw(seed, *size) for size in SIZES for seed in range(2)]

  @jax.jit
  def projected():
    out = []
    for matrix, right, point in cases:
      point = jnp.asarray(point)
      for make in MAKERS:
        set_ = make(matrix, right)
        coordinates = set_.coordinates(point)
        assert set_.zero(point).shape == coordinates.shape
        back = set_.lift(coordinates, point)
        out.append((set_(point), set_.tangent(point), back))
        out[-1] += (set_.transpose(point),)
    return out

  several = [case for case in cases for _ in MAKERS]
  for (matrix, right, point), got in zip(several, projected(), strict=True):
    nearest, tangent, back, transposed = got
    close = {'atol': 1e-8}
    expected = quadratic_program(matrix, right, point)
    np.testing.assert_allclose(nearest, expected, **close)
    np.testing.assert_allclose(matrix @ nearest, right, **close)
    pinv = np.linalg.pinv(matrix, rcond=1e-10)
    along = point - pinv @ (matrix @ point)
    np.testing.assert_allclose(tangent, along, **close)
    np.testing.assert_allclose(back, along, **close)
    np.testing.assert_allclose(transposed, pinv.T @ point, **close)


def in_a_set(lower_set):
  """A solver whose lower variable stays in a set and moves by the batch."""
  batch_oracle = bj.oracle(
    lambda p, b, s: ((), b[0], s), (), moves=('upper', 'lower')
  )
  return bj.descend(
    batch_oracle, upper=optax.sgd(-1.0), lower=S(optax.sgd(-1.0), set=lower_set)
  )


@pytest.mark.parametrize('make', MAKERS)
def test_a_right_hand_side_outside_the_range_is_an_error(make):
  matrix = np.array([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0]])
  point = jnp.zeros(3)
  make(matrix, jnp.array([1.0, 2.0])).check(point)
  bad = make(matrix, jnp.array([1.0, 2.5]))
  with pytest.raises(ValueError, match=r'lower is empty.*range of A'):
    bad.check(point, name='lower')
  with pytest.raises(ValueError, match='rank deficient'):
    in_a_set(bad).init(bj.BilevelParams(jnp.zeros(1), point))


def test_a_coupling_outside_the_range_is_an_error_at_init_and_later():
  matrix = np.array([[1.0, 2.0], [2.0, 4.0]])
  in_range = np.array([1.0, 2.0])
  leaves = lambda x: x[0] * in_range + jnp.maximum(x[0], 0) * np.array([0, 1.0])
  set_ = bj.projections.affine_set(matrix, in_range, coupling=leaves)
  solver = in_a_set(bj.projections.Lazy(set_, 1.0, key=0))
  good = bj.BilevelParams(jnp.array([-1.0]), jnp.zeros(2))
  solver.init(good)
  assert set_.outside_range(good.lower, good.upper) < 1e-6
  bad = good._replace(upper=jnp.array([1.0]))
  assert set_.outside_range(bad.lower, bad.upper) > 0.1
  with pytest.raises(ValueError, match=r'c - h\(x\)'):
    solver.init(bad)


def test_single_precision_stays_in_an_ill_conditioned_set():
  rng = np.random.default_rng(0)
  left, _, right = np.linalg.svd(rng.normal(size=(6, 9)), full_matrices=False)
  matrix = left @ np.diag(np.logspace(0, -5, 6)) @ right
  set_ = bj.projections.affine_set(matrix, matrix @ np.ones(9))
  inside = set_(jnp.asarray(rng.normal(size=9), jnp.float32))
  # Along every right singular vector, also for the smallest singular value.
  np.testing.assert_allclose(right @ inside, right @ np.ones(9), atol=2e-5)


def test_trees_keep_their_structure_and_types():
  point = {'a': jnp.ones((2, 2), jnp.bfloat16), 'b': jnp.float32(3.0)}
  total = lambda z: jnp.sum(z['a'].astype(jnp.float32)) + z['b']
  for set_ in (
    bj.projections.affine_set(np.ones((1, 5)), [2.0]),
    bj.projections.affine_operator_set(total, jnp.float32(2.0)),
  ):
    inside = set_(point)
    assert inside['a'].dtype == jnp.bfloat16
    np.testing.assert_allclose(inside['a'], np.zeros((2, 2)), atol=1e-2)
    np.testing.assert_allclose(inside['b'], 2.0, atol=1e-2)


def test_vmap_over_sets_of_several_matrices():
  matrices, rights, points = zip(*(draw(s, 3, 5, 2) for s in range(4)))
  factors = jax.tree.map(
    lambda *f: np.stack(f), *map(bj.projections.affine_factors, matrices)
  )
  project = lambda f, r, z: bj.projections.affine_set(f, r)(z)
  projected = jax.jit(jax.vmap(project))(
    factors, jnp.asarray(rights), jnp.asarray(points)
  )
  expected = list(map(quadratic_program, matrices, rights, points))
  np.testing.assert_allclose(projected, expected, atol=1e-5)


def test_both_forms_of_consensus_match_its_equations():
  copies = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
  differences = np.kron(np.array([[1.0, -1, 0], [0, 1, -1]]), np.eye(2))
  expected = bj.projections.affine_set(differences)(copies)
  np.testing.assert_allclose(
    bj.projections.consensus_set()(copies), expected, atol=1e-6
  )
  mapped = jax.vmap(
    bj.projections.consensus_set('clients'), axis_name='clients'
  )(copies)
  np.testing.assert_allclose(mapped, expected, atol=1e-6)
  tangent = bj.projections.consensus_set().tangent(copies)
  np.testing.assert_allclose(tangent, expected, atol=1e-6)


def test_a_matrix_of_another_width_is_an_error():
  set_ = bj.projections.affine_set(np.ones((1, 3)))
  with pytest.raises(ValueError, match='3 columns, but the sequence has 2'):
    set_(jnp.ones(2))
  with pytest.raises(ValueError, match='finite matrix'):
    bj.projections.affine_set([[np.nan]])


def test_a_coupled_set_without_upper_variable_is_an_error():
  set_ = bj.projections.affine_set([[1.0]], [1.0], coupling=lambda x: x)
  with pytest.raises(ValueError, match='upper variable'):
    set_(jnp.ones(1))
  batch_oracle = bj.oracle(lambda p, b, s: ((), b[0], s), (), moves=('a',))
  solver = bj.descend(batch_oracle, a=S(optax.sgd(1.0), set=set_))
  with pytest.raises(TypeError, match='coupled affine set'):
    solver.init(bj.sequences(a=jnp.ones(1)))


def test_a_coupled_set_uses_the_updated_upper_variable():
  set_ = bj.projections.affine_set(
    [[1.0]], [0.0], coupling=lambda x: -x
  )  # y = x
  solver = in_a_set(set_)
  params = bj.BilevelParams(jnp.array([1.0]), jnp.array([5.0]))
  state = solver.init(params)
  both = bj.BilevelParams(jnp.array([2.0]), jnp.array([0.5]))
  np.testing.assert_allclose(
    solver.update((both,), state, params)[0].lower, -2.0
  )
  alone = both._replace(upper=None)
  np.testing.assert_allclose(
    solver.update((alone,), state, params)[0].lower, -4.0
  )


def test_projections_and_rounds_are_counted():
  batch_oracle = bj.oracle(
    lambda p, b, s: ((), b[0], s), (), moves=('upper', 'lower')
  )
  solver = bj.descend(
    batch_oracle,
    upper=S(optax.sgd(1.0), set=bj.projections.consensus_set()),
    lower=S(optax.sgd(1.0), set=bj.projections.affine_set([[1.0]])),
  )
  params = bj.BilevelParams(jnp.ones(2), jnp.ones(1))
  _, state = solver.update((params,), solver.init(params), params)
  assert bj.counts(state) == {
    'projections/upper': 1,
    'projections/lower': 1,
    'rounds/upper': 1,
  }
