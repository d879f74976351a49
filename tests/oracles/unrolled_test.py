"""The gradient through inner steps, in every mode, against closed forms."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

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


def closed_form(steps, last=None, identity_start=False):
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


def evaluation(problem=QUADRATIC, **kwargs):
  """A compiled function of (x, y, batch) to the oracle's gradients, state."""
  settings = {'lower': optax.sgd(RATE), 'steps': STEPS} | kwargs
  oracle = bj.unrolled(problem, **settings)
  update = jax.jit(lambda p, batch: oracle.update(batch, oracle.init(p), p))

  def evaluate(x=X, y=Y, batch=TARGET):
    with jax.enable_x64(True):
      params = bj.BilevelParams(jnp.asarray(x), jnp.asarray(y))
      gradients, state = update(params, jnp.asarray(batch))
      return jax.tree.map(np.asarray, gradients), state

  return evaluate


def evaluate(problem=QUADRATIC, x=X, y=Y, batch=TARGET, **kwargs):
  return evaluation(problem, **kwargs)(x, y, batch)


MODES = {
  'reverse': {},
  'forward': {'mode': 'forward'},
  'every step twice': {'checkpoint': 1},
  'in segments': {'checkpoint': 3},
  'one segment': {'checkpoint': 50},
}
modes = pytest.mark.parametrize('mode', MODES.values(), ids=list(MODES))


@modes
@pytest.mark.parametrize('truncate', [None, 3, STEPS + 5])
def test_quadratic_in_closed_form(mode, truncate):
  gradients, _ = evaluate(truncate=truncate, **mode)
  slope, y = closed_form(STEPS, truncate)
  np.testing.assert_allclose(gradients.upper, slope, rtol=1e-12)
  np.testing.assert_allclose(Y - gradients.lower, y, rtol=1e-12)


def test_many_steps_give_the_implicit_gradient():
  gradients, _ = evaluate(steps=400)
  y = np.linalg.solve(H, B @ X)
  pull = y - TARGET + np.array([0, X[0], 0])
  exact = X + np.array([y[1], 0]) + B.T @ np.linalg.solve(H, pull)
  np.testing.assert_allclose(gradients.upper, exact, rtol=1e-10)


def test_error_of_truncation_falls_geometrically():
  full = evaluate(steps=60)[0].upper
  errors = [
    np.linalg.norm(evaluate(steps=60, truncate=k)[0].upper - full)
    for k in (5, 15, 25)
  ]
  slowest = 1 - RATE * np.linalg.eigvalsh(H)[0]
  for one, two in itertools.pairwise(errors):
    assert two < 2 * slowest**10 * one


def curved(x, y, batch):
  """Not quadratic, another curvature at each step."""
  error = jnp.tanh(B @ x) - y
  return (jnp.cosh(error) + batch * y**4).sum()


CURVED = bj.BilevelProblem(lambda x, y, batch: (jnp.sin(y) * y).sum(), curved)
INNER = {
  'momentum': optax.sgd(0.1, momentum=0.5),
  'adam': optax.adam(0.1, eps_root=1e-6),
  'schedule': optax.sgd(optax.linear_schedule(0.3, 0.05, STEPS)),
}


@pytest.mark.parametrize(
  ('mode', 'inner'),
  [('reverse', 'momentum'), ('forward', 'adam'), ('in segments', 'schedule')],
)
def test_finite_differences(mode, inner):
  inner, mode = INNER[inner], MODES[mode]
  settings = {
    'problem': CURVED,
    'lower': inner,
    'inner_batch': lambda batch, t: batch[t],
    'lower_set': functools.partial(
      optax.projections.projection_box, lower=-10.0, upper=0.4
    ),
    **mode,
  }
  batch = np.linspace(0.1, 0.5, STEPS)
  evaluate = evaluation(**settings)
  found = evaluate(batch=batch)[0].upper

  def value(x):
    gradients, _ = evaluate(x=x, batch=batch)
    return float((np.sin(Y - gradients.lower) * (Y - gradients.lower)).sum())

  differences = [
    (value(X + 1e-5 * e) - value(X - 1e-5 * e)) / 2e-5 for e in np.eye(2)
  ]
  np.testing.assert_allclose(found, differences, rtol=1e-6, atol=1e-9)


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


@pytest.mark.parametrize(
  ('kwargs', 'gradients', 'products'),
  [
    ({}, STEPS, STEPS),
    ({'truncate': 3}, STEPS, 3),
    ({'checkpoint': 2}, 2 * STEPS, STEPS),
    ({'checkpoint': 2, 'truncate': 3}, STEPS + 3, 3),
    ({'mode': 'forward'}, STEPS, 2 * STEPS),
    ({'mode': 'forward', 'truncate': 2}, STEPS, 4),
  ],
)
def test_counts(kwargs, gradients, products):
  assert bj.counts(evaluate(**kwargs)[1]) == {
    'gradients/upper': 1,
    'gradients/lower': gradients,
    'hessian_vector_products/lower': products,
  }


def test_checkpoints_need_less_memory():
  wide = bj.BilevelProblem(
    lambda x, y, batch: (y**2).sum(),
    lambda x, y, batch: (jnp.tanh(y) * jnp.sin(x) + y**2).sum(),
  )
  params = bj.BilevelParams(jnp.ones(1000), jnp.ones(1000))

  def memory(**kwargs):
    oracle = bj.unrolled(wide, lower=optax.sgd(0.1), steps=100, **kwargs)
    state = oracle.init(params)
    compiled = jax.jit(oracle.update).lower(None, state, params).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert memory(checkpoint=10) < memory(checkpoint=1) < memory()
  assert memory(mode='reverse', truncate=10) < memory() / 4


def test_measures_the_losses():
  _, state = evaluate()
  y, before = closed_form(STEPS)[1], closed_form(STEPS - 1)[1]
  values = bj.values(state)
  np.testing.assert_allclose(values['upper'], upper(X, y, TARGET), rtol=1e-6)
  np.testing.assert_allclose(values['lower'], lower(X, before, None), rtol=1e-6)


@pytest.mark.parametrize(
  ('kwargs', 'said'),
  [
    ({'steps': 0}, 'steps >= 1'),
    ({'truncate': 0}, 'truncate >= 1'),
    ({'checkpoint': 1.5}, 'checkpoint >= 1'),
    ({'mode': 'sideways'}, 'forward'),
    ({'mode': 'forward', 'checkpoint': 1}, 'reverse'),
    ({'start': lambda params, batch: params.upper}, 'another|shapes'),
  ],
)
def test_errors_name_the_argument(kwargs, said):
  with pytest.raises(ValueError, match=said):
    evaluate(**kwargs)


def test_keeps_a_nested_structure_and_its_types():
  problem = bj.BilevelProblem(
    lambda x, y, batch: (y['w'] ** 2).sum() + x['a'] * x['b'][0],
    lambda x, y, batch: ((y['w'] - x['a']) ** 2).sum() + x['b'].sum(),
  )
  params = bj.BilevelParams(
    {'a': jnp.bfloat16(1.0), 'b': jnp.ones(2)}, {'w': jnp.ones((2, 2))}
  )
  found = {}
  for mode in ('reverse', 'forward'):
    oracle = bj.unrolled(problem, lower=optax.sgd(0.1), steps=2, mode=mode)
    found[mode], _ = oracle.update(None, oracle.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(found[mode], params)
  chex.assert_trees_all_close(found['reverse'], found['forward'], rtol=1e-2)
