r"""Reinforcement learning from preferences by a sampled penalty method.

.. math::
  \min_{x, y} f(x, y) + \lambda \, [ \max_\pi V^\pi_x - V^{\pi_y}_x ]

f is the Bradley-Terry cross-entropy on pairs of fragments of the policy, x the
reward model, and V the return under its rewards with the policy's entropy. This
is V-PBGD with sampled values. Three losses give the gradients of three
sequences:

- `value`, the second policy: an actor-critic on r_x, warm-started, tracks the
  best policy;
- `lower`, the policy: the same loss and the score function of f;
- `upper`, the reward model: f and the penalty, which lowers r_x at the steps of
  the second policy and raises it at those of the policy.

Without a second policy and the score function this is deep reinforcement
learning from human preferences (Christiano et al., 2017). With the true rewards
it is an actor-critic. Preferences do not determine the scale of rewards, so
rewards are divided by their mean absolute value.

f prefers policies whose pairs are untied, as the loss of a tie is log 2. So it
opposes an optimal policy, all of whose episodes are equal, unless lambda is
large: see the notes.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.pbrl import preferences, queries, rlhf_settings

CRITIC_RATE = 3.0  # Step size of critics / step size of actors.
CLIP = 0.5  # Largest norm of a gradient of an actor or a critic.
DECAY = 0.95  # Of generalised advantage estimates.
REWARD_SCALE = 0.1  # Mean absolute value of normalised rewards.


def preference_loss(
  reward: Callable[[Any, Any], chex.Array],
  weights: Any,
  pairs: preferences.Pairs,
  member: Callable[[Any, Any], chex.Array] | None = None,
) -> chex.Array:
  """Mean cross-entropy of the labels; of an ensemble the sum over its members.

  Args:
    reward: (weights, observation) -> a reward per action.
    weights: of the reward model, or of all members.
    pairs: (pairs, ...), or with a member (members, pairs, ...).
    member: reward of one member; None without an ensemble.
  """
  if member is None:
    margin = preferences.margins(reward, weights, pairs)
    return preferences.bradley_terry(margin, pairs.labels).mean()
  margin = queries.ensemble_margins(member, weights, pairs, own=True)
  losses = preferences.bradley_terry(margin, pairs.labels)
  return losses.mean(axis=1).sum()


def make_solvers(
  method: rlhf_settings.Method,
  agent: Any,
  reward: Callable[[Any, Any], chex.Array],
  settings: rlhf_settings.Settings,
  rate: chex.Numeric,
  member: Callable[[Any, Any], chex.Array] | None = None,
) -> tuple[Any, Any]:
  """Makes the solvers of the policies and of the reward model.

  Args:
    method: the method.
    agent: networks of a policy and its value.
    reward: (weights, observation) -> a reward per action.
    settings: resolved.
    rate: initial step size of the actors' Adam; it falls linearly to 0.
    member: reward of one member of an ensemble; None without one.

  Returns:
    The solver of the policies, whose batch has rollouts (steps, environments)
    with normalised rewards as `lower` and, with a second policy, `value`; with
    a score function also `pairs` and their `costs`. And the solver of the
    reward model, whose batch has a leading axis of steps: `pairs`, and with a
    second policy observations and actions as `lower` and `value`.
  """
  weights = settings.weights
  advantages = bj.rl.Advantages(
    settings.discount, DECAY, normalise=settings.normalised_advantages
  )
  score_weight, horizon = weights.score, 1 / (1 - settings.discount)
  if weights.multiplier:
    # The gradients of f + lambda p, divided by lambda times the horizon, as the
    # losses of the policies are means over steps.
    score_weight = 1 / (weights.multiplier * horizon)

  def apply_all(apply, at, observations):
    """Applies a network over the two leading axes of observations."""
    flat = observations.reshape(-1, *observations.shape[2:])
    outputs = jax.vmap(apply, (None, 0))(at, flat)
    return outputs.reshape(*observations.shape[:2], *outputs.shape[1:])

  def actor_critic_loss(at, rollout):
    actor, critic, entropy = bj.rl.actor_critic_losses(
      apply_all(agent.policy, at.actor, rollout.observations),
      apply_all(agent.value, at.critic, rollout.observations),
      jax.lax.stop_gradient(
        apply_all(agent.value, at.critic, rollout.next_observations)
      ),
      rollout,
      distribution=bj.rl.categorical(),
      advantages=advantages,
    )
    return actor + critic - weights.tau * entropy, entropy

  def log_prob(actor, fragments):
    outputs = apply_all(agent.policy, actor, fragments.observations)
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
      loss = loss + score_weight * score
    return loss, entropy

  def upper_loss(params, batch):
    x = params.upper
    loss = preference_loss(reward, x, batch['pairs'], member)
    if method.second_policy:
      mean = lambda at: preferences.model_rewards(reward, x, *at).mean()
      # The derivative of the penalty in x, with the second policy as the best.
      penalty = weights.multiplier * horizon or weights.penalty
      penalty *= batch['factor']
      loss += penalty * (mean(batch['value']) - mean(batch['lower']))
    return loss

  def adam():
    updates = rlhf_settings.count_epochs(settings) * settings.rollouts.updates

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
  sequences = {}
  oracles = [bj.gradient(lower_loss, name='lower', of='lower', outputs=entropy)]
  if method.second_policy:
    oracles.insert(
      0, bj.gradient(value_loss, name='value', of='value', outputs=entropy)
    )
    sequences['value'] = bj.Sequence(adam(), start=lambda params: params.lower)
  policies = bj.descend(*oracles, lower=adam(), **sequences)
  rewards = bj.descend(
    bj.gradient(upper_loss, name='upper', of='upper'),
    upper=bj.Sequence(
      optax.adam(settings.reward.rate),
      steps=settings.reward.steps,
      batch_at=lambda parts, t: jax.tree.map(lambda x: x[t], parts),
    ),
  )
  return policies, rewards
