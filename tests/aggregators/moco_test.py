"""MoCo by hand, its variants, and the bias that it removes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj


def simplex(v):
  """Projection on the simplex, by bisection."""
  low, high = v.min() - 1, v.max()
  for _ in range(200):
    middle = (low + high) / 2
    low, high = (
      (middle, high) if np.maximum(v - middle, 0).sum() > 1 else (low, middle)
    )
  return np.maximum(v - low, 0)


@pytest.mark.parametrize('radius', [None, 1.5])
def test_three_updates_by_hand(radius):
  rng = np.random.default_rng(0)
  beta, gamma, rho = [0.9, 0.5, 0.3], [0.2, 0.1, 0.4], 0.05
  link = bj.aggregators.moco(
    2,
    tracking=lambda count: jnp.asarray(beta)[count],
    weight_step=lambda count: jnp.asarray(gamma)[count],
    regularisation=rho,
    radius=radius,
  )
  params = jnp.zeros(4)
  state = link.init(params)
  tracked, weights = np.zeros((2, 4)), np.full(2, 0.5)
  for k in range(3):
    rows = rng.normal(size=(2, 4))
    found, state = link.update(bj.Jacobian(jnp.asarray(rows)), state, params)
    tracked = tracked + beta[k] * (rows - tracked)
    if radius is not None:
      norms = np.linalg.norm(tracked, axis=1, keepdims=True)
      tracked = tracked * np.minimum(1, radius / norms)
    slope = tracked @ tracked.T @ weights + rho * weights
    weights = simplex(weights - gamma[k] * slope)
    np.testing.assert_allclose(state.tracked, tracked, atol=1e-5)
    np.testing.assert_allclose(state.weights, weights, atol=1e-5)
    np.testing.assert_allclose(found, weights @ tracked, atol=1e-5)


def test_exact_weights_are_of_least_norm_and_regularisation_levels_them():
  rows = bj.Jacobian(jnp.array([[4.0, 0.0], [0.0, 1.0]]))
  params = jnp.zeros(2)

  def weights(rho):
    link = bj.aggregators.moco(2, tracking=1.0, exact=True, regularisation=rho)
    return link.update(rows, link.init(params), params)[1].weights

  np.testing.assert_allclose(weights(0.0), [1 / 17, 16 / 17], rtol=1e-5)
  np.testing.assert_allclose(weights(1e6), [0.5, 0.5], atol=1e-4)


def test_radii_may_differ_by_objective():
  link = bj.aggregators.moco(2, tracking=1.0, radius=[1.0, 3.0])
  params = {'a': jnp.zeros(1), 'b': jnp.zeros(1)}
  rows = {'a': jnp.array([[3.0], [3.0]]), 'b': jnp.array([[4.0], [4.0]])}
  _, state = link.update(bj.Jacobian(rows), link.init(params), params)
  norms = np.hypot(state.tracked['a'], state.tracked['b']).ravel()
  np.testing.assert_allclose(norms, [1.0, 3.0], rtol=1e-6)


def test_tracking_above_one_is_one():
  rows = bj.Jacobian(jnp.eye(2))
  link = bj.aggregators.moco(2, tracking=lambda count: 5.0)
  _, state = link.update(rows, link.init(jnp.zeros(2)))
  np.testing.assert_allclose(state.tracked, np.eye(2))


def test_local_tracking_moves_once_for_each_sample():
  link = bj.aggregators.moco(1, tracking=0.5, samples=3)
  rows = bj.Jacobian(jnp.array([[8.0], [4.0], [2.0]]))
  direction, state = link.update(rows, link.init(jnp.zeros(1)))
  np.testing.assert_allclose(state.tracked, [[3.0]])
  np.testing.assert_allclose(direction, [3.0])


def test_heads_go_past_untouched_and_are_not_tracked():
  params = bj.sequences(shared=jnp.zeros(2), head=jnp.zeros(3))
  link = bj.aggregators.moco(2, tracking=1.0, rest=('head',))
  state = link.init(params)
  assert state.tracked.head is None
  rows = bj.Jacobian(
    params._replace(shared=jnp.eye(2), head=None), {'head': jnp.arange(3.0)}
  )
  direction, state = link.update(rows, state, params)
  np.testing.assert_allclose(direction.head, [0.0, 1.0, 2.0])
  assert state.tracked.head is None
  unlike = bj.aggregators.moco(2)
  with pytest.raises(ValueError, match='same `rest`'):
    unlike.update(rows, unlike.init(params), params)


def noisy(x, noise):
  centres = jnp.array([[2.0, 0.0], [-1.0, 1.0]])
  curves = jnp.array([[1.0, 0.3], [0.5, 2.0]])
  square = jnp.sum(curves * (x - centres) ** 2, axis=-1) / 2
  return square + noise.mean(0) @ x


def test_bias_over_batches_that_the_memory_keeps_or_forgets():
  """Without noise the memory is a share 1 - (1 - a)^k of the true rows."""
  oracle = bj.multi_objective(noisy, 2)
  params = jnp.array([0.5, 0.5])
  batches = jnp.zeros((100, 1, 2, 2))
  truth, _ = oracle.update(batches[0], oracle.init(params), params)
  link = bj.aggregators.moco(2, tracking=0.05, exact=True)
  direction, _ = bj.aggregators.mgda(2).update(
    truth, bj.aggregators.mgda(2).init(params), params
  )
  length = float(jnp.linalg.norm(direction))
  for remember, missing in {
    False: 0.95,
    True: np.mean(0.95 ** np.arange(1, 101)),
  }.items():
    bias = bj.diagnostics.multi_gradient_bias(
      oracle, link, link.init(params), params, batches, truth, remember=remember
    )
    np.testing.assert_allclose(bias.at_own_weights, missing * length, rtol=1e-4)


def test_bias_falls_while_that_of_smg_does_not():
  """At one point, after many noisy batches: the tracked rows are true ones."""
  oracle = bj.multi_objective(noisy, 2)
  params = jnp.array([0.5, 0.5])
  truth, _ = oracle.update(jnp.zeros((1, 2, 2)), oracle.init(params), params)
  draw = lambda seed, count: jax.random.normal(
    jax.random.key(seed), (count, 1, 2, 2)
  )
  biases, begin = {}, oracle.init(params)
  for name, link in {
    'smg': bj.aggregators.smg(2),
    'moco': bj.aggregators.moco(2, tracking=lambda k: 1 / (k + 1), exact=True),
  }.items():
    step = lambda state, noise, link=link: (
      link.update(oracle.update(noise, begin, params)[0], state, params)[1],
      None,
    )
    state, _ = jax.lax.scan(step, link.init(params), draw(0, 4000))
    bias = bj.diagnostics.multi_gradient_bias(
      oracle, link, state, params, draw(1, 4096), truth
    )
    biases[name] = float(bias.at_own_weights), float(bias.from_min_norm)
    kept = bj.diagnostics.multi_gradient_bias(
      oracle, link, state, params, draw(1, 4096), truth, remember=True
    )
    biases[f'{name}, kept'] = float(kept.at_own_weights)
  np.testing.assert_allclose(biases['smg, kept'], biases['smg'][0], rtol=1e-4)
  assert biases['moco, kept'] < biases['smg'][0] / 5
  assert biases['moco'][0] < biases['smg'][0] / 5
  assert biases['moco'][1] < biases['smg'][1] / 2


def test_composes_with_adam_and_follows_the_optimiser():
  oracle = bj.multi_objective(noisy, 2)
  solver = optax.chain(
    oracle, bj.aggregators.moco(2, tracking=0.5), optax.adam(0.1)
  )
  params = jnp.array([5.0, -5.0])
  state = solver.init(params)
  step = jax.jit(solver.update)
  for _ in range(400):
    updates, state = step(jnp.zeros((1, 2, 2)), state, params)
    params = optax.apply_updates(params, updates)
  truth, _ = oracle.update(jnp.zeros((1, 2, 2)), oracle.init(params), params)
  assert bj.diagnostics.pareto_stationarity(truth) < 0.05
  np.testing.assert_allclose(
    bj.diagnostics.objective_weights(state).sum(), 1, rtol=1e-5
  )


def test_storage_is_one_row_for_each_objective():
  state = bj.aggregators.moco(3).init({'a': jnp.zeros((2, 5), jnp.bfloat16)})
  chex.assert_shape(state.tracked['a'], (3, 2, 5))
  assert state.tracked['a'].dtype == jnp.bfloat16
  assert state.weights.dtype == jnp.float32


def test_moco_plus_by_hand():
  """Two updates: the second corrects by its own batch at the point before."""
  losses = lambda x, batch: batch * jnp.stack([x[0] ** 2, 3 * x[1] ** 2]) / 2
  slope = lambda x, batch: np.diag(batch * np.array([x[0], 3 * x[1]]))
  link = bj.solvers.moco_plus(losses, 2, decay=0.25, exact=True)
  here, there = np.array([1.0, -1.0]), np.array([0.5, 2.0])
  state = link.init(jnp.asarray(here))
  first, state = link.update(np.float32(2.0), state, jnp.asarray(here))
  rows = slope(here, 2.0)
  np.testing.assert_allclose(state[1].tracked, rows, rtol=1e-6)
  second, state = link.update(np.float32(4.0), state, jnp.asarray(there))
  rows = slope(there, 4.0) + 0.75 * (rows - slope(here, 4.0))
  np.testing.assert_allclose(state[1].tracked, rows, rtol=1e-6)
  np.testing.assert_allclose(second, state[1].weights @ rows, rtol=1e-5)
  assert bj.counts(state) == {'gradients/objectives': 8}
  assert np.abs(first - second).max() > 0.1


def test_moco_plus_corrects_heads_too():
  params = bj.sequences(shared=jnp.ones(2), head=jnp.ones(1))
  loss = lambda p, batch: jnp.sum(p.shared**2) * batch + p.head[0] ** 2 * batch
  link = bj.solvers.moco_plus([loss, loss], decay=0.5, rest=('head',))
  state = link.init(params)
  for batch in (1.0, 3.0):
    direction, state = link.update(jnp.float32(batch), state, params)
  # At one point: the mean of 4 (twice 2 * head * batch) and 12 by halves.
  np.testing.assert_allclose(direction.head, [8.0])
