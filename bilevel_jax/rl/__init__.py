"""Reinforcement learning: finite Markov decision processes and actor-critic.

In a finite process, a policy is an array of probabilities (states, actions). A
temperature adds a reward per nat of the policy's entropy to each step.
Otherwise a policy is a function of weights and an observation: see
`actor_critic`, an oracle whose state has the environments.

`follower_loss`, `policy_mirror_descent`, `bellman_gap` and `natural` are the
parts of penalty methods for nested problems whose lower level is a finite
process that depends on the upper variable: see `bj.solvers.pbrl`. For a sampled
lower level, use `actor_critic_losses` and `score_function_loss`.
"""

import warnings
from typing import Any

from bilevel_jax.rl._actor_critic import (
  ActorCriticParams,
  Advantages,
  actor_critic,
  actor_critic_gradient,
  actor_critic_losses,
)
from bilevel_jax.rl._distributions import (
  Distribution,
  action_distribution,
  categorical,
  gaussian,
)
from bilevel_jax.rl._features import (
  random_features,
  td_fixed_point,
  td_system,
)
from bilevel_jax.rl._games import (
  MarkovGame,
  induced_mdp,
  make_game,
  random_game,
  zero_sum_responses,
)
from bilevel_jax.rl._mdp import MDP, make_mdp, random_mdp
from bilevel_jax.rl._natural import natural
from bilevel_jax.rl._optimal import Optimum, best_response, optimal
from bilevel_jax.rl._penalties import (
  bellman_gap,
  follower_loss,
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
  'action_distribution',
  'action_values',
  'actor_critic',
  'actor_critic_gradient',
  'actor_critic_losses',
  'backup',
  'bellman_gap',
  'best_response',
  'categorical',
  'entropy',
  'expected_return',
  'follower_loss',
  'gaussian',
  'generalised_advantages',
  'induced_mdp',
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

_RENAMED = {'distribution_of': 'action_distribution', 'faced_by': 'induced_mdp'}


def __getattr__(name: str) -> Any:
  """Finds former names of functions, with a DeprecationWarning."""
  if name not in _RENAMED:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  new = _RENAMED[name]
  warnings.warn(f'bj.rl.{name} is now bj.rl.{new}.', DeprecationWarning, 2)
  return globals()[new]
