"""Markov decision processes in NumPy: sums over paths, loops over states."""

import numpy as np


def process(seed=0, states=5, actions=3):
  """Transitions, rewards, first states and a policy, some entries zero."""
  draw = np.random.default_rng(seed)
  moves = draw.dirichlet(np.full(states, 0.5), size=(states, actions))
  moves[0, 0] = np.eye(states)[-1]
  rewards = draw.normal(size=(states, actions))
  first = draw.dirichlet(np.ones(states))
  policy = draw.dirichlet(np.ones(actions), size=states)
  policy[1] = np.eye(actions)[0]
  return moves, rewards, first, policy


def entropy(policy):
  """The entropy of each state's policy, in nats."""
  return np.array([-sum(p * np.log(p) for p in row if p) for row in policy])


def values(moves, rewards, policy, discount, temperature=0.0, horizon=600):
  """Discounted rewards of a long walk, summed step by step."""
  states = len(policy)
  total, reach, weight = np.zeros(states), np.eye(states), 1.0
  gains = (policy * rewards).sum(1) + temperature * entropy(policy)
  for _ in range(horizon):
    total += weight * reach @ gains
    reach = reach @ np.einsum('sa,sat->st', policy, moves)
    weight *= discount
  return total


def visits(moves, first, policy, discount, horizon=600):
  """Discounted state probabilities, summed step by step."""
  total, now, weight = np.zeros(len(policy)), first, 1 - discount
  for _ in range(horizon):
    total = total + weight * now
    now = now @ np.einsum('sa,sat->st', policy, moves)
    weight *= discount
  return total


def best_values(moves, rewards, discount, temperature=0.0, sweeps=2000):
  """Plain (soft) value iteration."""
  values_ = np.zeros(len(moves))
  for _ in range(sweeps):
    q = rewards + discount * moves @ values_
    if temperature:
      top = q.max(1)
      scaled = (q - top[:, None]) / temperature
      values_ = top + temperature * np.log(np.exp(scaled).sum(1))
    else:
      values_ = q.max(1)
  return values_


def td_increment(moves, rewards, policy, features, weights, discount, omega):
  """The mean of delta phi(s) over (s, a, s'), summed over all triples."""
  total = np.zeros(features.shape[1])
  for s, a, t in np.ndindex(moves.shape):
    chance = weights[s] * policy[s, a] * moves[s, a, t]
    delta = rewards[s, a] + discount * features[t] @ omega - features[s] @ omega
    total += chance * delta * features[s]
  return total
