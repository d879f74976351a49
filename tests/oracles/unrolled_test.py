"""The gradient through inner steps, in every mode, against references."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import bilevel_jax as bj
from tests import rounding

RATE, STEPS = 0.2, 7
H = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 1.5]])
B = np.array([[1.0, -0.5], [0.3, 0.8], [-0.7, 0.2]])


def upper(x, y, batch):
  return ((y - batch) ** 2).sum() / 2 + (x**2).sum() / 2 + x[0] * y[1]


def lower(x, y, batch):
  del batch
  return y @ H @ y / 2 - y @ B @ x


QUADRATIC = bj.BilevelProblem(upper, lower)
X, Y = np.array([0.7, -1.2]), np.array([0.1, 0.5, -0.3])
TARGET = np.array([1.0, 2.0, 3.0])


def closed_form(steps, last=None):
  """Y_T = M^T y_0 + sum of M^k rate B x, of which `last` terms count."""
  last = steps if last is None else min(last, steps)
  step = np.eye(3) - RATE * H
  y = Y.copy()
  for _ in range(steps):
    y = step @ y + RATE * B @ X
  jacobian = sum(
    np.linalg.matrix_power(step, k) @ (RATE * B) for k in range(last)
  )
  pull = y - TARGET + np.array([0, X[0], 0])
  return X + np.array([y[1], 0]) + jacobian.T @ pull, y


def oracle_of(problem=QUADRATIC, *, lower=None, steps=STEPS, **kwargs):
  more = {n: kwargs.pop(n) for n in ('batch_at', 'set') if n in kwargs}
  record = bj.Sequence(lower or optax.sgd(RATE), steps=steps, **more)
  return bj.unrolled(problem, lower=record, **kwargs)


def gradients_of(oracle, x, y, batch=None):
  params = bj.BilevelParams(x, y)
  return oracle.update(batch, oracle.init(params), params)[0]


def evaluate(problem=QUADRATIC, x=X, y=Y, batch=TARGET, **kwargs):
  """The oracle's gradients and state, in float64."""
  oracle = oracle_of(problem, **kwargs)
  with jax.enable_x64(True):
    params = bj.BilevelParams(jnp.asarray(x), jnp.asarray(y))
    update = jax.jit(lambda p, b: oracle.update(b, oracle.init(p), p))
    return jax.tree.map(np.asarray, update(params, batch))


@pytest.mark.parametrize(
  ('kwargs', 'gradients', 'products'),
  [
    ({}, STEPS, STEPS),
    ({'truncate': 3}, STEPS, 3),
    ({'checkpoint': 2}, 2 * STEPS, STEPS),
    ({'checkpoint': 50, 'truncate': 3}, STEPS + 3, 3),
    ({'mode': 'mixed', 'truncate': STEPS + 5}, STEPS, STEPS),
    ({'mode': 'mixed', 'truncate': 3, 'checkpoint': 2}, STEPS + 3, 3),
    ({'mode': 'forward'}, STEPS, 2 * STEPS),
    ({'mode': 'forward', 'truncate': 2}, STEPS, 4),
  ],
)
def test_quadratic_in_closed_form(kwargs, gradients, products):
  found, state = evaluate(**kwargs)
  slope, y = closed_form(STEPS, kwargs.get('truncate'))
  np.testing.assert_allclose(found.upper, slope, rtol=1e-12)
  np.testing.assert_allclose(Y - found.lower, y, rtol=1e-12)
  assert bj.counts(state) == {
    'gradients/upper': 1,
    'gradients/lower': gradients,
    'hessian_vector_products/lower': products,
  }
  values, before = bj.values(state), closed_form(STEPS - 1)[1]
  np.testing.assert_allclose(values['upper'], upper(X, y, TARGET), rtol=1e-6)
  np.testing.assert_allclose(values['lower'], lower(X, before, None), rtol=1e-6)


def test_many_steps_give_the_implicit_gradient():
  gradients, _ = evaluate(steps=400)
  y = np.linalg.solve(H, B @ X)
  pull = y - TARGET + np.array([0, X[0], 0])
  exact = X + np.array([y[1], 0]) + B.T @ np.linalg.solve(H, pull)
  np.testing.assert_allclose(gradients.upper, exact, rtol=1e-10)


# A dense coupled problem that is not quadratic: 3 upper, 2 lower coordinates.
COUPLING = np.array([[0.9, -0.4, 0.3], [0.2, 0.7, -0.8]])
FIRST, SECOND = np.array([0.3, -0.2, 0.5]), np.array([0.1, 0.4])
WEIGHTS = np.linspace(0.1, 0.5, STEPS)  # One for each inner step.
MOST = 0.35


def curved(x, y, weight):
  """The lower loss, with an auxiliary."""
  error = y - jnp.tanh(COUPLING @ x)
  mixed = y[0] * y[1] * x[2]
  return jnp.cosh(error).sum() + mixed + weight * (y**4).sum(), error


def height(x, y, library=jnp):
  return (library.sin(y) * y).sum() + x @ x / 2 + y[0] * x[1]


CURVED = bj.BilevelProblem(lambda x, y, batch: height(x, y), curved)


def schedule(k):
  return 0.3 - 0.02 * k


def momentum(slope, state, k):
  state = 0.5 * state + slope
  return -schedule(0) * state, state  # A schedule counts updates.


def adam(slope, state, k):
  mean, square = state if np.ndim(state) else (0, 0)
  mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
  lengths = np.sqrt(square / (1 - 0.999 ** (k + 1)) + 1e-4) + 1e-8
  move = -0.1 * mean / (1 - 0.9 ** (k + 1)) / lengths
  return move, np.array([mean, square])


INNER = {
  momentum: optax.sgd(schedule, momentum=0.5),
  adam: optax.adam(0.1, eps_root=1e-4),
}


def by_complex_step(optimiser):
  """The hypergradient in NumPy, exact to rounding: Im f(x + i h e) / h."""

  def end(x):
    y, state = SECOND.astype(complex), 0
    for k, weight in enumerate(WEIGHTS):
      slope = np.sinh(y - np.tanh(COUPLING @ x))
      slope = slope + x[2] * y[::-1] + 4 * weight * y**3
      move, state = optimiser(slope, state, k)
      y = np.where((y + move).real > MOST, MOST, y + move)
    return height(x, y, np)

  h = 1e-30
  return np.array([end(FIRST + 1j * h * e).imag / h for e in np.eye(3)])


@pytest.mark.parametrize(
  ('optimiser', 'modes'),
  [(momentum, ('mixed', 'forward')), (adam, ('mixed', 'reverse'))],
)
def test_modes_against_a_complex_step(optimiser, modes):
  oracles = [
    oracle_of(
      CURVED,
      lower=INNER[optimiser],
      batch_at=lambda batch, t: batch[t],
      set=lambda y: jnp.minimum(y, MOST),
      mode=mode,
    )
    for mode in modes
  ]
  found = lambda *point: [gradients_of(o, *point) for o in oracles]
  exact = by_complex_step(optimiser)
  for x64, tolerance in ((True, 1e-12), (False, 1e-6)):
    with jax.enable_x64(x64):
      point = [jnp.asarray(z) for z in (FIRST, SECOND, WEIGHTS)]
      for gradients in jax.jit(found)(*point):
        assert np.max(SECOND - gradients.lower) > MOST - 1e-6  # On the bound.
        chex.assert_trees_all_close(
          np.asarray(gradients.upper), exact, rtol=tolerance, atol=tolerance
        )


def noisy(x, y, batch):
  """A lower loss with a key and a whole number in its batch."""
  noise = jax.random.key_data(batch['key']) / 2.0**32  # Cheap to compile.
  return curved(x, y + 0.1 * (noise + batch['row']), batch['weight'])


def by_hand(x, y, batch):
  """Two inner steps in a plain loop, to the upper loss at their end."""
  y, optimiser = y + 2 * x[:2], optax.sgd(schedule(0), momentum=0.5)
  state = optimiser.init(y)
  for t in range(2):
    one = jax.tree.map(lambda leaf, t=t: leaf[t], batch)
    slope = jax.grad(noisy, 1, has_aux=True)(x, y, one)[0]
    updates, state = optimiser.update(slope, state, y)
    y = optax.apply_updates(y, updates)
  return height(x, y)


def test_mixed_against_a_plain_loop():
  oracle = oracle_of(
    bj.BilevelProblem(CURVED.upper, noisy),
    mode='mixed',
    lower=INNER[momentum],
    steps=2,
    batch_at=lambda batch, t: jax.tree.map(lambda leaf: leaf[t], batch),
    start=lambda params, batch: params.lower + 2 * params.upper[:2],
    checkpoint=1,
  )
  both = lambda *at: (gradients_of(oracle, *at).upper, jax.grad(by_hand)(*at))
  for x64, tolerance in ((True, 1e-12), (False, 1e-6)):
    with jax.enable_x64(x64):
      batch = {
        'key': jax.random.split(jax.random.key(0), (2, 2)),
        'row': jnp.arange(4).reshape(2, 2),
        'weight': jnp.asarray(WEIGHTS[:4]).reshape(2, 2),
      }
      x, y = jnp.asarray([FIRST, -FIRST]), jnp.asarray([SECOND, SECOND])
      found, exact = jax.jit(jax.vmap(both))(x, y, batch)
      chex.assert_trees_all_close(found, exact, rtol=tolerance, atol=tolerance)


def test_mixed_in_a_loss_that_closes_over_what_is_traced():
  table = np.array([0.5, 1.0, 2.0])

  def slopes(mode, scale, row):
    lower = lambda x, y, batch: curved(x, y, scale)[0] * jnp.asarray(table)[row]
    problem = bj.BilevelProblem(CURVED.upper, lower)
    oracle = oracle_of(problem, mode=mode, steps=2)
    return gradients_of(oracle, jnp.asarray(FIRST), jnp.asarray(SECOND)).upper

  def with_derivative(mode, scale, row):
    one = lambda scale: slopes(mode, scale, row)
    return jax.jvp(one, (scale,), (1.0,))

  scales, rows = np.float32([0.1, 0.3]), np.array([2, 0])
  mixed, reverse = (
    jax.jit(jax.vmap(functools.partial(with_derivative, mode)))(scales, rows)
    for mode in ('mixed', 'reverse')
  )
  chex.assert_trees_all_close(mixed, reverse, rtol=1e-5)


def test_mixed_on_shards():
  def loss(x, y, batch):
    return curved(x, y, batch.mean())[0]

  problem = bj.BilevelProblem(lambda x, y, b: height(x, y) + y @ b, loss)
  mesh = jax.sharding.Mesh(jax.devices()[:2], 'i')
  split = PartitionSpec('i')

  def found(x, y, batch):
    slopes = [
      gradients_of(oracle_of(problem, steps=2, mode=mode), x, y, batch)
      for mode in ('mixed', 'reverse')
    ]
    return [(g.upper, g.lower[None]) for g in slopes]

  everywhere = PartitionSpec()
  found = jax.jit(
    jax.shard_map(
      found,
      mesh=mesh,
      in_specs=(everywhere, everywhere, split),
      out_specs=[(everywhere, split)] * 2,
    )
  )
  batch = np.float32([0.1, 0.3, 0.2, 0.5])
  mixed, reverse = found(np.float32(FIRST), np.float32(SECOND), batch)
  chex.assert_trees_all_close(mixed, reverse, rtol=1e-6)


def test_starts_where_it_is_told_and_differentiates_it():
  x = np.array([0.3, -0.2, 0.5])
  problem = bj.BilevelProblem(
    lambda x, y, batch: (y - batch) @ (y - batch) / 2,
    lambda x, y, batch: y @ H @ y / 2,
  )
  gradients, _ = evaluate(
    problem, x=x, start=lambda params, batch: params.upper
  )
  power = np.linalg.matrix_power(np.eye(3) - RATE * H, STEPS)
  np.testing.assert_allclose(Y - gradients.lower, power @ x, rtol=1e-12)
  np.testing.assert_allclose(
    gradients.upper, power.T @ (power @ x - TARGET), rtol=1e-12
  )


def test_temporary_memory_of_the_modes():
  rows = np.ones((1000, 1), np.float32)

  def wide(x, y, batch):  # Many more activations than parameters.
    return jnp.tanh(jnp.tanh(rows * y) * x).sum()

  problem = bj.BilevelProblem(lambda x, y, batch: (y**2).sum(), wide)
  params = bj.BilevelParams(jnp.ones(10), jnp.ones(10))

  def memory(**kwargs):
    oracle = oracle_of(problem, steps=50, **kwargs)
    state = oracle.init(params)
    compiled = jax.jit(oracle.update).lower(None, state, params).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  full, again, mixed = memory(), memory(checkpoint=7), memory(mode='mixed')
  assert again < full / 4
  assert mixed < again / 4


@pytest.mark.parametrize(
  ('kwargs', 'said'),
  [
    ({'steps': 0}, 'steps >= 1'),
    ({'truncate': 0}, 'truncate, >= 1'),
    ({'checkpoint': 1.5}, 'checkpoint >= 1'),
    ({'mode': 'sideways'}, "'reverse', 'mixed' or 'forward'"),
    ({'mode': 'forward', 'checkpoint': 1}, 'leave it out'),
    ({'start': lambda params, batch: params.upper}, 'shapes'),
    ({'lower': optax.lbfgs()}, "'value_fn'.*linesearch=None"),
    (
      {'lower': optax.polyak_sgd()},
      "'value'.*more than a gradient|more than a gradient.*'value'",
    ),
  ],
)
def test_errors_name_the_argument(kwargs, said):
  with pytest.raises((ValueError, TypeError), match=said):
    evaluate(**kwargs)


def test_an_optimisers_own_type_error_passes():
  def update(updates, state, params=None):
    raise TypeError('of another kind')

  broken = optax.GradientTransformation(lambda params: (), update)
  with pytest.raises(TypeError, match=r'^of another kind'):
    evaluate(lower=broken)


def test_keeps_a_nested_structure_and_its_types():
  problem = bj.BilevelProblem(
    lambda x, y, batch: (y['w'] ** 2).sum() + x['a'] * x['b'][0],
    lambda x, y, batch: ((y['w'] - x['a']) ** 2).sum() + x['b'].sum(),
  )
  params = bj.BilevelParams(
    {'a': jnp.float32(1.0), 'b': jnp.ones(2, jnp.bfloat16)},
    {'w': jnp.full((2, 2), 0.5, jnp.bfloat16)},
  )

  def found(x, y):
    settings = {'lower': INNER[adam], 'steps': 2}
    return [
      gradients_of(oracle_of(problem, mode=mode, **settings), x, y)
      for mode in ('reverse', 'mixed', 'forward')
    ]

  reverse, mixed, forward = jax.jit(found)(*params)
  chex.assert_trees_all_equal_shapes_and_dtypes(reverse, mixed, forward, params)
  # A step rounds in its slope (2), Adam's two moments (2 each), their two
  # corrections, root, quotient and rate (5) and the sum (1): 12 times, and the
  # way of its derivative as often. Of both steps and both modes, 96 times at
  # most, where a processor rounds each operation to bfloat16.
  rtol = rounding.tolerance(jnp.bfloat16, 96)
  chex.assert_trees_all_close(reverse, mixed, rtol=rtol)
  chex.assert_trees_all_close(reverse, forward, rtol=rtol)


def test_sums_over_many_steps_are_wide():
  problem = bj.BilevelProblem(lambda x, y, _: y, lambda x, y, _: -x * y)
  point = jnp.bfloat16(1.0), jnp.float32(0.0)
  for mode in ('reverse', 'mixed'):
    settings = {'lower': optax.sgd(2.0**-10), 'steps': 2**10, 'mode': mode}
    found = gradients_of(oracle_of(problem, **settings), *point).upper
    assert found.dtype == jnp.bfloat16
    assert found == 1
  narrow = oracle_of(problem, accumulator_dtype=jnp.bfloat16, **settings)
  assert gradients_of(narrow, *point).upper < 0.5
