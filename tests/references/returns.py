"""Returns and advantages one step at a time, in NumPy."""

import numpy as np


def advantages(
  rewards, values, next_values, terminated, truncated, discount, decay
):
  """Sums of later temporal differences, each with its own weight."""
  steps, count = rewards.shape
  found = np.zeros((steps, count))
  for e in range(count):
    for t in range(steps):
      weight = 1.0
      for later in range(t, steps):
        bootstrap = 0.0 if terminated[later, e] else next_values[later, e]
        error = rewards[later, e] + discount * bootstrap - values[later, e]
        found[t, e] += weight * error
        if terminated[later, e] or truncated[later, e]:
          break
        weight *= discount * decay
  return found


def returns(rewards, next_values, terminated, truncated, discount, steps):
  """What is earned in the next steps, and what the last of them leads to."""
  length, count = rewards.shape
  found = np.zeros((length, count))
  for e in range(count):
    for t in range(length):
      for i in range(min(steps, length - t)):
        found[t, e] += discount**i * rewards[t + i, e]
        if terminated[t + i, e]:
          break
        if truncated[t + i, e] or i == min(steps, length - t) - 1:
          found[t, e] += discount ** (i + 1) * next_values[t + i, e]
          break
  return found
