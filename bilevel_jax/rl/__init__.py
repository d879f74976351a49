"""Reinforcement learning: exact quantities of finite decision processes, and
oracles of an actor and a critic whose environment is in their state.

Of finite processes, a policy is an array of probabilities (states, actions).
With a temperature, each step earns that much a nat of the policy's entropy.
Elsewhere it is any function of weights and an observation: see `actor_critic`.
"""

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
from bilevel_jax.rl._features import (
  random_features,
  td_fixed_point,
  td_system,
)
from bilevel_jax.rl._mdp import MDP, make_mdp, random_mdp
from bilevel_jax.rl._optimal import Optimum, best_response, optimal
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
from bilevel_jax.rl._td_actor_critic import SamplerState, td_actor_critic
from bilevel_jax.rl._values import (
  RewardProcess,
  action_values,
  backup,
  entropy,
  expected_return,
  policy_gradient,
  reward_process,
  state_values,
  state_visits,
  visits,
)

__all__ = [
  'MDP',
  'ActorCriticParams',
  'Advantages',
  'Collector',
  'Distribution',
  'Environment',
  'EnvironmentsState',
  'Episodes',
  'Optimum',
  'RewardProcess',
  'Rollout',
  'SamplerState',
  'Timestep',
  'action_values',
  'actor_critic',
  'actor_critic_gradient',
  'actor_critic_losses',
  'backup',
  'best_response',
  'categorical',
  'distribution_of',
  'entropy',
  'expected_return',
  'gaussian',
  'generalised_advantages',
  'make_mdp',
  'mean_return',
  'n_step_returns',
  'on_policy',
  'optimal',
  'policy_gradient',
  'random_features',
  'random_mdp',
  'reward_process',
  'rollouts',
  'state_values',
  'state_visits',
  'td_actor_critic',
  'td_fixed_point',
  'td_system',
  'visits',
]
