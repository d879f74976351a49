"""Sets of one sequence: points in the set, and errors for empty sets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

S = bj.Sequence
sets = optax.projections
BOX = functools.partial(
  sets.projection_box, lower=-1.0, upper=jnp.array([0.3, 2.0, 0.7])
)
BALL = functools.partial(sets.projection_l2_ball, scale=0.9)
SIMPLEX = functools.partial(sets.projection_simplex, scale=2.0)
POINT = bj.BilevelParams(jnp.array([0.1, -0.2, 0.3]), jnp.ones(2))
# The batch has the gradients.
GIVEN = bj.oracle(lambda p, batch, s: ((), batch[0], s), (), moves=('upper',))


def make_solver(projection):
  return bj.descend(GIVEN, upper=S(optax.sgd(-1.0), set=projection))


def move(projection, point, update):
  """The point after one update, and the state."""
  solver, params = make_solver(projection), bj.BilevelParams(point, None)
  gradients = bj.BilevelParams(update, None)
  updates, state = solver.update((gradients,), solver.init(params), params)
  return bj.apply_updates(params, updates).upper, state


def test_the_step_ends_in_the_set_and_is_counted():
  after, state = move(BOX, POINT.upper, jnp.array([5.0, -5.0, 0.1]))
  np.testing.assert_allclose(after, [0.3, -1.0, 0.4], rtol=1e-6)
  assert bj.counts(state) == {'projections/upper': 1}


def test_without_a_set_any_point_is_valid():
  after, state = move(None, POINT.upper, POINT.upper * 99)
  np.testing.assert_allclose(after, POINT.upper * 100, rtol=1e-6)
  assert bj.counts(state) == {}


def test_any_point_ends_in_the_set():
  """Up to one float spacing, for sizes from 1e-2 to 50, also from outside."""
  rng = np.random.default_rng(0)
  sizes = 10 ** rng.uniform(-2, 1.7, size=(2, 200, 1))
  points, steps = (sizes * rng.normal(size=(2, 200, 3))).astype(np.float32)
  for projection in (BOX, BALL, SIMPLEX):
    after = jax.jit(
      jax.vmap(lambda z, u, projection=projection: move(projection, z, u)[0])
    )(points, steps)
    inside = np.asarray(jax.jit(jax.vmap(projection))(after))
    # One spacing of the larger point for the sum, plus the rounding of the
    # projection at the size of the set.
    size = np.abs(np.concatenate([points, after], 1)).max(1)
    room = np.spacing(size) + 4 * np.spacing(np.float32(2))
    assert np.all(np.abs(after - inside).max(1) <= room)
    # Nothing in the set is nearer to the point that was meant.
    meant = points + steps
    near = np.linalg.norm(meant - after, axis=1)
    for corner in np.eye(3, dtype=np.float32):
      other = np.linalg.norm(meant - projection(corner * 2), axis=1)
      assert np.all(near <= other + 1e-4)


def test_the_deviation_does_not_accumulate():
  step = jax.jit(lambda z, u: move(BALL, z, u)[0])
  point = POINT.upper
  for t in range(50):
    point = step(point, jnp.array([np.sin(t), np.cos(t), 0.3], jnp.float32))
    assert np.linalg.norm(point) <= 0.9 + 2e-7


EMPTY = {
  'box': (
    functools.partial(sets.projection_box, lower=1.0, upper=0.0),
    r'sequence upper is empty: a box with lower 1.0 above upper 0',
  ),
  'box in one coordinate': (
    functools.partial(
      sets.projection_box, lower=np.array([0, 3, 0]), upper=np.ones(3)
    ),
    'sequence upper is empty: a box',
  ),
  'l2 ball': (
    functools.partial(sets.projection_l2_ball, scale=-1.0),
    r'sequence upper is empty: a ball of radius -1',
  ),
  'l1 ball': (
    functools.partial(sets.projection_l1_ball, scale=-2.0),
    'sequence upper is empty: a ball of radius -2',
  ),
  'hypercube': (
    functools.partial(sets.projection_hypercube, scale=-1.0),
    r'sequence upper is empty: a hypercube with sides -1',
  ),
  'hypercube in one coordinate': (
    functools.partial(
      sets.projection_hypercube, scale=np.array([1.0, -1.0, 1.0])
    ),
    r'sequence upper is empty: a hypercube',
  ),
  'simplex': (
    functools.partial(sets.projection_simplex, scale=-1.0),
    r'sequence upper is empty: a simplex with the sum -1',
  ),
  'sphere': (
    functools.partial(sets.projection_l2_sphere, scale=-1.0),
    r'sequence upper is empty: a sphere of radius -1',
  ),
  'not finite': (lambda z: z / 0, 'sequence upper is not finite'),
  'another shape': (lambda z: z[:2], 'sequence upper returned another str'),
  'another structure': (lambda z: (z, z), 'sequence upper returned another'),
}


@pytest.mark.parametrize('name', EMPTY)
def test_an_empty_set_is_an_error(name):
  set_, message = EMPTY[name]
  init = make_solver(set_).init
  with pytest.raises(ValueError, match=message):
    init(POINT)
  # Closed-over values are concrete while a function is traced.
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: init(POINT))


def test_a_start_that_is_not_finite_is_an_error():
  params = POINT._replace(upper=POINT.upper * jnp.nan)
  with pytest.raises(ValueError, match='sequence is not finite'):
    make_solver(BALL).init(params)


def test_a_box_around_a_tree():
  tree = {'a': jnp.ones(2), 'b': jnp.zeros(3)}
  box = functools.partial(
    sets.projection_box, lower={'a': 0.0, 'b': 2.0}, upper={'a': 1.0, 'b': 1.0}
  )
  with pytest.raises(ValueError, match='is empty: a box'):
    make_solver(box).init(bj.BilevelParams(tree, None))


def test_traced_sequences_are_not_checked():
  jax.eval_shape(make_solver(lambda z: z / 2).init, POINT)


def test_bounds_may_be_traced():
  def step(bound):
    box = functools.partial(sets.projection_box, lower=0.0, upper=bound)
    return move(box, POINT.upper, jnp.ones(3))[0]

  np.testing.assert_allclose(jax.jit(step)(0.5), [0.5] * 3)


def test_wider_bounds_do_not_widen_the_sequence(x64):
  box = functools.partial(
    sets.projection_box, lower=np.zeros(3), upper=np.ones(3)
  )
  after, _ = move(box, jnp.zeros(3, jnp.float32), jnp.ones(3, jnp.float32))
  assert after.dtype == jnp.float32
