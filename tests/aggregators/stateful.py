"""Stateful aggregators in plain NumPy and float64.

Each function returns a step that maps a matrix of gradients and the losses to
the direction. The state is in its closure.
"""

import jax
import numpy as np
import scipy.optimize

from tests.aggregators import references


def grad_norm(rows, rate, alpha=1.5):
  weights, first, count = np.ones(rows), None, 0

  def step(matrix, losses):
    nonlocal weights, first, count
    first = losses if first is None else first
    direction = weights @ matrix
    rates = (losses / first) / np.mean(losses / first)
    lengths = np.linalg.norm(matrix, axis=1)
    target = np.mean(weights * lengths) * rates**alpha
    away = lambda w: np.abs(w * lengths - target).sum()
    # The gradient of a sum of absolute values, by differences.
    slope = np.array(
      [
        (away(weights + unit) - away(weights - unit)) / 2e-6
        for unit in 1e-6 * np.eye(rows)
      ]
    )
    now = rate(count) if callable(rate) else rate
    moved = np.maximum(weights - now * slope, 0)
    weights, count = rows * moved / moved.sum(), count + 1
    return direction

  return step


def dwa(rows, temperature, period):
  history = []

  def step(matrix, losses):
    epoch = len(history) // period
    weights = np.ones(rows)
    if epoch >= 2:
      mean = lambda e: np.mean(history[e * period : (e + 1) * period], axis=0)
      powers = np.exp(mean(epoch - 1) / mean(epoch - 2) / temperature)
      weights = rows * powers / powers.sum()
    history.append(losses)
    return weights @ matrix

  return step


def imtl_l(rows, rate):
  scales = np.zeros(rows)

  def step(matrix, losses):
    nonlocal scales
    weights = np.exp(scales)
    scales = scales - rate * (weights * losses - 1)
    return weights @ matrix

  return step


def random_weights(rows, key, dtype):
  def step(matrix, losses):
    nonlocal key
    key, now = jax.random.split(key)
    drawn = np.float64(jax.random.normal(now, (rows,), dtype))
    return np.exp(drawn) / np.exp(drawn).sum() @ matrix

  return step


def geometric_mean(rows):
  def step(matrix, losses):
    return losses.prod() ** (1 / rows) * np.mean(matrix.T / losses, axis=1)

  return step


def db_mtl(rows, decay):
  means, count = 0.0, 0

  def step(matrix, losses):
    nonlocal means, count
    now = decay(count) if callable(decay) else decay
    means = now * means + (1 - now) * (matrix.T / (losses + 1e-8)).T
    count += 1
    lengths = np.linalg.norm(means, axis=1)
    return sum(
      lengths.max() / length * row
      for length, row in zip(lengths, means)
      if length > 0
    )

  return step


def excess_mtl(rows, rate):
  squares, first, weights = 0.0, None, np.ones(rows)

  def step(matrix, losses):
    nonlocal squares, first, weights
    squares = squares + matrix**2
    excess = (matrix**2 / np.sqrt(squares + 1e-7)).sum(1)
    if first is None:
      first = excess
    else:
      share = np.divide(excess, first, out=np.zeros(rows), where=first > 0)
      weights = weights * np.exp(rate * share)
      weights = rows * weights / weights.sum()
    return weights @ matrix

  return step


def cr_mogm(rows, decay, choose):
  """`choose` returns the weights of the inner aggregator."""
  weights = np.full(rows, 1 / rows)

  def step(matrix, losses):
    nonlocal weights
    weights = decay * weights + (1 - decay) * choose(matrix, losses)
    return weights @ matrix

  return step


def pcd(rows, progress, decay=0.999):
  squares = np.zeros(rows)

  def step(matrix, losses):
    nonlocal squares
    lengths = np.linalg.norm(matrix, axis=1)
    squares = decay * squares + (1 - decay) * lengths**2
    scaled = (matrix.T / np.sqrt(squares + 1e-8)).T
    min_products = progress * (scaled[1:] ** 2).sum(1)
    best, distance = None, np.inf
    # The nearest point with these products, by trying all faces.
    for face in [(), *references.subsets(rows - 1)]:
      some = scaled[1:][list(face)]
      move = np.linalg.pinv(some) @ (
        min_products[list(face)] - some @ scaled[0]
      )
      fine = np.all(scaled[1:] @ (scaled[0] + move) >= min_products - 1e-9)
      if fine and np.linalg.norm(move) < distance:
        best, distance = scaled[0] + move, np.linalg.norm(move)
    size = 0.0 if best is None else np.linalg.norm(best)
    if best is None:
      return matrix[0]
    return lengths[0] / size * best if size > 0 else 0 * best

  return step


def constrained_weights(objectives, penalty, rate):
  """The objectives' weights by a general solver from many starts."""
  square = penalty @ penalty
  slack = rate - objectives @ penalty / square
  rows = len(objectives)
  unit = max(np.abs(objectives).max(), np.abs(penalty).max()) ** 2

  def height(z):
    total = z[:-1] @ objectives + z[-1] * penalty
    return (total @ total - z[-1] * rate * square) / unit

  def slope(z):
    total = z[:-1] @ objectives + z[-1] * penalty
    along = np.append(2 * objectives @ total, 2 * penalty @ total)
    along[-1] -= rate * square
    return along / unit

  constraints = (
    {'type': 'eq', 'fun': lambda z: z[:-1].sum() - 1},
    {'type': 'ineq', 'fun': lambda z: z[-1] - z[:-1] @ slack},
  )
  best = None
  for start in [np.full(rows, 1 / rows), *np.eye(rows)]:
    solution = scipy.optimize.minimize(
      height,
      np.append(start, max(0, start @ slack)),
      jac=slope,
      bounds=[(0, None)] * (rows + 1),
      constraints=constraints,
      method='SLSQP',
      options={'ftol': 1e-16, 'maxiter': 1000},
    )
    if best is None or solution.fun < best.fun:
      best = solution
  return best.x[:-1]


def constrained_mgda(rows, rate, averaging):
  """The last row is the penalty."""
  mean, count = np.zeros(rows - 1), 0

  def step(matrix, losses):
    nonlocal mean, count
    objectives, penalty = matrix[:-1], matrix[-1]
    chosen = constrained_weights(objectives, penalty, rate)
    share = averaging(count) if count else 1
    mean, count = mean + share * (chosen - mean), count + 1
    slack = rate - objectives @ penalty / (penalty @ penalty)
    return mean @ objectives + max(0, mean @ slack) * penalty

  return step


def pmgda(rows, preference, rate, tolerance=1e-2):
  ray = preference / np.linalg.norm(preference)

  def step(matrix, losses):
    away = losses - (ray @ losses) * ray
    distance = np.linalg.norm(away)
    if distance <= tolerance:
      return references.mgda(matrix)
    penalty = away / distance @ matrix
    return constrained_mgda(rows + 1, rate, None)(
      np.vstack([matrix, penalty]), losses
    )

  return step
