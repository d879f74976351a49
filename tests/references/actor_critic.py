"""A3C-TD(0), written plainly: one transition after another, in NumPy."""

import numpy as np


def softmax(row):
  """Probabilities of one row of logits."""
  shares = np.exp(row - row.max())
  return shares / shares.sum()


def transition(seen, moves, rewards, features, discount, omega):
  """The transition (s, a, s') that has this reward and squared difference.

  Args:
    seen: s, the reward and the squared temporal difference.
    moves: probabilities of the process; s' has one.
    rewards: of the process, all different.
    features: of the states.
    discount: of the process.
    omega: the critic that the difference is of.

  Returns:
    The three numbers, and the difference.
  """
  s, reward, squared = seen
  a = int(np.argmin(np.abs(rewards[s] - reward)))
  differences = (
    rewards[s, a] + discount * features @ omega - features[s] @ omega
  )
  errors = np.abs(differences**2 - squared) + 1e9 * (moves[s, a] == 0)
  to = int(np.argmin(errors))
  return s, a, to, differences[to]


def a3c_td0(
  process, features, theta, omega, seen, *, delays, actor, critic, radius
):
  """Iterates of A3C-TD(0) along the transitions that were seen.

  Args:
    process: transitions, rewards and discount.
    features: of the states, (states, size).
    theta: logits at the start.
    omega: the critic at the start.
    seen: for each update, s, the reward and the squared difference.
    delays: for each update, how old the parameters are.
    actor: the step size after k updates.
    critic: likewise.
    radius: of the critic's ball.

  Yields:
    The actor, the critic and (s, a, s') after each update.
  """
  moves, rewards, discount = process
  past = [(theta, omega)]
  for k, (one, delay) in enumerate(zip(seen, delays, strict=True)):
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
