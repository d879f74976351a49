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
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.pbrl import preferences


class Method(NamedTuple):
  """What tells methods apart.

  Attributes:
    title: for tables.
    model: whether rewards are the model's, and not the true ones.
    second: whether there is a second policy, and with it the penalty.
    sense: whether labels are of the true rewards, and not drawn by a coin.
    constant: whether the model is fixed and gives every step a reward of 1.
  """

  title: str
  model: bool = True
  second: bool = False
  sense: bool = True
  constant: bool = False

  @property
  def learns_labels(self) -> bool:
    """Whether the rewards depend on the labels."""
    return self.model and not self.constant


METHODS = {
  'oracle': Method('A2C on the true reward', model=False),
  'drlhf': Method('DRLHF'),
  'pbrl': Method('PBRL', second=True),
  'control/random_labels': Method('DRLHF, random labels', sense=False),
  'control/constant_reward': Method('constant reward of 1', constant=True),
}


class Rates(NamedTuple):
  """Step sizes of Adam.

  Attributes:
    actor: at first; falls linearly to 0, as the critics' does.
    critic: likewise.
    reward: constant.
    clip: largest norm of a gradient, of an actor and of a critic.
    updates: of the policy, in all.
  """

  actor: chex.Numeric
  critic: chex.Numeric
  reward: float
  clip: float
  updates: int


class Weights(NamedTuple):
  """What is weighed.

  Attributes:
    entropy: tau, in units of the normalised reward.
    penalty: lambda, of the penalty's gradient in the reward model.
    score: of the score function of f in the policy; 1 / lambda, where one
      lambda stands for both.
    reward_scale: mean absolute value of normalised rewards.
  """

  entropy: float
  penalty: float
  score: float
  reward_scale: float


class Solvers(NamedTuple):
  """The two solvers of a reward epoch.

  Attributes:
    policies: for `bj.BilevelParams`; its batch has rollouts (steps,
      environments) under `lower` and, with a second policy, `value`, whose
      rewards are the normalised ones, and with a score function `pairs` with
      their `costs`.
    rewards: likewise; the leaves of its batch have a leading axis of steps:
      `pairs`, and with a second policy observations and actions under `lower`
      and `value`.
  """

  policies: Any
  rewards: Any


def make_solvers(
  method: Method,
  agent: Any,
  reward: Callable[[Any, Any], chex.Array],
  *,
  rates: Rates,
  weights: Weights,
  steps: int,
  advantages: bj.rl.Advantages,
) -> Solvers:
  """Makes the solvers of a method.

  Args:
    method: which.
    agent: networks of a policy and of its value.
    reward: (weights, observation) -> a reward for each action.
    rates: step sizes.
    weights: of the terms.
    steps: of the reward model in an epoch.
    advantages: how rewards are used; their scale is 1.

  Returns:
    `Solvers`.
  """

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
    return actor + critic - weights.entropy * entropy, entropy

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
      loss = loss + weights.score * score
    return loss, entropy

  def upper_loss(params, batch):
    x, pairs = params.upper, batch['pairs']
    margin = preferences.margins(reward, x, pairs)
    loss = preferences.bradley_terry(margin, pairs.labels).mean()
    if method.second:
      mean = lambda at: preferences.rewards_of(reward, x, *at).mean()
      # The penalty's slope in x, the second policy for the best one.
      loss += weights.penalty * (mean(batch['value']) - mean(batch['lower']))
    return loss

  def adam():
    def one(rate):
      falling = lambda k: rate * jnp.maximum(1 - k / rates.updates, 0)
      return optax.chain(
        optax.clip_by_global_norm(rates.clip), optax.adam(falling, eps=1e-5)
      )

    labels = bj.rl.ActorCriticParams('actor', 'critic')
    return optax.partition(
      {'actor': one(rates.actor), 'critic': one(rates.critic)}, labels
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
      optax.adam(rates.reward),
      steps=steps,
      batch_at=lambda parts, t: jax.tree.map(lambda x: x[t], parts),
    ),
  )
  return Solvers(policies, rewards)
