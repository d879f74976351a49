"""Running moments against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments.rl import networks, normalisation


def test_moments_are_those_of_all_values():
  rng = np.random.default_rng(0)
  parts = [rng.normal(3, 2, size=(n, 4, 2)) for n in (1, 5, 2)]
  with jax.enable_x64(True):
    moments = normalisation.start((2,))
    moments = jax.tree.map(lambda x: x.astype(jnp.float64), moments)
    for part in parts:
      moments = normalisation.merge(moments, jnp.asarray(part))
    every = np.concatenate(parts).reshape(-1, 2)
    assert moments.count == len(every)
    np.testing.assert_allclose(moments.mean, every.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, every.var(0), rtol=1e-12)
    unit = normalisation.standardise(moments, jnp.asarray(every))
    np.testing.assert_allclose(unit.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(unit.std(0), 1, rtol=1e-7)


def test_rewards_are_divided_by_the_deviation_of_running_returns():
  rng = np.random.default_rng(1)
  scale, returns, every = normalisation.start_scale(3), np.zeros(3), []
  none = jnp.zeros((5, 3))
  for _ in range(2):
    rewards = rng.normal(size=(5, 3))
    ends = rng.random((5, 3)) < 0.3
    rollout = bj.rl.Rollout(
      none, none, jnp.asarray(rewards), jnp.asarray(ends), none > 1, none
    )
    scaled, scale = normalisation.scale_rewards(scale, rollout, 0.9)
    for t in range(5):
      returns = 0.9 * returns + rewards[t]
      every.append(returns)
      returns = np.where(ends[t], 0, returns)
    expected = rewards / np.std(every)
    np.testing.assert_allclose(scaled.rewards, expected, rtol=1e-4)


def test_moments_belong_to_the_weights_and_have_no_gradient():
  agent = normalisation.normalised(networks.agent((2,), 3), (2,))
  params = agent.init(jax.random.key(0))
  seen = jnp.array([[5.0, -1.0], [7.0, 3.0]])
  after = normalisation.observe(params, seen)
  plain = networks.agent((2,), 3)
  x = jnp.array([-1.0, 1.0])  # The second observation is (1, 1) deviations off.
  np.testing.assert_allclose(
    agent.policy(after.actor, seen[0]),
    plain.policy(params.actor['network'], -jnp.ones(2)),
    rtol=1e-4,
  )
  slope = jax.grad(lambda w: agent.value(w, x))(after.critic)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(slope['moments']))
  assert any((leaf != 0).any() for leaf in jax.tree.leaves(slope['network']))
