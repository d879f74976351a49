"""Returns and advantages in NumPy, one step at a time."""

import numpy as np


def advantages(
  rewards, values, next_values, terminated, truncated, discount, decay
):
  """Generalised advantages: weighted sums of later temporal differences."""
  steps, count = rewards.shape
  totals = np.zeros((steps, count))
  for e in range(count):
    for t in range(steps):
      weight = 1.0
      for later in range(t, steps):
        bootstrap = 0.0 if terminated[later, e] else next_values[later, e]
        error = rewards[later, e] + discount * bootstrap - values[later, e]
        totals[t, e] += weight * error
        if terminated[later, e] or truncated[later, e]:
          break
        weight *= discount * decay
  return totals


def returns(rewards, next_values, terminated, truncated, discount, steps):
  """n-step returns: the next rewards plus the value after the last of them."""
  length, count = rewards.shape
  totals = np.zeros((length, count))
  for e in range(count):
    for t in range(length):
      for i in range(min(steps, length - t)):
        totals[t, e] += discount**i * rewards[t + i, e]
        if terminated[t + i, e]:
          break
        if truncated[t + i, e] or i == min(steps, length - t) - 1:
          totals[t, e] += discount ** (i + 1) * next_values[t + i, e]
          break
  return totals
