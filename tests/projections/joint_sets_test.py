"""Half spaces and budgets, against a general solver."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import bilevel_jax as bj
from tests.tiers import first

RNG = np.random.default_rng(0)
SIZES = (3, 2)


def nearest(point, weights, bound, lower=-np.inf, upper=np.inf):
  """The nearest point in the box within the budget, by SciPy."""
  solution = scipy.optimize.minimize(
    lambda z: ((z - point) ** 2).sum() / 2,
    np.clip(point, max(lower, -10), min(upper, 10)),
    jac=lambda z: z - point,
    bounds=[(lower, upper)] * point.size,
    constraints={
      'type': 'ineq',
      'fun': lambda z: bound - weights @ z,
      'jac': lambda z: -weights,
    },
    method='SLSQP',
    options={'ftol': 1e-15, 'maxiter': 500},
  )
  return solution.x


def split(vector, dtype):
  """Two sequences; the first is a pytree of two leaves."""
  one, two = jnp.split(jnp.asarray(vector, dtype), [SIZES[0]])
  return {'a': one[:2], 'b': one[2]}, two


def flat(sequences):
  (one, two) = sequences
  return np.concatenate([one['a'], [one['b']], two])


@pytest.mark.parametrize('dtype', first(['float64', 'float32']))
@pytest.mark.parametrize('name', ['half_space', 'budget'])
def test_projections_match_the_nearest_point(name, dtype):
  with jax.enable_x64(dtype == 'float64'):
    for k in range(4):
      point = RNG.normal(size=5) * 2
      weights = RNG.normal(size=5)
      bound = float(RNG.normal())
      box = {}
      if name == 'budget':
        weights, bound = np.abs(weights), abs(bound)
        weights[k % 5] = 0
        box = {'lower': 0.0, 'upper': 1.5}
      one, two = split(weights, dtype)
      make = getattr(bj.projections, name)
      joint = make({'lower': one, 'upper': two}, bound, **box)
      assert joint.others == ('upper',)
      start = split(point, dtype)
      inside = jax.jit(joint.projection)(start)
      for leaf in jax.tree.leaves(inside):
        assert leaf.dtype == dtype
      expected = nearest(point, weights, bound, **box)
      room = {'float32': 1e-5, 'float64': 1e-7}[dtype]
      np.testing.assert_allclose(flat(inside), expected, atol=room)
      excess = weights @ np.float64(flat(inside)) - bound
      assert excess <= 20 * np.finfo(dtype).eps * (1 + np.abs(bound))
      # Points inside do not move.
      again = joint.projection(inside)
      room = 8 * np.finfo(dtype).eps * (1 + np.abs(point).max())
      np.testing.assert_allclose(flat(again), flat(inside), atol=room)


def test_a_number_is_the_weight_of_all_entries_and_corners_are_exact():
  joint = bj.projections.budget({'x': 1.0, 'y': 1.0}, 2.0, upper=1.0)
  x, y = joint.projection((jnp.array([5.0, -1.0]), {'z': jnp.array([9.0])}))
  np.testing.assert_array_equal(x, [1, 0])
  np.testing.assert_array_equal(y['z'], [1])
  # A budget of zero is the lowest corner.
  joint = bj.projections.budget({'x': 1.0}, 0.0)
  (x,) = joint.projection((jnp.array([5.0, 0.3]),))
  np.testing.assert_allclose(x, [0, 0], atol=1e-6)


def test_a_solver_stays_in_a_joint_set(x64):
  """Two numbers with targets 3 and 2 share a budget of 2."""
  loss = lambda p, batch: ((p.x - 3) ** 2).sum() + ((p.y - 2) ** 2).sum()
  joint = bj.projections.budget({'x': 1.0, 'y': 1.0}, 2.0)
  solver = bj.descend(
    bj.gradient(loss, of=('x', 'y')),
    x=bj.Sequence(optax.sgd(0.2), set=joint),
    y=optax.sgd(0.2),
  )
  params = bj.sequences(x=jnp.zeros(1), y=jnp.zeros(1))
  params, state = bj.testing.run(solver, params, 200)
  np.testing.assert_allclose([params.x[0], params.y[0]], [1.5, 0.5], atol=1e-9)
  assert bj.counts(state)['projections/x+y'] == 200


def test_a_budget_with_weights_of_different_sizes():
  """The entry with the large weight reaches zero first."""
  joint = bj.projections.budget({'x': jnp.float32([1e-6, 1e6])}, 1.0)
  (point,) = jax.jit(joint.projection)((jnp.full(2, 3.0, jnp.float32),))
  room = 4 * 3 * np.finfo(np.float32).eps
  np.testing.assert_allclose(point, [3.0, 1e-6], atol=room)


def test_empty_sets_and_wrong_arguments_are_errors():
  for make, words in {
    lambda: bj.projections.budget({'x': -1.0}, 1.0): 'weights are numbers >= 0',
    lambda: bj.projections.budget(
      {'x': 1.0}, 1.0, lower=2.0, upper=1.0
    ): r'\[2.0, 1.0\]',
    lambda: bj.projections.budget(
      {'x': 1.0}, 1.0, lower=-np.inf
    ): 'a finite lower bound',
    lambda: bj.projections.budget(
      {'x': 1.0}, np.nan
    ): 'budget.*must not be NaN',
    lambda: bj.projections.half_space({'x': 1.0}, np.nan): 'half_space.*nan',
    lambda: bj.projections.half_space(
      {'x': jnp.array([1.0, np.nan])}, 1.0
    ): 'half_space: the weights',
  }.items():
    with pytest.raises(ValueError, match=words):
      make()
  for call in (bj.projections.budget, bj.projections.half_space):
    with pytest.raises(TypeError, match='weights by name of the sequence'):
      call([1.0, 1.0], 1.0)
  joint = bj.projections.budget({'x': 1.0}, -1.0)
  solver = bj.descend(
    bj.gradient(lambda p, batch: (p.x**2).sum(), of='x'),
    x=bj.Sequence(optax.sgd(0.1), set=joint),
  )
  with pytest.raises(ValueError, match='the set is empty'):
    solver.init(bj.sequences(x=jnp.ones(2)))
