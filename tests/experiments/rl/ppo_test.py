"""PPO: losses by NumPy, the actor-critic as a special case, memories."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.rl import networks, ppo, recurrent

KEY = jax.random.key(0)
STEPS, ROWS, ACTIONS = 7, 4, 3


def make_rollout(rng, dtype=np.float32):
  """A rollout of random numbers with ends of both kinds."""
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  ends = rng.random((2, STEPS, ROWS)) < 0.2
  return bj.rl.Rollout(
    draw(STEPS, ROWS, 5),
    jnp.asarray(rng.integers(ACTIONS, size=(STEPS, ROWS))),
    draw(STEPS, ROWS),
    jnp.asarray(ends[0]),
    jnp.asarray(ends[1] & ~ends[0]),
    draw(STEPS, ROWS, 5),
  )


def by_numpy(logits, values, rollout, old, *, clip, discount, decay):
  """Advantages and losses by loops in float64."""
  f = lambda x: np.asarray(x, np.float64)
  old_logits, old_values, next_values = map(f, old)
  logits, values, rewards = f(logits), f(values), f(rollout.rewards)
  ended, cut = np.asarray(rollout.terminated), np.asarray(rollout.truncated)

  def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))

  advantages = np.zeros_like(rewards)
  for row in range(ROWS):
    later = 0.0
    for t in reversed(range(STEPS)):
      ahead = 0.0 if ended[t, row] else next_values[t, row]
      error = rewards[t, row] + discount * ahead - old_values[t, row]
      if ended[t, row] or cut[t, row]:
        later = 0.0
      later = error + discount * decay * later
      advantages[t, row] = later
  targets = advantages + old_values
  unit = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
  new, before = log_softmax(logits), log_softmax(old_logits)
  actor = critic = entropy = 0.0
  for t in range(STEPS):
    for row in range(ROWS):
      action = int(rollout.actions[t, row])
      ratio = np.exp(new[t, row, action] - before[t, row, action])
      near = min(max(ratio, 1 - clip), 1 + clip)
      actor -= min(ratio * unit[t, row], near * unit[t, row])
      change = values[t, row] - old_values[t, row]
      moved = old_values[t, row] + min(max(change, -clip), clip)
      critic += 0.5 * max(
        (values[t, row] - targets[t, row]) ** 2,
        (moved - targets[t, row]) ** 2,
      )
      entropy -= (np.exp(new[t, row]) * new[t, row]).sum()
  return advantages, np.array([actor, critic, entropy]) / (STEPS * ROWS)


def test_advantages_and_losses_are_those_of_numpy():
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    rollout = make_rollout(rng, np.float64)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    agent = networks.Agent(
      lambda key: None, lambda w, x: x[:3] * w, lambda w, x: x[3] * w + x[4]
    )
    params = bj.rl.ActorCriticParams(jnp.float64(0.7), jnp.float64(-0.4))
    settings = ppo.Settings(clip=0.15, discount=0.9, decay=0.8)
    sample = ppo.make_sample(
      agent,
      params,
      rollout,
      distribution=bj.rl.categorical(),
      settings=settings,
    )
    logits, values = draw(STEPS, ROWS, ACTIONS), draw(STEPS, ROWS)
    losses = ppo.clipped_losses(
      logits,
      values,
      sample,
      distribution=bj.rl.categorical(),
      clip=settings.clip,
      normalise=True,
    )
    seen, after = map(
      np.asarray, (rollout.observations, rollout.next_observations)
    )
    value = lambda x: x[..., 3] * -0.4 + x[..., 4]
    advantages, expected = by_numpy(
      logits,
      values,
      rollout,
      (seen[..., :3] * 0.7, value(seen), value(after)),
      clip=0.15,
      discount=0.9,
      decay=0.8,
    )
    np.testing.assert_allclose(sample.advantages, advantages, rtol=1e-12)
    np.testing.assert_allclose(losses[:3], expected, rtol=1e-12)
    assert losses[3] > 0 and 0 < losses[4] < 1


def test_one_epoch_of_one_minibatch_is_the_actor_critic():
  rollout = make_rollout(np.random.default_rng(1))
  agent = networks.agent((5,), ACTIONS)
  params = agent.init(KEY)
  solver = ppo.solver(
    agent,
    ACTIONS,
    optax.sgd(0.1),
    ppo.Settings(epochs=1, minibatches=1, value_weight=1.0),
    key=KEY,
    entropy=0.02,
  )
  oracle = bj.rl.actor_critic_gradient(
    agent.policy,
    agent.value,
    distribution=bj.rl.categorical(),
    advantages=bj.rl.Advantages(0.99, 0.95, normalise=True),
    entropy_bonus=0.02,
  )
  other = bj.descend(oracle, actor=optax.sgd(0.1), critic=optax.sgd(0.1))
  moves = [
    jax.jit(s.update)(rollout, s.init(params), params)[0]
    for s in (solver, other)
  ]
  chex.assert_trees_all_close(*map(tuple, moves), rtol=1e-4, atol=1e-6)


def test_minibatches_have_to_divide_a_rollout():
  agent = networks.agent((5,), ACTIONS)
  params = agent.init(KEY)
  solver = ppo.solver(
    agent, ACTIONS, optax.sgd(0.1), ppo.Settings(minibatches=3), key=KEY
  )
  rollout = make_rollout(np.random.default_rng(0))
  with pytest.raises(harness.SettingsError, match=r'3 minibatches.* 28 steps'):
    jax.eval_shape(solver.update, rollout, solver.init(params), params)


def test_the_end_of_an_episode_erases_the_memory():
  """Unrolled outputs are those of single steps, with zeros after an end."""
  one = recurrent.agent((5,), ACTIONS, units=6)
  params = one.agent.init(KEY)
  rng = np.random.default_rng(0)
  seen = jnp.asarray(rng.normal(size=(STEPS, 1, 5)), jnp.float32)
  ends = jnp.zeros((STEPS, 1), bool).at[3].set(True)
  start = recurrent.Memory(*jnp.ones((2, 1, 6)))
  outputs, values = jax.jit(one.unroll)(params, seen, start, ends)
  walk = recurrent.remembering(
    bj.rl.Environment(
      lambda key: (seen[0, 0], jnp.int32(0)),
      lambda key, t, action: bj.rl.Timestep(
        seen[(t + 1) % STEPS, 0], t + 1, 0.0, t == 3, t < 0, seen[t, 0]
      ),
      ACTIONS,
    ),
    units=6,
  )
  now, t = recurrent.Seen(seen[0, 0], recurrent.Memory(*jnp.ones((2, 6)))), 0
  for step in range(STEPS):
    expected = one.agent.policy(params.actor, now)
    np.testing.assert_allclose(outputs[step, 0], expected, rtol=1e-4, atol=1e-6)
    expected = one.agent.value(params.critic, now)
    np.testing.assert_allclose(values[step, 0], expected, rtol=1e-4, atol=1e-6)
    chosen = recurrent.Chosen(jnp.int32(0), one.advance(params, now))
    after = walk.step(KEY, t, chosen)
    now, t = after.observation, after.state
    empty = all((x == 0).all() for x in now.memory)
    assert empty == (step == 3)
    # The critic bootstraps with the memory before the reset.
    assert all((x != 0).any() for x in after.final_observation.memory)
