"""Reinforcement learning: exact quantities of finite decision processes.

A policy is an array of probabilities (states, actions). With a temperature,
each step earns that much a nat of the policy's entropy.
"""

from bilevel_jax.rl._features import (
  random_features,
  td_fixed_point,
  td_system,
)
from bilevel_jax.rl._mdp import MDP, make_mdp, random_mdp
from bilevel_jax.rl._optimal import Optimum, best_response, optimal
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
  'Optimum',
  'RewardProcess',
  'action_values',
  'backup',
  'best_response',
  'entropy',
  'expected_return',
  'make_mdp',
  'optimal',
  'policy_gradient',
  'random_features',
  'random_mdp',
  'reward_process',
  'state_values',
  'state_visits',
  'td_fixed_point',
  'td_system',
  'visits',
]
