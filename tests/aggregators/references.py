"""Aggregators in plain NumPy: enumeration, loops, float64.

Each takes a matrix whose rows are gradients. `tests/data` has the results of
another library for the same matrices.
"""

import itertools

import numpy as np
import scipy.optimize


def subsets(size):
  """All nonempty sets of rows."""
  every = range(1, size + 1)
  return itertools.chain(
    *(itertools.combinations(range(size), k) for k in every)
  )


def lengths(matrix):
  return np.linalg.norm(matrix, axis=1, keepdims=True)


def unit(matrix):
  norms = lengths(matrix)
  return np.divide(matrix, norms, out=np.zeros_like(matrix), where=norms > 0)


def simplex(point):
  """The nearest point of the simplex, by bisection."""
  low, high = point.min() - 1, point.max()
  for _ in range(200):
    middle = (low + high) / 2
    too_much = np.maximum(point - middle, 0).sum() > 1
    low, high = (middle, high) if too_much else (low, middle)
  return np.maximum(point - high, 0)


def mgda(matrix):
  """The shortest of the nearest points of all faces of the hull."""
  best = matrix[0]
  for face in map(list, subsets(len(matrix))):
    ones = np.ones((1, len(face)))
    system = np.block([[matrix[face] @ matrix[face].T, ones.T], [ones, 0]])
    right = np.append(np.zeros(len(face)), 1)
    weights = (np.linalg.pinv(system) @ right)[:-1]
    point = weights @ matrix[face]
    if weights.min() >= -1e-12 and point @ point < best @ best:
      best = point
  return best


def project(matrix, gradient):
  """The nearest direction without conflicts, by trying all faces."""
  best = np.zeros_like(gradient)
  for face in [(), *subsets(len(matrix))]:
    rows = matrix[list(face)]
    point = gradient - np.linalg.pinv(rows) @ (rows @ gradient)
    near = np.linalg.norm(point - gradient) < np.linalg.norm(best - gradient)
    if near and np.all(matrix @ point >= -1e-9 * lengths(matrix)[:, 0]):
      best = point
  return best


def upgrad(matrix, preference=None):
  if preference is None:
    preference = np.full(len(matrix), 1 / len(matrix))
  return sum(p * project(matrix, row) for p, row in zip(preference, matrix))


def dual_proj(matrix, preference=None):
  if preference is None:
    preference = np.full(len(matrix), 1 / len(matrix))
  return project(matrix, preference @ matrix)


def cagrad(matrix, radius=0.4):
  """Bisection over the worst progress, with the nearest direction for each."""
  mean = matrix.mean(0)
  reach = radius * np.linalg.norm(mean)

  def nearest(progress):
    """The nearest direction with that progress on all rows, by all faces."""
    best, distance = mean, np.inf
    for face in [(), *subsets(len(matrix))]:
      rows = matrix[list(face)]
      move = np.linalg.pinv(rows) @ (progress - rows @ mean)
      fine = np.all(matrix @ (mean + move) >= progress - 1e-10)
      if fine and np.linalg.norm(move) < distance:
        best, distance = mean + move, np.linalg.norm(move)
    return best, distance

  low, high = (matrix @ mean).min(), np.max(lengths(matrix)) ** 2 * 2
  for _ in range(100):
    middle = (low + high) / 2
    inside = nearest(middle)[1] <= reach
    low, high = (middle, high) if inside else (low, middle)
  return nearest(low)[0]


def fair(matrix, alpha):
  """Solves G w = w^(-1 / alpha) in logarithms by a general root finder."""
  rows = matrix[lengths(matrix)[:, 0] > 0]
  gramian = rows @ rows.T
  power = 1 / alpha

  def objective(log_weights):
    weights = np.exp(log_weights)
    utility = (
      log_weights if alpha == 1 else weights ** (1 - power) / (1 - power)
    )
    slope = gramian @ weights - weights**-power
    return weights @ gramian @ weights / 2 - utility.sum(), slope * weights

  start = np.zeros(len(rows))
  first = scipy.optimize.minimize(objective, start, jac=True, method='BFGS')
  equation = lambda z: gramian @ np.exp(z) * np.exp(z * power) - 1
  solution = scipy.optimize.root(equation, first.x, tol=1e-14)
  assert np.abs(equation(solution.x)).max() < 1e-8
  return np.exp(solution.x) @ rows


def nash_mtl(matrix, max_norm=None, normalise=False):
  direction = fair(matrix, 1)
  if normalise:
    direction = direction * np.sqrt(np.linalg.norm(matrix @ matrix.T))
  size = np.linalg.norm(direction)
  return direction if max_norm is None else direction * min(1, max_norm / size)


def imtl_g(matrix):
  """The combination with equal projections onto unit rows."""
  rows = matrix[lengths(matrix)[:, 0] > 0]
  size = len(rows)
  system = np.block(
    [[unit(rows) @ rows.T, -np.ones((size, 1))], [np.ones((1, size)), 0]]
  )
  right = np.append(np.zeros(size), 1)
  solution = np.linalg.lstsq(system, right, rcond=1e-10)[0]
  assert np.abs(system @ solution - right).max() < 1e-8
  return solution[:-1] @ rows


def aligned_mtl(matrix):
  left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
  there = sizes > 1e-10 * sizes[0]
  rotated = sizes[there].min() * left[:, there] @ right[there]
  return rotated.mean(0)


def config(matrix, preference=None):
  if preference is None:
    preference = np.ones(len(matrix))
  toward = np.linalg.pinv(unit(matrix)) @ preference
  toward = toward / np.linalg.norm(toward)
  return (matrix @ toward).sum() * toward


def pcgrad(matrix, orders):
  changed = matrix.copy()
  for i, j in ((i, j) for i, order in enumerate(orders) for j in order):
    if i != j and changed[i] @ matrix[j] < 0:
      overlap = changed[i] @ matrix[j] / (matrix[j] @ matrix[j])
      changed[i] = changed[i] - overlap * matrix[j]
  return changed.sum(0)


def grad_vac(matrix, orders, targets, rate=0.5):
  """The direction, and the targets of the next update."""
  changed, targets = matrix.copy(), targets.copy()
  for i, j in ((i, j) for i, order in enumerate(orders) for j in order):
    sizes = np.linalg.norm(changed[i]) * np.linalg.norm(matrix[j])
    if i == j:
      continue
    cosine = changed[i] @ matrix[j] / sizes if sizes else 0.0
    goal = min(targets[i, j], 0.99)
    targets[i, j] += rate * (cosine - targets[i, j])
    if sizes and cosine < goal:
      angle, wanted = np.arccos(max(cosine, -1)), np.arccos(goal)
      # The law of sines.
      push = np.linalg.norm(changed[i]) * np.sin(angle - wanted)
      push /= np.sin(wanted) * np.linalg.norm(matrix[j])
      changed[i] = changed[i] + push * matrix[j]
  return changed.sum(0), targets


def grad_drop(matrix, uniform):
  kept_sum = np.zeros(matrix.shape[1])
  for j, column in enumerate(matrix.T):
    total = np.abs(column).sum()
    share = (1 + column.sum() / total) / 2 if total else 0.5
    sign = 1 if uniform[j] < share else -1
    kept_sum[j] = column[column * sign > 0].sum()
  return kept_sum


def stch(matrix, values, smoothing, preference=None, reference=0.0):
  if preference is None:
    preference = np.full(len(matrix), 1 / len(matrix))
  powers = np.exp(preference * (values - reference) / smoothing)
  return preference * powers / powers.sum() @ matrix


def uncertainty_weighting(matrix, values, variance, rate=0.025):
  """The direction, and the variances of the next update."""
  weights = np.exp(-variance) / 2
  return weights @ matrix, variance - rate * (0.5 - weights * values)


def modo(first, second, weights, step, rho=0.0):
  slope = first @ (second.T @ weights) + rho * weights
  return simplex(weights - step * slope)


def sdmgrad(first, second, weights, step, momentum=0.5, steps=20, pull=0.3):
  """The weights of the direction, and those of the next update."""
  cross = first @ second.T
  cross = cross / np.abs(cross).sum(1).max()
  towards, velocity = pull / len(first), np.zeros(len(first))
  for _ in range(steps):
    velocity = momentum * velocity + cross @ (weights + towards)
    weights = simplex(weights - step * velocity)
  return (weights + towards) / (1 + pull), weights


def moco(
  rows, tracked, weights, share, step, rho=0.0, radius=None, exact=False
):
  """The direction, the weights and the tracked rows."""
  tracked = tracked + min(share, 1) * (rows - tracked)
  if radius is not None:
    tracked = tracked * radius / np.maximum(lengths(tracked), radius)
  if exact:
    # The regularisation adds a separate coordinate to each row.
    wide = np.hstack([tracked, np.sqrt(rho) * np.eye(len(rows))])
    weights = np.linalg.lstsq(
      np.vstack([wide.T, np.full(len(rows), 1e3)]),
      np.append(mgda(wide), 1e3),
      rcond=None,
    )[0]
  else:
    slope = tracked @ (tracked.T @ weights) + rho * weights
    weights = simplex(weights - step * slope)
  return weights @ tracked, weights, tracked


def dynamic_barrier(matrix, eta):
  """The objective's gradient, projected to decrease the penalty."""
  objective, penalty = matrix
  lacking = eta * penalty @ penalty - objective @ penalty
  if lacking <= 0 or not penalty.any():
    return objective
  return objective + lacking / (penalty @ penalty) * penalty
