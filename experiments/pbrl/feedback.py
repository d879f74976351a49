r"""Reinforcement learning from preferences, as a penalty method on samples.

.. math::
  \min_{x, y} f(x, y) + \lambda \, [ \max_\pi V^\pi_x - V^{\pi_y}_x ]

f is the cross-entropy of Bradley and Terry on pairs of fragments that the
policy made, x the reward model, and V the return under its rewards with the
policy's entropy. It is V-PBGD where values are sampled: three losses, each
the gradient of one sequence,

- `value`, the second policy, by an actor-critic on r_x: it follows the best
  policy from where it was;
- `lower`, the policy, likewise, and along the score function of f;
- `upper`, the reward model, along f and the penalty: r_x falls where the second
  policy goes and rises where the policy does, so that the policy, which f ties
  to the preferences, is made the best one.

Without a second policy and without the score function it is the deep
reinforcement learning from human preferences of Christiano et al., 2017; with
the true rewards it is an actor-critic. The rewards' scale, which preferences
leave open, is taken out: rewards are divided by their mean absolute value.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.pbrl import preferences, rlhf_settings

CRITIC_RATE = 3.0  # Of critics' Adam, in multiples of the actors'.
CLIP = 0.5  # Largest norm of a gradient, of an actor and of a critic.
DECAY = 0.95  # Of generalised advantages.
REWARD_SCALE = 0.1  # Mean absolute value of normalised rewards.


def make_solvers(
  method: rlhf_settings.Method,
  agent: Any,
  reward: Callable[[Any, Any], chex.Array],
  settings: rlhf_settings.Settings,
  rate: chex.Numeric,
) -> tuple[Any, Any]:
  """Makes the two solvers of a reward epoch.

  Args:
    method: which.
    agent: networks of a policy and of its value.
    reward: (weights, observation) -> a reward for each action.
    settings: resolved.
    rate: of the actors' Adam at first; falls linearly to 0, as the critics'.

  Returns:
    That of the policies, for `bj.BilevelParams`; its batch has rollouts (steps,
    environments) under `lower` and, with a second policy, `value`, whose
    rewards are the normalised ones, and with a score function `pairs` with
    their `costs`. And that of the reward model; the leaves of its batch have a
    leading axis of steps: `pairs`, and with a second policy observations and
    actions under `lower` and `value`.
  """
  advantages = bj.rl.Advantages(settings.discount, DECAY)

  def of_all(apply, at, observations, lead):
    flat = observations.reshape(-1, *observations.shape[lead:])
    found = jax.vmap(apply, (None, 0))(at, flat)
    return found.reshape(*observations.shape[:lead], *found.shape[1:])

  def actor_critic_loss(at, rollout):
    actor, critic, entropy = bj.rl.actor_critic_losses(
      of_all(agent.policy, at.actor, rollout.observations, 2),
      of_all(agent.value, at.critic, rollout.observations, 2),
      jax.lax.stop_gradient(
        of_all(agent.value, at.critic, rollout.next_observations, 2)
      ),
      rollout,
      distribution=bj.rl.categorical(),
      advantages=advantages,
    )
    return actor + critic - settings.tau * entropy, entropy

  def log_prob(actor, fragments):
    outputs = of_all(agent.policy, actor, fragments.observations, 2)
    logs = bj.rl.categorical().log_prob(outputs, fragments.actions)
    return jnp.sum(jnp.where(fragments.mask, logs, 0), axis=-1)

  def value_loss(params, batch):
    return actor_critic_loss(params.value, batch['value'])

  def lower_loss(params, batch):
    loss, entropy = actor_critic_loss(params.lower, batch['lower'])
    if 'pairs' in batch:
      pairs, actor = batch['pairs'], params.lower.actor
      logs = log_prob(actor, pairs.first) + log_prob(actor, pairs.second)
      score = bj.rl.score_function_loss(batch['costs'], logs)
      loss = loss + settings.score * score
    return loss, entropy

  def upper_loss(params, batch):
    x, pairs = params.upper, batch['pairs']
    margin = preferences.margins(reward, x, pairs)
    loss = preferences.bradley_terry(margin, pairs.labels).mean()
    if method.second:
      mean = lambda at: preferences.rewards_of(reward, x, *at).mean()
      # The penalty's slope in x, the second policy for the best one.
      loss += settings.penalty * (mean(batch['value']) - mean(batch['lower']))
    return loss

  def adam():
    updates = rlhf_settings.epochs_of(settings) * settings.rollouts.updates

    def one(rate):
      falling = lambda k: rate * jnp.maximum(1 - k / updates, 0)
      return optax.chain(
        optax.clip_by_global_norm(CLIP), optax.adam(falling, eps=1e-5)
      )

    labels = bj.rl.ActorCriticParams('actor', 'critic')
    return optax.partition(
      {'actor': one(rate), 'critic': one(CRITIC_RATE * rate)}, labels
    )

  entropy = lambda params: jnp.zeros([])
  follow = {}
  oracles = [bj.gradient(lower_loss, name='lower', of='lower', outputs=entropy)]
  if method.second:
    oracles.insert(
      0, bj.gradient(value_loss, name='value', of='value', outputs=entropy)
    )
    follow['value'] = bj.Sequence(adam(), start=lambda params: params.lower)
  policies = bj.descend(*oracles, lower=adam(), **follow)
  rewards = bj.descend(
    bj.gradient(upper_loss, name='upper', of='upper'),
    upper=bj.Sequence(
      optax.adam(settings.reward.rate),
      steps=settings.reward.steps,
      batch_at=lambda parts, t: jax.tree.map(lambda x: x[t], parts),
    ),
  )
  return policies, rewards
