"""Reinforcement learning: exact quantities of finite decision processes.

A policy is an array of probabilities (states, actions). With a temperature,
each step earns that much a nat of the policy's entropy.

Where the lower level of a nested problem is such a process, a function of the
upper variable, `follower_loss`, `policy_mirror_descent`, `bellman_gap` and
`natural` are what a penalty method is made of: see `bj.solvers.pbrl`.
"""

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
  'MarkovGame',
  'Optimum',
  'RewardProcess',
  'action_values',
  'backup',
  'bellman_gap',
  'best_response',
  'entropy',
  'expected_return',
  'faced_by',
  'follower_loss',
  'make_game',
  'make_mdp',
  'natural',
  'optimal',
  'policy_gradient',
  'policy_mirror_descent',
  'random_features',
  'random_game',
  'random_mdp',
  'reward_process',
  'soft_value_iteration_step',
  'state_values',
  'state_visits',
  'td_fixed_point',
  'td_system',
  'visits',
  'zero_sum_responses',
]
