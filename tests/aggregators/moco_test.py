"""MoCo: tracked gradients, precision, and the bias that it removes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from tests import rounding

A = bj.aggregators


def test_heads_are_neither_weighted_nor_tracked():
  params = bj.sequences(shared=jnp.zeros(2), head=jnp.zeros(3))
  link = A.moco(2, tracking=1.0, rest=('head',))
  state = link.init(params)
  rows = bj.Jacobian(
    params._replace(shared=jnp.eye(2), head=None), {'head': jnp.arange(3.0)}
  )
  direction, state = link.update(rows, state, params)
  np.testing.assert_allclose(direction.head, [0.0, 1.0, 2.0])
  assert state.tracked.head is None
  unlike = A.moco(2)
  with pytest.raises(ValueError, match='same `rest`'):
    unlike.update(rows, unlike.init(params), params)


def losses(x, batch):
  return jnp.stack([jnp.sum(x) + 0 * batch, jnp.sum(2 * x) + 0 * batch])


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_a_small_tracking_rate_is_not_lost_to_rounding(dtype):
  """After many updates the tracked gradients are the gradients."""
  settings = {'tracking': 0.002, 'weight_step': 1e-6}
  params = jnp.zeros(2, dtype)
  chained = optax.chain(bj.multi_objective(losses, 2), A.moco(2, **settings))
  fused = bj.oracles.fused_moco(losses, 2, **settings)
  for solver in (chained, fused):
    step = lambda state, _, s=solver: s.update(
      jnp.zeros([], dtype), state, params
    )[::-1]
    state, updates_per_step = jax.lax.scan(
      step, solver.init(params), length=4000
    )
    inner = state[1] if solver is chained else state.inner
    expected = 1 - 0.998**4000
    np.testing.assert_allclose(
      inner.tracked, expected * np.array([[1, 1], [2, 2]]), rtol=1e-3
    )
    assert inner.tracked.dtype == 'float32' and updates_per_step.dtype == dtype
  narrow = A.moco(2, accumulator_dtype=jnp.bfloat16).init(params)
  assert narrow.tracked.dtype == dtype


def test_schedules_keep_the_dtype_of_the_parameters(x64):
  share, step = 1 / 3, 1 / 7
  link = A.moco(2, tracking=lambda k: share, weight_step=lambda k: step)
  params = jnp.zeros(2)
  rows = np.array([[1.0, 0.5], [0.0, 2.0]])
  _, state = link.update(bj.Jacobian(jnp.asarray(rows)), link.init(params))
  tracked = share * rows
  room = rounding.tolerance(np.float64, 8)
  np.testing.assert_allclose(state.tracked, tracked, rtol=room)
  slope = tracked @ tracked.T @ [0.5, 0.5]
  moved = 0.5 - step * slope
  expected = moved + (1 - moved.sum()) / 2
  # About twenty operations on each side, and sums that double the error.
  room = rounding.tolerance(np.float64, 80)
  np.testing.assert_allclose(state.weights, expected, rtol=room)


def noisy(x, noise):
  centres = jnp.array([[2.0, 0.0], [-1.0, 1.0]])
  curves = jnp.array([[1.0, 0.3], [0.5, 2.0]])
  square = jnp.sum(curves * (x - centres) ** 2, axis=-1) / 2
  return square + noise.mean(0) @ x


def test_bias_falls_with_the_length_of_the_memory():
  """Without noise the tracked rows are 1 - (1 - a)^k times the true rows."""
  oracle, params = bj.multi_objective(noisy, 2), jnp.array([0.5, 0.5])
  link = A.moco(2, tracking=0.05, weight_step=1e-9)

  def measure():
    batches = jnp.zeros((100, 1, 2, 2))
    truth, _ = oracle.update(batches[0], oracle.init(params), params)
    updates_per_step = [
      bj.diagnostics.multi_gradient_bias(
        oracle, link, link.init(params), params, batches, truth, remember=keep
      ).at_own_weights
      for keep in (False, True)
    ]
    return jnp.stack(updates_per_step) / jnp.linalg.norm(truth.rows.mean(0))

  missing = [0.95, np.mean(0.95 ** np.arange(1, 101))]
  np.testing.assert_allclose(jax.jit(measure)(), missing, rtol=1e-4)


@pytest.mark.slow
def test_bias_falls_while_that_of_smg_does_not():
  """After many noisy batches at one point, the tracked rows are accurate."""
  oracle = bj.multi_objective(noisy, 2)
  params = jnp.array([0.5, 0.5])
  truth, _ = oracle.update(jnp.zeros((1, 2, 2)), oracle.init(params), params)
  draw = lambda seed, count: jax.random.normal(
    jax.random.key(seed), (count, 1, 2, 2)
  )
  biases, begin = {}, oracle.init(params)
  for name, link in {
    'smg': A.smg(2),
    'moco': A.moco(2, tracking=lambda k: 1 / (k + 1), weight_step=None),
  }.items():
    step = lambda state, noise, link=link: (
      link.update(oracle.update(noise, begin, params)[0], state, params)[1],
      None,
    )
    state, _ = jax.lax.scan(step, link.init(params), draw(0, 4000))
    measure = lambda state, link=link: bj.diagnostics.multi_gradient_bias(
      oracle, link, state, params, draw(1, 4096), truth
    )
    bias = jax.jit(measure)(state)
    biases[name] = float(bias.at_own_weights), float(bias.from_min_norm)
  assert biases['moco'][0] < biases['smg'][0] / 5
  assert biases['moco'][1] < biases['smg'][1] / 2


def test_composes_with_adam():
  oracle = bj.multi_objective(noisy, 2)
  solver = optax.chain(oracle, A.moco(2, tracking=0.5), optax.adam(0.1))
  start = jnp.array([5.0, -5.0])

  def step(carry, _):
    params, state = carry
    updates, state = solver.update(jnp.zeros((1, 2, 2)), state, params)
    return (optax.apply_updates(params, updates), state), None

  (params, state), _ = jax.lax.scan(
    step, (start, solver.init(start)), length=400
  )
  truth, _ = oracle.update(jnp.zeros((1, 2, 2)), oracle.init(params), params)
  assert bj.diagnostics.pareto_stationarity(truth) < 0.05
  np.testing.assert_allclose(
    bj.diagnostics.objective_weights(state).sum(), 1, rtol=1e-5
  )


def test_storage_is_one_row_for_each_objective():
  state = A.moco(3).init({'a': jnp.zeros((2, 5), jnp.bfloat16)})
  chex.assert_shape(state.tracked['a'], (3, 2, 5))
  assert state.weights.dtype == jnp.float32


def test_moco_plus_matches_numpy():
  """The second update corrects by its own batch at the previous point."""
  losses = lambda x, batch: batch * jnp.stack([x[0] ** 2, 3 * x[1] ** 2]) / 2
  slope = lambda x, batch: np.diag(batch * np.array([x[0], 3 * x[1]]))
  link = bj.solvers.moco_plus(losses, 2, decay=0.25, weight_step=None)
  here, there = np.array([1.0, -1.0]), np.array([0.5, 2.0])
  state = link.init(jnp.asarray(here))
  update = jax.jit(link.update)
  first, state = update(np.float32(2.0), state, jnp.asarray(here))
  rows = slope(here, 2.0)
  np.testing.assert_allclose(state[1].tracked, rows, rtol=1e-6)
  second, state = update(np.float32(4.0), state, jnp.asarray(there))
  rows = slope(there, 4.0) + 0.75 * (rows - slope(here, 4.0))
  np.testing.assert_allclose(state[1].tracked, rows, rtol=1e-6)
  np.testing.assert_allclose(second, state[1].weights @ rows, rtol=1e-5)
  assert bj.counts(state) == {'gradients/objectives': 8}
  assert np.abs(first - second).max() > 0.1


def test_moco_plus_also_corrects_heads():
  params = bj.sequences(shared=jnp.ones(2), head=jnp.ones(1))
  loss = lambda p, batch: jnp.sum(p.shared**2) * batch + p.head[0] ** 2 * batch
  link = bj.solvers.moco_plus([loss, loss], decay=0.5, rest=('head',))
  state, update = link.init(params), jax.jit(link.update)
  for batch in (1.0, 3.0):
    direction, state = update(jnp.float32(batch), state, params)
  # At one point, the mean of 4 (twice 2 * head * batch) and 12.
  np.testing.assert_allclose(direction.head, [8.0])
