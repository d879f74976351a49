"""Reinforcement learning: finite decision processes, and actors and critics.

Of finite processes, a policy is an array of probabilities (states, actions).
With a temperature, each step earns that much a nat of the policy's entropy.
Elsewhere it is any function of weights and an observation: see `actor_critic`,
an oracle whose environments are in its state.

Where the lower level of a nested problem is a finite process, a function of the
upper variable, `follower_loss`, `policy_mirror_descent`, `bellman_gap` and
`natural` are what a penalty method is made of: see `bj.solvers.pbrl`. Where it
is sampled, `actor_critic_losses` and `score_function_loss` are.
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
from bilevel_jax.rl._games import (
  MarkovGame,
  faced_by,
  make_game,
  random_game,
  zero_sum_responses,
)
from bilevel_jax.rl._mdp import MDP, make_mdp, random_mdp
from bilevel_jax.rl._optimal import Optimum, best_response, optimal
from bilevel_jax.rl._penalties import (
  bellman_gap,
  follower_loss,
  natural,
  policy_mirror_descent,
  soft_value_iteration_step,
)
from bilevel_jax.rl._returns import generalised_advantages, n_step_returns
from bilevel_jax.rl._rollouts import (
  Collection,
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
from bilevel_jax.rl._score import score_function_loss
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
  'Collection',
  'Collector',
  'Distribution',
  'Environment',
  'EnvironmentsState',
  'Episodes',
  'MarkovGame',
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
  'bellman_gap',
  'best_response',
  'categorical',
  'distribution_of',
  'entropy',
  'expected_return',
  'faced_by',
  'follower_loss',
  'gaussian',
  'generalised_advantages',
  'make_game',
  'make_mdp',
  'mean_return',
  'n_step_returns',
  'natural',
  'on_policy',
  'optimal',
  'policy_gradient',
  'policy_mirror_descent',
  'random_features',
  'random_game',
  'random_mdp',
  'reward_process',
  'rollouts',
  'score_function_loss',
  'soft_value_iteration_step',
  'state_values',
  'state_visits',
  'td_actor_critic',
  'td_fixed_point',
  'td_system',
  'visits',
  'zero_sum_responses',
]
