"""A3C-TD(0) in plain NumPy, one transition after another."""

import numpy as np


def softmax(row):
  """Probabilities of one row of logits."""
  shares = np.exp(row - row.max())
  return shares / shares.sum()


def transition(observed, moves, rewards, features, discount, omega):
  """Finds the transition (s, a, s') with this reward and squared difference.

  Args:
    seen: s, the reward and the squared temporal difference.
    moves: transition probabilities of the process.
    rewards: rewards of the process, all different.
    features: features of the states.
    discount: the discount of the process.
    omega: the critic of the difference.

  Returns:
    The three numbers, and the difference.
  """
  s, reward, squared = observed
  a = int(np.argmin(np.abs(rewards[s] - reward)))
  differences = (
    rewards[s, a] + discount * features @ omega - features[s] @ omega
  )
  errors = np.abs(differences**2 - squared) + 1e9 * (moves[s, a] == 0)
  to = int(np.argmin(errors))
  return s, a, to, differences[to]


def a3c_td0(
  process, features, theta, omega, observed, *, delays, actor, critic, radius
):
  """Iterates of A3C-TD(0) along the observed transitions.

  Args:
    process: transitions, rewards and discount.
    features: of the states, (states, size).
    theta: logits at the start.
    omega: the critic at the start.
    seen: for each update, s, the reward and the squared difference.
    delays: the age of the parameters at each update.
    actor: the actor's step size after k updates.
    critic: the critic's step size after k updates.
    radius: the radius of the critic's ball.

  Yields:
    The actor, the critic and (s, a, s') after each update.
  """
  moves, rewards, discount = process
  past = [(theta, omega)]
  for k, (one, delay) in enumerate(zip(observed, delays, strict=True)):
    old_theta, old_omega = past[k - delay]
    s, a, to, delta = transition(
      one, moves, rewards, features, discount, old_omega
    )
    theta, omega = theta.copy(), omega.copy()
    for b, share in enumerate(softmax(old_theta[s])):
      theta[s, b] += actor(k) * delta * ((a == b) - share)
    omega += critic(k) * delta * features[s]
    length = np.sqrt(np.sum(omega**2))
    if length > radius:
      omega *= radius / length
    past.append((theta, omega))
    yield theta, omega, (s, a, to)
