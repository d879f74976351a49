"""Reinforcement learning: returns, policies, actor-critic oracles."""

from bilevel_jax.rl._actor_critic import (
  ActorCriticParams,
  Advantages,
  actor_critic,
  actor_critic_gradient,
  actor_critic_losses,
)
from bilevel_jax.rl._distributions import (
  Distribution,
  categorical,
  distribution_of,
  gaussian,
)
from bilevel_jax.rl._returns import generalised_advantages, n_step_returns
from bilevel_jax.rl._rollouts import (
  Collector,
  Environment,
  EnvironmentsState,
  Episodes,
  Rollout,
  Timestep,
  mean_return,
  on_policy,
  rollouts,
)

__all__ = [
  'ActorCriticParams',
  'Advantages',
  'Collector',
  'Distribution',
  'Environment',
  'EnvironmentsState',
  'Episodes',
  'Rollout',
  'Timestep',
  'actor_critic',
  'actor_critic_gradient',
  'actor_critic_losses',
  'categorical',
  'distribution_of',
  'gaussian',
  'generalised_advantages',
  'mean_return',
  'n_step_returns',
  'on_policy',
  'rollouts',
]
