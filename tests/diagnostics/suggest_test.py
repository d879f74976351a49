"""Settings from a walk: against dense matrices, and by where their runs end."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import datasets

import bilevel_jax as bj
from tests.diagnostics import dense_walk

suggest = bj.diagnostics.suggest
Walk = bj.diagnostics.WalkSettings
# A dense coupled quadratic: f = |y - c|_Q^2 / 2 + |x|^2 / 20,
# g = y'Hy / 2 - y'Cx, with the minimiser y = H^-1 C x.
_RNG = np.random.default_rng(0)
_ROOTS = _RNG.normal(size=(2, 6, 6))
Q = _ROOTS[0] @ _ROOTS[0].T / 6
H = _ROOTS[1] @ _ROOTS[1].T / 6 + 0.3 * np.eye(6)
C = _RNG.normal(size=(6, 3))
CENTRE = _RNG.normal(size=6)
X = np.array([1.0, -2.0, 0.5])
SOLVED = np.linalg.solve(H, C)


def _upper(x, y, batch):
  away = y['all'] - CENTRE
  return away @ Q @ away / 2 + (x**2).sum() / 20


QUADRATIC = bj.BilevelProblem(
  _upper, lambda x, y, batch: y['all'] @ H @ y['all'] / 2 - y['all'] @ C @ x
)


def run(problem, found, batch):
  """The last params and the losses of `updates`, in a loop of that length."""
  solver = bj.v_pbgd(problem, **found.settings())

  def step(_, carry):
    params, state = carry
    updates, state = solver.update(batch, state, params)
    return bj.apply_updates(params, updates), state

  carry = (found.params, solver.init(found.params))
  params, state = jax.lax.fori_loop(0, found.updates, step, carry)
  return params, bj.values(state)


def norm(matrix):
  return np.linalg.norm(matrix, 2)


@pytest.mark.slow
def test_a_quadratic_against_dense_matrices(x64):
  params = bj.BilevelParams(jnp.asarray(X), {'all': jnp.zeros(6)})
  penalty = 40.0

  @jax.jit
  def both(params):
    found = suggest(QUADRATIC, params, key=0, penalty=penalty)
    return found, run(QUADRATIC, found, None)

  found, (end, values) = both(params)
  np.testing.assert_allclose(found.params.lower['all'], SOLVED @ X, atol=1e-6)
  np.testing.assert_allclose(found.upper_curvature, norm(Q), rtol=1e-6)
  np.testing.assert_allclose(found.lower_curvature, norm(H), rtol=1e-6)
  lower = 0.5 / (norm(Q) / penalty + norm(H))
  np.testing.assert_allclose(found.lower, lower, rtol=1e-6)
  assert found.value == found.lower
  outer = SOLVED.T @ Q @ SOLVED + np.eye(3) / 10
  # Changes of the hypergradient along a few steps see most of the largest.
  assert 0.8 * norm(outer) < found.hypergradient_curvature < norm(outer) + 1e-6
  # Critical damping of a motion between the slowest and the fastest.
  slow = (1 - np.sqrt(found.momentum)) ** 2 / lower
  assert np.linalg.eigvalsh(H).min() < slow < norm(H)
  swings = 2 * found.momentum / (1 - found.momentum)
  np.testing.assert_allclose(
    found.lag, (1 - found.momentum) / (lower * slow) + swings, rtol=1e-6
  )
  # The step above, from the other numbers and the hold of the penalty.
  bend = found.hypergradient_curvature * (1 + 4 * found.lag)
  hold = norm(C.T @ SOLVED) / 2
  first = min(max(bend / hold, 1), penalty)
  np.testing.assert_allclose(found.first_penalty, first, rtol=0.01)
  # Points before the last one may lag more, and need smaller steps.
  ratio = found.upper * (bend + first * hold) / (0.5 * first)
  assert 0.8 < ratio < 1.01
  # It arrives where it says, with a gap that is no larger than it says.
  best = np.linalg.solve(outer, SOLVED.T @ Q @ CENTRE)
  least = _upper(best, {'all': SOLVED @ best}, None)
  start = _upper(X, {'all': SOLVED @ X}, None)
  reached = _upper(end.upper, {'all': SOLVED @ end.upper}, None)
  assert least <= found.loss < least + 0.01 * (start - least)
  assert reached < least + 0.01 * (start - least)
  assert 0.3 * found.gap < values['gap'] < found.gap


@pytest.mark.slow
@pytest.mark.parametrize(
  ('seed', 'goal'),
  [
    (0, {'penalty': 40.0}),
    (1, {'accuracy': 0.01}),
    (2, {'gap': 1e-4}),
    (3, {'penalty': 2.0}),
  ],
)
def test_all_settings_are_those_of_dense_matrices(seed, goal, x64):
  """To rounding, up to the linear systems of G, whose residual is 1e-3."""
  rng = np.random.default_rng(seed)
  roots = rng.normal(size=(2, 6, 6))
  dense = dense_walk.Quadratic(
    q=roots[0] @ roots[0].T / 6,
    h=roots[1] @ roots[1].T / 6 + 0.3 * np.eye(6),
    c=rng.normal(size=(6, 3)),
    centre=rng.normal(size=6),
    decay=0.1,
  )
  x = rng.normal(size=3)

  def upper(x, y, batch):
    away = y - dense.centre
    return away @ dense.q @ away / 2 + dense.decay * x @ x / 2

  def lower(x, y, batch):
    return y @ dense.h @ y / 2 - y @ dense.c @ x

  found = suggest(
    bj.BilevelProblem(upper, lower),
    bj.BilevelParams(jnp.asarray(x), jnp.zeros(6)),
    key=seed,
    **goal,
  )
  ((name, number),) = goal.items()
  expected = dense_walk.suggest(dense, x, goal=name, number=number)
  for field, value in expected._asdict().items():
    # Whole numbers may round to a neighbour.
    atol = 2 if isinstance(value, int) else 1e-12
    np.testing.assert_allclose(
      getattr(found, field), value, rtol=1e-5, atol=atol, err_msg=field
    )


def cancer(test=0.3):
  """Breast cancer, standardised: batches of (features, labels)."""
  data = datasets.load_breast_cancer()
  order = np.random.default_rng(0).permutation(len(data.target))
  train, valid = np.split(order, [int(len(order) * (1 - test))])
  mean, scale = data.data[train].mean(0), data.data[train].std(0)
  part = lambda rows: (
    jnp.asarray((data.data[rows] - mean) / scale, jnp.float32),
    jnp.asarray(data.target[rows], jnp.float32),
  )
  return {'train': part(train), 'valid': part(valid)}


def logistic(y, features, labels):
  scores = features @ y['weights'] + y['bias']
  return jnp.mean(jnp.logaddexp(0, scores) - labels * scores)


CANCER = bj.BilevelProblem(
  upper=lambda x, y, batch: logistic(y, *batch['valid']),
  lower=lambda x, y, batch: (
    logistic(y, *batch['train']) + jnp.exp(x) * jnp.sum(y['weights'] ** 2) / 2
  ),
)


def solved(batch, x):
  """The upper loss with the lower problem solved, by Newton in float64."""
  (rows, labels), (others, truth) = (
    [np.asarray(part, np.float64) for part in batch[name]]
    for name in ('train', 'valid')
  )
  rows, others = (np.c_[part, np.ones(len(part))] for part in (rows, others))
  decay = np.exp(x) * np.r_[np.ones(30), 0]
  y = np.zeros(31)
  for _ in range(30):
    chance = 1 / (1 + np.exp(-rows @ y))
    slope = rows.T @ (chance - labels) / len(rows) + decay * y
    spread = (rows.T * chance * (1 - chance)) @ rows / len(rows)
    y = y - np.linalg.solve(spread + np.diag(decay), slope)
  scores = others @ y
  return np.mean(np.logaddexp(0, scores) - truth * scores)


@pytest.mark.slow
def test_one_weight_of_a_logistic_regression_ends_where_a_grid_does():
  """From two starts, at two accuracies: every setting is the suggested one."""
  batch = cancer()
  zeros = {'weights': jnp.zeros(30), 'bias': jnp.zeros(())}

  @jax.jit
  def ends(x, accuracy):
    start = bj.BilevelParams(x, zeros)
    found = suggest(CANCER, start, batch, key=0, accuracy=accuracy)
    params, values = run(CANCER, found, batch)
    return params.upper, values, found

  best = min(solved(batch, x) for x in np.arange(-8, 0.5, 0.25))
  for start, accuracy in ((0.0, 0.01), (-8.0, 0.002)):
    x, values, found = ends(start, accuracy)
    reached = solved(batch, float(x))
    assert reached < 1.02 * best
    np.testing.assert_allclose(found.loss, best, rtol=0.01)
    # As accurate as asked for, with a gap that is positive and as expected.
    assert 0 < reached - values['upper'] < 1.25 * accuracy
    assert 0.5 * found.gap < values['gap'] < found.gap


# Lower losses of one family, g = y'By / 2 - x e'y, by B's eigenvalues.
_TURN = np.linalg.qr(_RNG.normal(size=(4, 4)))[0]
_PULL = _TURN[:, 0] + _TURN[:, 1]
FAMILY = bj.BilevelProblem(
  upper=lambda x, y, matrix: ((y - 1) ** 2).sum() / 2 + x**2 / 2,
  lower=lambda x, y, matrix: y @ matrix @ y / 2 - x * (_PULL @ y),
)


START = bj.BilevelParams(jnp.float32(2.0), jnp.zeros(4))


def matrix_of(*eigenvalues):
  matrix = _TURN @ np.diag(eigenvalues) @ _TURN.T
  return matrix, jnp.asarray(matrix, jnp.float32)


@pytest.mark.parametrize(
  'eigenvalues', [(0, 0, 0, 0), (-1, -1, -1, -2), (2, 0, 0.5, 0.4)]
)
def test_a_lower_loss_without_a_minimiser(eigenvalues):
  """Linear, concave, and falling along one line only."""
  with pytest.raises(ValueError, match='no minimiser of the lower loss'):
    suggest(
      FAMILY,
      START,
      matrix_of(*eigenvalues)[1],
      key=0,
      gap=1e-4,
      walk=Walk(points=3, solve_steps=10),
    )


def test_one_point_of_a_lower_loss_with_flat_directions():
  """At the start as it is; along what is flat no penalty is needed."""
  exact, matrix = matrix_of(2, 1, 0, 0)
  inverse = np.linalg.pinv(exact, rcond=1e-6)
  x, y = 2.0, 2 * inverse @ _PULL
  params = bj.BilevelParams(jnp.float32(x), jnp.asarray(y, jnp.float32))
  found = jax.jit(
    jax.vmap(
      lambda b: suggest(FAMILY, params, b, key=3, gap=1e-4, walk=Walk(1))
    )
  )(jnp.stack([matrix, 0 * matrix]))
  # No error can be raised here: the linear one has no numbers.
  assert np.isnan(found.penalty[1]) and np.isnan(found.upper[1])
  assert found.updates[1] == 0
  found = jax.tree.map(lambda leaf: leaf[0], found)
  np.testing.assert_allclose(
    found.penalty, np.sqrt((y - 1) @ inverse @ (y - 1) / 2e-4), rtol=1e-4
  )
  # One step for all, by the curvature of the sum in both variables.
  joint = np.block([[np.zeros((1, 1)), -_PULL[None]], [-_PULL[:, None], exact]])
  np.testing.assert_allclose(
    found.upper, 0.5 / (1 / found.penalty + norm(joint)), rtol=1e-5
  )
  assert found.upper == found.lower == found.value and found.ramp == 0
  np.testing.assert_array_equal(found.params.lower, params.lower)


def _toy_upper(x, y, batch):
  wave = jnp.cos(4 * y + 2) / (1 + jnp.exp(2 - 4 * x))
  return wave + 0.5 * jnp.log((4 * x - 2) ** 2 + 1)


TOY = bj.BilevelProblem(
  _toy_upper, lambda x, y, batch: (x + y) ** 2 + x * jnp.sin(x + y) ** 2
)
TOY_MINIMA = np.array([0.3824, 1.2152, 2.8296])


@pytest.mark.slow
def test_suggested_settings_converge_on_the_toy():
  """It is not convex, in neither variable, and has a set."""
  box = functools.partial(
    optax.projections.projection_box, lower=0.0, upper=3.0
  )

  @jax.jit
  @jax.vmap
  def ends(key):
    one, two, three = jax.random.split(key, 3)
    x = jax.random.uniform(one, (), minval=0.0, maxval=3.0)
    y = jax.random.uniform(two, (), minval=-5.0, maxval=8.5)
    found = suggest(
      TOY,
      bj.BilevelParams(x, y),
      key=three,
      penalty=10.0,
      walk=Walk(solve_steps=20, upper_set=box),
    )
    params, values = run(TOY, found, None)
    return params.upper, values['gap']

  x, gap = ends(jax.random.split(jax.random.key(5), 32))
  distance = np.abs(np.asarray(x)[:, None] - TOY_MINIMA).min(axis=1)
  assert np.all(distance < 0.1)
  assert np.abs(gap).max() < 1e-2


@pytest.mark.slow
def test_a_blocked_coordinate_does_not_count():
  """The way in a box is that of the problem without what the box blocks."""
  aim, curvatures = jnp.array([2.0, -1.0]), jnp.array([1.0, 2.0])
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: (
      curvatures @ (y - aim) ** 2 + 300 * jnp.sum((x[2:] - 0.5) ** 2)
    ),
    lower=lambda x, y, batch: jnp.sum((y - x[:2]) ** 2),
  )
  start = jnp.array([0.0, 1.0, 0.0])
  # The last coordinate starts at its end of the box, and its way leads out.
  box = lambda x: jnp.minimum(x, jnp.array([9.0, 9.0, 0.0]))
  found = [
    suggest(
      problem,
      bj.BilevelParams(start[:n], start[:2]),
      key=0,
      penalty=100.0,
      walk=Walk(points=30, upper_set=given),
    )
    for n, given in ((3, box), (2, None))
  ]
  assert found[0].arrived and found[1].arrived
  for name in ('upper', 'hypergradient_curvature', 'updates'):
    one, two = (float(getattr(f, name)) for f in found)
    np.testing.assert_allclose(one, two, rtol=0.1, err_msg=name)


def test_the_set_goes_on_to_the_settings():
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
  )
  box = lambda x: jnp.clip(x, 0, 0.5)
  start = bj.BilevelParams(jnp.zeros(2), jnp.zeros(2))
  found = jax.jit(
    lambda params: suggest(
      problem, params, key=0, accuracy=0.02, walk=Walk(upper_set=box)
    )
  )(start)
  assert found.upper_set is box
  assert found.settings()['upper'].set is box
  params, _ = run(problem, found, None)
  np.testing.assert_allclose(params.upper, 0.5)


def test_its_signature_names_its_goals():
  names = list(inspect.signature(suggest).parameters)
  assert names[3:] == ['key', 'gap', 'accuracy', 'penalty', 'walk']
  with pytest.raises(TypeError, match='unexpected keyword argument'):
    suggest(FAMILY, START, jnp.eye(4), key=0, target=1.0)
  with (
    pytest.warns(DeprecationWarning, match=r'WalkSettings\(safety=...\)'),
    pytest.raises(ValueError, match='between 0 and 2'),
  ):
    suggest(FAMILY, START, jnp.eye(4), key=0, gap=1.0, safety=3.0)


def test_the_upper_step_suits_each_point_by_its_own_lag():
  """The curvature is large at the start, the lag at the end of the walk."""
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: (
      jnp.logaddexp(0, 4 * (1 - x)) + jnp.sum((y - x) ** 2) / 100
    ),
    lower=lambda x, y, batch: (
      ((y[0] - x) ** 2 + jnp.exp(2 * (1 - x)) * (y[1] - x) ** 2) / 2
    ),
  )
  start = bj.BilevelParams(jnp.float32(1.0), jnp.zeros(2))
  found = jax.jit(lambda p: suggest(problem, p, key=0, penalty=1.0))(start)
  # With the largest curvature and the last lag, though no point has both.
  largest = found.hypergradient_curvature * (1 + 4 * found.lag)
  assert found.upper > 1.5 * 0.5 / largest, (found, largest)


def test_a_walk_that_was_too_short_says_so():
  found = [
    suggest(TOY, bj.BilevelParams(0.2, 0.0), key=0, penalty=10.0, walk=Walk(n))
    for n in (2, 30)
  ]
  assert [bool(f.arrived) for f in found] == [False, True]
  assert found[0].words.startswith('beyond the walk')
  assert 'points=40' in str(found[0]) and 'optax.adam' in str(found[0])
  assert found[1].words == 'measured to the end of the walk.'
  slow = dataclasses.replace(found[1], updates=jnp.int32(20_000))
  assert '20000 updates of gradient descent' in slow.words


def test_a_model_is_not_printed():
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: jnp.sum((y - 1) ** 2),
    lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
  )
  start = bj.BilevelParams(jnp.zeros(999), jnp.zeros(999))
  said = repr(suggest(problem, start, key=0, penalty=1.0, walk=Walk(2)))
  assert 'penalty=1.0' in said and len(said) < 700


@pytest.mark.parametrize(
  ('kwargs', 'said'),
  [
    ({}, 'one of gap'),
    ({'gap': 1.0, 'penalty': 1.0}, 'one of gap'),
    ({'gap': 0.0}, 'gap is a finite number > 0'),
    ({'accuracy': -1.0}, 'accuracy is a finite number > 0'),
    ({'gap': 1.0, 'walk': Walk(safety=2.5)}, 'between 0 and 2'),
    ({'gap': 1.0, 'walk': Walk(momentum=1.0)}, 'below 1'),
    ({'gap': 1.0, 'walk': Walk(linear_steps=0)}, 'linear_steps >= 1'),
    ({'gap': 1.0, 'walk': Walk(points=0)}, 'points >= 1'),
  ],
)
def test_errors(kwargs, said):
  with pytest.raises(ValueError, match=said):
    suggest(FAMILY, START, jnp.eye(4), key=0, **kwargs)


def test_it_needs_a_key():
  with pytest.raises(TypeError, match='pass key='):
    suggest(FAMILY, START, jnp.eye(4), key=None, gap=1.0)
