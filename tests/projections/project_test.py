import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import bilevel_jax as bj

sets = optax.projections
BOX = functools.partial(
  sets.projection_box, lower=-1.0, upper=jnp.array([0.3, 2.0, 0.7])
)
BALL = functools.partial(sets.projection_l2_ball, scale=0.9)
SIMPLEX = functools.partial(sets.projection_simplex, scale=2.0)
POINT = bj.BilevelParams(jnp.array([0.1, -0.2, 0.3]), jnp.ones(2))


def move(link, params, updates):
  return link.update(updates, link.init(params), params)


def test_the_sum_is_the_projection_and_others_pass():
  link = bj.project(upper=BOX)
  updates = bj.BilevelParams(jnp.array([5.0, -5.0, 0.1]), jnp.ones(2))
  moved, state = move(link, POINT, updates)
  np.testing.assert_allclose(
    POINT.upper + moved.upper, [0.3, -1.0, 0.4], rtol=1e-6
  )
  assert moved.lower is updates.lower
  assert bj.counts(state) == {'projections/upper': 1}


def test_no_update_no_projection():
  link = bj.project(upper=BOX)
  moved, state = move(link, POINT, bj.BilevelParams(None, jnp.ones(2)))
  assert moved.upper is None
  assert bj.counts(state) == {'projections/upper': 0}


def test_none_is_the_whole_space():
  link = bj.project(upper=None, lower=None)
  updates = POINT._replace(upper=POINT.upper * 100)
  moved, state = move(link, POINT, updates)
  assert moved.upper is updates.upper and bj.counts(state) == {}


@pytest.mark.parametrize(
  'set_', [BOX, BALL, SIMPLEX], ids=['box', 'ball', 'simplex']
)
@hypothesis.given(
  point=st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3),
  update=st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3),
)
def test_any_point_gets_into_the_set(set_, point, update):
  params = bj.BilevelParams(jnp.float32(point), None)
  link = bj.project(upper=set_)
  moved, _ = move(link, params, bj.BilevelParams(jnp.float32(update), None))
  after = bj.apply_updates(params, moved)
  # One spacing of floats, at the larger of the points, for the sum; and the
  # rounding of the projection itself, in the set's own size.
  size = np.abs(np.concatenate([params.upper, after.upper])).max()
  room = np.spacing(np.float32(size)) + 4 * np.spacing(np.float32(2))
  inside = set_(after.upper)
  assert np.abs(after.upper - inside).max() <= room
  assert bj.diagnostics.feasibility(after, upper=set_)['upper'] <= 2 * room
  # Nothing in the set is nearer to the point that was meant.
  meant = params.upper + jnp.float32(update)
  for corner in np.eye(3, dtype=np.float32):
    other = set_(corner * 2)
    near = np.linalg.norm(meant - after.upper)
    assert near <= np.linalg.norm(meant - other) + 1e-4


def test_the_deviation_does_not_build_up():
  link, params = bj.project(upper=BALL), POINT
  for t in range(50):
    push = jnp.array([np.sin(t), np.cos(t), 0.3], jnp.float32)
    moved, _ = move(link, params, bj.BilevelParams(push, None))
    params = bj.apply_updates(params, moved)
    assert jnp.linalg.norm(params.upper) <= 0.9 + 2e-7


EMPTY = {
  'box': (
    functools.partial(sets.projection_box, lower=1.0, upper=0.0),
    r'sequence upper has no point in it: a box with lower 1.0 above upper 0',
  ),
  'box in one coordinate': (
    functools.partial(
      sets.projection_box, lower=np.array([0, 3, 0]), upper=np.ones(3)
    ),
    'sequence upper has no point in it: a box',
  ),
  'l2 ball': (
    functools.partial(sets.projection_l2_ball, scale=-1.0),
    r'sequence upper has no point in it: a ball of radius -1',
  ),
  'l1 ball': (
    functools.partial(sets.projection_l1_ball, scale=-2.0),
    'sequence upper has no point in it: a ball of radius -2',
  ),
  'hypercube': (
    functools.partial(sets.projection_hypercube, scale=-1.0),
    r'sequence upper has no point in it: a hypercube with sides -1',
  ),
  'hypercube in one coordinate': (
    functools.partial(
      sets.projection_hypercube, scale=np.array([1.0, -1.0, 1.0])
    ),
    r'sequence upper has no point in it: a hypercube',
  ),
  'simplex': (
    functools.partial(sets.projection_simplex, scale=-1.0),
    r'sequence upper has no point in it: a simplex with the sum -1',
  ),
  'sphere': (
    functools.partial(sets.projection_l2_sphere, scale=-1.0),
    r'sequence upper has no point in it: a sphere of radius -1',
  ),
  'moves again': (lambda z: z / 2, 'sequence upper twice moves it again'),
  'reflection': (lambda z: -z, 'sequence upper twice moves it again'),
  'not finite': (lambda z: z / 0, 'sequence upper is not finite'),
  'another shape': (lambda z: z[:2], 'sequence upper returned another str'),
  'another structure': (lambda z: (z, z), 'sequence upper returned another'),
}


@pytest.mark.parametrize(('set_', 'message'), EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize('closed_over', [False, True])
def test_a_set_without_a_point_says_so(set_, message, closed_over):
  init = bj.project(upper=set_).init
  with pytest.raises(ValueError, match=message):
    jax.jit(lambda: init(POINT))() if closed_over else init(POINT)


def test_a_start_that_is_not_finite_says_so():
  params = POINT._replace(upper=POINT.upper * jnp.nan)
  with pytest.raises(ValueError, match='sequence is not finite'):
    bj.project(upper=BALL).init(params)


def test_a_box_around_a_tree():
  tree = {'a': jnp.ones(2), 'b': jnp.zeros(3)}
  box = functools.partial(
    sets.projection_box, lower={'a': 0.0, 'b': 2.0}, upper={'a': 1.0, 'b': 1.0}
  )
  with pytest.raises(ValueError, match='has no point in it: a box'):
    bj.project(upper=box).init(bj.BilevelParams(tree, None))


def test_nothing_is_checked_while_traced():
  init = bj.project(upper=lambda z: z / 2).init
  state = jax.jit(init)(POINT)
  assert bj.counts(state) == {'projections/upper': 0}


def test_traced_bounds():
  def step(most):
    box = functools.partial(sets.projection_box, lower=0.0, upper=most)
    link = bj.project(upper=box)
    moved, _ = move(link, POINT, bj.BilevelParams(jnp.ones(3), None))
    return POINT.upper + moved.upper

  np.testing.assert_allclose(jax.jit(step)(0.5), [0.5] * 3)


def test_a_set_of_no_sequence():
  with pytest.raises(TypeError, match=r'project works on .*middle'):
    bj.project(middle=BOX).init(POINT)


def test_a_jacobian_names_the_aggregators():
  link = bj.project(upper=BOX)
  with pytest.raises(TypeError, match=r'project takes.*scale_by_penalty'):
    move(link, POINT, bj.Jacobian(POINT))


def test_updates_of_another_shape():
  link = bj.project(upper=BOX)
  with pytest.raises(ValueError, match=r'project: .* sequence upper has shape'):
    move(link, POINT, POINT._replace(upper=jnp.ones(4)))
