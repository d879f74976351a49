"""Stationarity, cosines, weights and bias, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj


@pytest.mark.slow
def test_stationary_where_gradients_oppose():
  rows = jnp.array([[2.0, 0.0], [-1.0, 0.0], [0.0, 5.0]])
  np.testing.assert_allclose(
    bj.diagnostics.pareto_stationarity(bj.Jacobian(rows)), 0, atol=1e-3
  )
  np.testing.assert_allclose(
    bj.diagnostics.pareto_stationarity(bj.Jacobian(jnp.eye(4) * 3)),
    1.5,
    rtol=1e-5,
  )


def test_cosines_of_a_tree_and_of_a_vanishing_gradient():
  rows = {'a': jnp.array([[3.0], [0.0], [0.0]]), 'b': jnp.zeros((3, 2))}
  rows['b'] = rows['b'].at[:2, 0].set(4.0)
  cosines = bj.diagnostics.conflict_cosines(bj.Jacobian(rows))
  np.testing.assert_allclose(
    cosines, [[1, 0.8, 0], [0.8, 1, 0], [0, 0, 0]], atol=1e-6
  )


def test_weights_are_found_at_any_depth():
  losses = lambda x, b: jnp.stack([x @ x, x.sum(), 3 * x[0]])
  params = jnp.zeros(2)
  for solver in (
    optax.chain(
      bj.multi_objective(losses, 3), bj.aggregators.mgda(3), optax.adam(1.0)
    ),
    bj.oracles.fused_moco(losses, 3),
    bj.solvers.famo(losses, 3, optimiser=optax.sgd(1.0)),
    optax.chain(
      optax.chain(bj.multi_objective(losses, 3), bj.aggregators.moco(3))
    ),
  ):
    np.testing.assert_allclose(
      bj.diagnostics.objective_weights(solver.init(params)),
      [1 / 3] * 3,
      rtol=1e-6,
    )
  with pytest.raises(ValueError, match='has weights'):
    bj.diagnostics.objective_weights(optax.adam(1.0).init(params))


def test_bias_of_shortest_combinations_is_what_sampling_says():
  """Rows (1 + noise, 0) and (0, 1 + noise): directions average by hand."""
  losses = lambda x, noise: (1 + noise) * x
  noise = jnp.array([[0.5, -0.5], [-0.5, 0.5]])
  oracle, link = bj.multi_objective(losses, 2), bj.aggregators.smg(2)
  params = jnp.zeros(2)
  bias = bj.diagnostics.multi_gradient_bias(
    oracle,
    link,
    link.init(params),
    params,
    noise,
    bj.Jacobian(jnp.eye(2)),
  )
  # Weights (0.1, 0.9) and (0.9, 0.1): directions (0.15, 0.45), (0.45, 0.15).
  np.testing.assert_allclose(bias.direction, 0.3 * 2**0.5, rtol=1e-5)
  np.testing.assert_allclose(bias.at_own_weights, 0.2 * 2**0.5, rtol=1e-5)
  np.testing.assert_allclose(bias.from_min_norm, 0.2 * 2**0.5, rtol=1e-5)
  np.testing.assert_allclose(bias.noise, 0.15 * 2**0.5, rtol=1e-4)
  assert jax.tree.leaves(bias)[0].shape == ()
