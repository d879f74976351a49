"""The optimal policy: value iteration in NumPy, derivatives, ties, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from tests import problems
from tests.rl import reference

GAMMA = 0.9


def small_mdp(dtype=jnp.float64, seed=0):
  moves, rewards, first, _ = reference.process(seed)
  cast = lambda x: jnp.asarray(x, dtype)
  return bj.rl.MDP(cast(moves), cast(rewards), cast(GAMMA), cast(first))


@pytest.mark.parametrize('heat', [0, 0.3, 1e-3])
@pytest.mark.parametrize('dtype', ['float64', 'float32'])
def test_optimum_matches_value_iteration(heat, dtype):
  moves, rewards, _, _ = reference.process()
  wanted = reference.best_values(moves, rewards, GAMMA, heat)
  with jax.enable_x64(dtype == 'float64'):
    best = jax.jit(lambda mdp: bj.rl.optimal(mdp, heat))(small_mdp(dtype))
    rtol = 1e-10 if dtype == 'float64' else 2e-5
    np.testing.assert_allclose(best.values, wanted, rtol=rtol)
    q = rewards + GAMMA * moves @ wanted
    np.testing.assert_allclose(best.action_values, q, rtol=rtol, atol=1e-5)
    greedy = np.eye(3)[q.argmax(1)]
    if heat:
      scaled = np.exp((q - q.max(1, keepdims=True)) / heat)
      greedy = scaled / scaled.sum(1, keepdims=True)
    np.testing.assert_allclose(
      best.policy, greedy, atol=1e-8 if dtype == 'float64' else 2e-2
    )
    assert best.values.dtype == best.policy.dtype == jnp.dtype(dtype)
    assert best.residual < (1e-12 if dtype == 'float64' else 2e-5)
    assert 1 <= best.iterations < 20


def test_no_policy_is_better(x64):
  mdp = small_mdp()
  for heat in (0, 0.5):
    best = jax.jit(bj.rl.optimal, static_argnums=1)(mdp, heat)
    logits = 3 * jax.random.normal(jax.random.key(0), (200, 5, 3))
    q = lambda z, heat=heat: bj.rl.state_values(mdp, jax.nn.softmax(z), heat)
    others = jax.jit(jax.vmap(q))
    assert np.all(others(logits) <= best.values + 1e-12)


@pytest.mark.slow
def test_derivatives_of_values_and_policy_match_differences(x64):
  mdp, mix = small_mdp(), jax.random.normal(jax.random.key(1), (5, 3))

  def scalar(mdp):
    best = bj.rl.optimal(mdp, 0.3)
    return mdp.initial @ best.values + jnp.sum(mix * best.policy)

  for actual, expected in zip(
    jax.jit(jax.grad(scalar))(mdp),
    problems.by_differences(scalar, mdp),
    strict=True,
  ):
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
  # Second derivatives, in the rewards and in the temperature.
  slope = jax.grad(lambda z: scalar(mdp._replace(rewards=z)))
  along = lambda z: jnp.vdot(slope(z), mix)
  np.testing.assert_allclose(
    jax.jit(jax.grad(along))(mdp.rewards),
    problems.by_differences(along, mdp.rewards),
    rtol=1e-5, atol=1e-5,
  )  # fmt: skip
  heat = lambda t: jnp.sum(mix * bj.rl.optimal(mdp, t).policy)
  np.testing.assert_allclose(
    jax.jit(jax.grad(heat))(0.3),
    problems.by_differences(heat, jnp.float64(0.3)),
    rtol=1e-6,
  )


def test_gradients_are_accurate_near_a_discount_of_one_in_float32():
  mdp = small_mdp(jnp.float32)._replace(discount=jnp.float32(0.999))

  @jax.jit
  def both(mdp, heat):
    best = bj.rl.optimal(mdp, heat)
    weights = bj.rl.visits(mdp, best.policy) / (1 - mdp.discount)
    value = lambda r, t: (
      mdp.initial @ bj.rl.optimal(mdp._replace(rewards=r), t).values
    )
    wanted = weights, weights.sum(1) @ bj.rl.entropy(best.policy)
    return jax.grad(value, (0, 1))(mdp.rewards, heat), wanted

  for actual, expected in zip(*both(mdp, jnp.float32(0.3)), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-3)


def test_a_periodic_chain_converges_to_the_accuracy_of_its_evaluation(x64):
  moves = np.zeros((6, 3, 6))
  moves[range(6), :, np.roll(range(6), -1)] = 1
  rewards = np.random.default_rng(0).standard_normal((6, 3))
  mdp = bj.rl.make_mdp(moves, rewards, discount=0.999)
  best = jax.jit(bj.rl.optimal)(mdp, jnp.float64(0.3))
  size = float(np.abs(best.values).max())
  assert best.iterations < 10 and best.residual < 1e-12 * size


def test_without_entropy_the_gradient_is_the_visits_of_the_best_policy(x64):
  mdp = small_mdp()
  best = jax.jit(bj.rl.optimal)(mdp)
  value = lambda r: mdp.initial @ bj.rl.optimal(mdp._replace(rewards=r)).values
  weights = bj.rl.visits(mdp, best.policy) / (1 - GAMMA)
  np.testing.assert_allclose(
    jax.jit(jax.grad(value))(mdp.rewards), weights, atol=1e-12
  )


def test_ties_and_processes_without_choice():
  even = bj.rl.make_mdp(np.full((4, 3, 4), 0.25), np.ones((4, 3)), discount=0.9)
  solve = jax.jit(bj.rl.optimal, static_argnums=1)
  best = solve(even, 0)
  np.testing.assert_allclose(best.values, 10, rtol=1e-5)
  warm = solve(even, 0.1)
  np.testing.assert_allclose(warm.policy, 1 / 3, rtol=1e-5)
  np.testing.assert_allclose(warm.values, 10 + np.log(3), rtol=1e-5)
  alone = bj.rl.make_mdp(np.ones((1, 1, 1)), [[2.0]], discount=0.5)
  assert solve(alone, 0).values == 4
  now = bj.rl.random_mdp(0, states=3, actions=2, discount=0.0)
  np.testing.assert_allclose(solve(now, 0).values, now.rewards.max(1))


def test_a_goal_at_the_end_of_a_long_chain_is_reached():
  size, at = 150, np.arange(150)
  moves = np.zeros((size, 2, size))
  moves[at, 0, np.maximum(at - 1, 0)] = 1
  moves[at, 1, np.minimum(at + 1, size - 1)] = 1
  rewards = np.zeros((size, 2))
  rewards[-1] = 1
  best = jax.jit(bj.rl.optimal)(bj.rl.make_mdp(moves, rewards, discount=0.99))
  np.testing.assert_array_equal(best.policy.argmax(-1), 1)
  np.testing.assert_allclose(best.values, 100 * 0.99 ** at[::-1], rtol=1e-3)


@pytest.mark.parametrize('zero', [0, 0.0, np.float32(0), jnp.zeros([])])
def test_all_forms_of_temperature_zero_are_equivalent(zero):
  policy, values = bj.rl.best_response(jnp.array([[1.0, 3.0, 3.0]]), zero)
  np.testing.assert_array_equal(policy, [[0, 1, 0]])
  np.testing.assert_array_equal(values, [3])


def test_large_processes_in_float32_under_vmap_and_from_a_start():
  make = lambda key: bj.rl.random_mdp(key, states=60, actions=5)
  mdps = jax.vmap(make)(jax.random.split(jax.random.key(0), 3))
  solve = jax.jit(
    jax.vmap(lambda mdp, v: bj.rl.optimal(mdp, 0.1, start=v), (0, 0))
  )
  cold = solve(mdps, jnp.zeros((3, 60)))
  warm = solve(mdps, cold.values)
  assert np.all(cold.residual < 1e-4) and np.all(warm.iterations <= 1)
  np.testing.assert_allclose(cold.values, warm.values, rtol=1e-5)


def test_the_residual_shows_a_reached_iteration_limit():
  mdp = bj.rl.random_mdp(0, states=30, actions=4)
  far = 30 * jax.random.normal(jax.random.key(0), (30,))
  solve = lambda **how: jax.jit(
    lambda: bj.rl.optimal(mdp, 0.1, start=far, **how)
  )()
  once, rough, fine = solve(max_iterations=1), solve(tolerance=1.0), solve()
  assert once.iterations == 1 and once.residual > 100 * fine.residual
  assert rough.iterations < fine.iterations and rough.residual < 1


def test_errors():
  mdp = bj.rl.random_mdp(0, states=3, actions=2)
  for wrong, message in (
    ({'temperature': -0.1}, 'temperature is a finite number >= 0'),
    ({'max_iterations': 0}, 'max_iterations >= 1'),
    ({'tolerance': 0.0}, 'tolerance is a finite number > 0'),
    ({'start': jnp.zeros(2)}, r'start has the shape \(3,\)'),
  ):
    with pytest.raises(ValueError, match=message):
      bj.rl.optimal(mdp, **wrong)
