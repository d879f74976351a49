"""Diagnostics of nested problems against dense references in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

UPPER, LOWER, ROWS, PENALTY = 3, 6, 5, 100.0


def as_tree(vector):
  return {'a': vector[:4].reshape(2, 2), 'b': vector[4:]}


def upper(x, y, data):
  flat = jnp.concatenate([y['a'].ravel(), y['b']])
  pull = jnp.sum((flat - data['c']) ** 2) / 2 + flat[0] * x[0]
  return pull + jnp.sum(jnp.cos(data['C'] @ x))


def lower(x, y, data):
  """Strongly convex in y, no quadratic; couples all entries of x and y."""
  flat = jnp.concatenate([y['a'].ravel(), y['b']])
  error = flat - jnp.tanh(data['M'] @ x)
  rest = jax.nn.softplus(data['B'] @ flat + data['N'] @ x)
  return error @ data['A'] @ error / 2 + jnp.sum(rest)


PROBLEM = bj.BilevelProblem(upper, lower)


def draw(seed, condition):
  rng = np.random.default_rng(seed)
  basis = np.linalg.qr(rng.normal(size=(LOWER, LOWER)))[0]
  sizes = condition ** -np.linspace(0, 1, LOWER)
  return {
    'x': rng.normal(size=UPPER),
    'A': (basis * sizes) @ basis.T,
    'M': rng.normal(size=(LOWER, UPPER)),
    'B': rng.normal(size=(ROWS, LOWER)) / 3,
    'N': rng.normal(size=(ROWS, UPPER)),
    'c': rng.normal(size=LOWER),
    'C': rng.normal(size=(UPPER, UPPER)),
  }


class Reference:
  """The same problem by hand, in float64."""

  def __init__(self, data):
    self.__dict__.update(data)

  def spread(self, x, y):
    rest = 1 / (1 + np.exp(-self.B @ y - self.N @ x))
    return rest, (rest * (1 - rest))[:, None]

  def slopes(self, x, y):
    """Gradients of the lower loss in x and in y."""
    rest, _ = self.spread(x, y)
    mean = np.tanh(self.M @ x)
    pull = self.A @ (y - mean)
    in_x = self.N.T @ rest - self.M.T @ ((1 - mean**2) * pull)
    return in_x, pull + self.B.T @ rest

  def minimiser(self, x):
    """Newton's method, damped."""
    y = np.tanh(self.M @ x)
    size = lambda y: np.linalg.norm(self.slopes(x, y)[1])
    for _ in range(60):
      hessian = self.A + self.B.T @ (self.spread(x, y)[1] * self.B)
      step = np.linalg.solve(hessian, self.slopes(x, y)[1])
      while size(y - step) > 2 * size(y):
        step /= 2
      y = y - step
    assert size(y) < 1e-13
    return y

  def total(self, x):
    y = self.minimiser(x)
    pull = np.sum((y - self.c) ** 2) / 2 + y[0] * x[0]
    return pull + np.sum(np.cos(self.C @ x))

  def partial(self, x, y):
    """The gradient of the upper loss in x."""
    return y[0] * np.eye(UPPER)[0] - self.C.T @ np.sin(self.C @ x)

  def hypergradient(self, x):
    y = self.minimiser(x)
    _, curvature = self.spread(x, y)
    hessian = self.A + self.B.T @ (curvature * self.B)
    scale = (1 - np.tanh(self.M @ x) ** 2)[:, None]
    cross = self.B.T @ (curvature * self.N) - self.A @ (scale * self.M)
    slope = y - self.c + x[0] * np.eye(LOWER)[0]
    return self.partial(x, y) - cross.T @ np.linalg.solve(hessian, slope)


def test_the_reference_is_the_slope_of_the_value_function():
  ours = Reference(data := draw(0, 30))
  steps = 1e-4 * np.eye(UPPER)
  slope = [
    (ours.total(data['x'] + step) - ours.total(data['x'] - step)) / 2e-4
    for step in steps
  ]
  np.testing.assert_allclose(ours.hypergradient(data['x']), slope, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  'dtype', [pytest.param('float32', marks=pytest.mark.slow), 'float64']
)
def test_dense_problems_to_rounding(dtype):
  """From far, from near and from the minimum; well and ill conditioned."""
  eps = np.finfo(dtype).eps
  cases = [
    (draw(seed, condition), shift, condition)
    for seed in range(4)
    for condition in (10, 300)
    for shift in (None, 0.01, 0)
  ]

  def measure(data, start, value):
    params = bj.BilevelParams(data['x'], as_tree(start))
    return bj.diagnostics.hypergradient_distance(
      PROBLEM,
      params,
      data,
      penalty=PENALTY,
      value=as_tree(value),
      solve_steps=100,
    )

  inputs, expected = [], []
  for data, shift, _ in cases:
    ours, x = Reference(data), data['x']
    y = ours.minimiser(x)
    start = np.zeros(LOWER) if shift is None else y + shift
    inputs.append((data, start, y + 0.1))
    gap = ours.slopes(x, start)[0] - ours.slopes(x, y + 0.1)[0]
    penalised = ours.partial(x, start) + PENALTY * gap
    expected.append((ours.hypergradient(x), penalised))
  stacked = jax.tree.map(lambda *a: np.stack(a), *inputs)
  with jax.enable_x64(dtype == 'float64'):
    arrays = jax.tree.map(lambda a: jnp.asarray(a, dtype), stacked)
    found = jax.tree.map(np.asarray, jax.jit(jax.vmap(measure))(*arrays))
  for i, (_, _, condition) in enumerate(cases):
    slope, penalised = expected[i]
    away = jax.tree.map(lambda a, i=i: a[i], found)
    distance = np.linalg.norm(penalised - slope)
    # The penalty multiplies the rounding of two slopes.
    room = 30 * eps * condition + PENALTY * 10 * eps / distance
    size, our_size = np.linalg.norm(slope), np.linalg.norm(penalised)
    np.testing.assert_allclose(away.distance, distance, rtol=room)
    np.testing.assert_allclose(away.relative, distance / size, rtol=room)
    cosine = penalised @ slope / our_size / size
    np.testing.assert_allclose(away.cosine, cosine, atol=room)


# f = |y - c|^2 / 2 + |x|^2 / 2, g = (y - M x)' H (y - M x) / 2.
M = np.array([[1.0, 0.5], [-0.3, 2.0]])
H = np.array([[2.0, 0.4], [0.4, 1.0]])
C = np.array([1.0, -2.0])
X = np.array([0.7, -0.2])


def quadratic_lower(x, y, batch):
  error = y - M @ x
  return error @ H @ error / 2


QUADRATIC = bj.BilevelProblem(
  upper=lambda x, y, batch: ((y - C) ** 2).sum() / 2 + (x**2).sum() / 2,
  lower=quadratic_lower,
)


def test_the_distance_falls_as_the_inverse_penalty_and_shows_a_lag(x64):
  exact = M.T @ (M @ X - C) + X

  def measure(gamma, lag):
    # The penalised minimiser: (y - c) + gamma H (y - M x) = 0.
    matrix = jnp.eye(2) + gamma * H
    y = jnp.linalg.solve(matrix, C + gamma * H @ M @ X)
    found = bj.diagnostics.hypergradient_distance(
      QUADRATIC,
      bj.BilevelParams(jnp.asarray(X), y),
      penalty=gamma,
      value=jnp.asarray(M @ X) + lag,
      solve_steps=40,
    )
    return y, found

  gammas, lags = jnp.array([10.0, 100, 1000, 1000]), jnp.array([0, 0, 0, 0.01])
  y, found = jax.jit(jax.vmap(measure))(gammas, lags)
  # By hand: without a lag, the penalised slope is x + M' (y - c).
  away = np.linalg.norm((y[:3] - C) @ M + X - exact, axis=-1)
  np.testing.assert_allclose(found.distance[:3], away, rtol=1e-9)
  ratios = found.distance[:2] / found.distance[1:3]
  np.testing.assert_allclose(ratios, 10, rtol=0.15)
  np.testing.assert_allclose(found.cosine[2], 1, atol=1e-4)
  # gamma times the difference of the slopes in x, -M' H (0.01, 0.01).
  expected = 1000 * np.linalg.norm(M.T @ H @ np.full(2, 0.01))
  np.testing.assert_allclose(found.distance[3], expected, rtol=0.01)


def test_another_optimiser_gives_its_own_steps_and_the_gap(x64):
  params = bj.BilevelParams(jnp.asarray(X), jnp.array([3.0, 1.0]))
  given = {'optimiser': optax.sgd(0.4)}
  y = bj.diagnostics.lower_minimiser(QUADRATIC, params, steps=2, **given)
  expected = np.asarray(params.lower)
  for _ in range(2):
    expected = expected - 0.4 * H @ (expected - M @ X)
  np.testing.assert_allclose(y, expected, rtol=1e-12)
  gap = bj.diagnostics.penalty_gap(QUADRATIC, params, steps=300, **given)
  error = params.lower - M @ X
  np.testing.assert_allclose(gap, error @ H @ error / 2, rtol=1e-12)


@jax.custom_vjp
def cubed(z):
  return z**3


cubed.defvjp(lambda z: (z**3, z), lambda z, slope: (3 * z**2 * slope,))


@pytest.mark.slow
def test_small_gaps_and_slopes_are_no_rounding_in_float32(x64):
  """At the distance of a penalty of 1e5, of a loss of the order of one."""
  data = draw(0, 5)
  w = Reference(data).minimiser(data['x'])
  away = np.random.default_rng(1).normal(size=(LOWER,)) * 1e-5
  # Some losses have no forward derivatives.
  problem = bj.BilevelProblem(
    upper, lambda x, y, data: lower(x, y, data) + 1 + cubed(x[0])
  )

  @functools.partial(jax.jit, static_argnums=0)
  def measure(dtype):
    # In both precisions at the same points.
    cast = lambda a: jnp.asarray(a, jnp.float32).astype(dtype)
    params = bj.BilevelParams(cast(data['x']), as_tree(cast(w + away)))
    found = bj.diagnostics.hypergradient_distance(
      problem,
      params,
      jax.tree.map(cast, data),
      penalty=1e5,
      value=as_tree(cast(w)),
      solve_steps=60,
    )
    gap = bj.diagnostics.penalty_gap(
      problem, params, jax.tree.map(cast, data), steps=60
    )
    return gap, found.distance

  (gap, distance), exact = (measure(t) for t in (jnp.float32, jnp.float64))
  assert gap.dtype == distance.dtype == jnp.float32
  np.testing.assert_allclose(gap, exact[0], rtol=0.1)
  np.testing.assert_allclose(distance, exact[1], rtol=1e-3)


UNBOUNDED = {
  'linear': lambda x, y, batch: jnp.sum(y) - x,
  'concave': lambda x, y, batch: -jnp.sum((y - x) ** 2),
  'saddle': lambda x, y, batch: (y[0] - x) ** 2 - y[1] ** 2,
  'along_one_axis': lambda x, y, batch: 50 * (y[0] - x) ** 2 - y[1],
  'infinite': lambda x, y, batch: -jnp.exp(jnp.exp(jnp.sum(y**2))),
}
POINT = bj.BilevelParams(jnp.float32(1), jnp.array([0.5, 0.7]))


@pytest.mark.parametrize('name', UNBOUNDED)
def test_an_unbounded_lower_loss_is_said(name):
  problem = bj.BilevelProblem(UNBOUNDED[name], UNBOUNDED[name])
  call = functools.partial(
    bj.diagnostics.lower_minimiser,
    problem,
    steps=50,
    optimiser=None if name == 'along_one_axis' else optax.sgd(0.1),
  )
  with pytest.raises(ValueError, match='unbounded below, or far from its min'):
    call(POINT)
  if name != 'along_one_axis':
    assert np.all(np.isnan(jax.jit(call)(POINT)))


@pytest.mark.parametrize(
  'matrix',
  [
    [[1.0, 0, 0], [0, 2, 0], [0, 0, 0]],
    [[1.0, 1, 1], [1, 1, 1], [1, 1, 1]],
    [[1.0, 2, 0], [2, 1, 0], [0, 0, 1]],
    [[-1.0, 0, 0], [0, -2, 0], [0, 0, -3]],
    [[0.0, 0, 0], [0, 0, 0], [0, 0, 0]],
  ],
  ids=['zero', 'rank_one', 'indefinite', 'negative', 'linear'],
)
def test_a_hessian_that_is_not_positive_is_said(matrix):
  """Not [0, 0], which would read as stationary."""
  matrix = jnp.asarray(matrix)
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: jnp.sum((y - jnp.array([1.0, 2, 3])) ** 2),
    lower=lambda x, y, batch: y @ matrix @ y / 2 - jnp.vdot(x, y),
  )
  params = bj.BilevelParams(jnp.zeros(3), jnp.zeros(3))
  call = functools.partial(bj.diagnostics.hypergradient, problem)
  with pytest.raises(ValueError, match='singular or indefinite'):
    call(params)
  assert np.all(np.isnan(jax.jit(call)(params)))
  # With a system that can be solved, there is an answer.
  problem = problem._replace(lower=lambda x, y, batch: jnp.sum((y - x) ** 2))
  found = bj.diagnostics.hypergradient(problem, params)
  np.testing.assert_allclose(found, [-2, -4, -6], rtol=1e-6)


def test_a_singular_system_with_a_solution_has_a_hypergradient():
  """The minimisers are a line along which the upper loss is constant."""
  problem = bj.BilevelProblem(
    upper=lambda x, y, batch: (y[0] + 2 * y[1] - 1) ** 2,
    lower=lambda x, y, batch: (y[0] + 2 * y[1] - 3 * x) ** 2,
  )
  params = bj.BilevelParams(jnp.float32(1), jnp.array([1.0, 1.0]))
  # F(x) = (3 x - 1)^2.
  found = bj.diagnostics.hypergradient(problem, params)
  np.testing.assert_allclose(found, 12, rtol=1e-6)


def test_feasibility_is_the_distance_to_the_set():
  params = bj.BilevelParams(
    {'a': jnp.array([3.0, 4.0])}, jnp.array([-3.0, 0.5, -4.0])
  )
  found = bj.diagnostics.feasibility(
    params,
    upper=optax.projections.projection_l2_ball,
    lower=optax.projections.projection_non_negative,
  )
  np.testing.assert_allclose(found['upper'], 4.0, rtol=1e-6)
  np.testing.assert_allclose(found['lower'], 5.0, rtol=1e-6)


def test_feasibility_leaves_out_the_whole_space():
  params = bj.BilevelParams(jnp.ones(2), jnp.ones(2))
  assert bj.diagnostics.feasibility(params, upper=None) == {}


@pytest.mark.parametrize(
  'call',
  [
    bj.diagnostics.lower_minimiser,
    bj.diagnostics.penalty_gap,
    bj.diagnostics.hypergradient,
  ],
)
def test_a_lower_loss_that_is_no_scalar_is_named(call):
  problem = QUADRATIC._replace(lower=lambda x, y, batch: y)
  with pytest.raises(TypeError, match=r'the lower loss returned .*\(2,\)'):
    call(problem, bj.BilevelParams(jnp.ones(2), jnp.ones(2)))


def test_steps_are_whole_numbers():
  with pytest.raises(ValueError, match='steps >= 1, got 0'):
    bj.diagnostics.lower_minimiser(QUADRATIC, POINT, steps=0)
