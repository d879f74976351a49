"""The settings of `suggest` for a coupled quadratic, by dense matrices.

Written from the mathematics in the docstrings of `suggest` and `WalkSettings`,
in NumPy and float64: each linear system is solved by a factorisation, each
curvature but G is an eigenvalue.
"""

import math
from typing import NamedTuple

import numpy as np


class Quadratic(NamedTuple):
  """f = |y - centre|_Q^2 / 2 + decay |x|^2 / 2, g = y'Hy / 2 - y'Cx."""

  q: np.ndarray
  h: np.ndarray
  c: np.ndarray
  centre: np.ndarray
  decay: float


class Point(NamedTuple):
  """What is measured at an accepted point of the walk."""

  x: np.ndarray
  loss: float
  slope: np.ndarray
  pull: float
  lag: float
  grip: float


class Settings(NamedTuple):
  """Those of a `Suggestion` with the same names."""

  penalty: float
  first_penalty: float
  ramp_begin: int
  ramp: int
  updates: int
  upper: float
  lower: float
  value: float
  momentum: float
  gap: float
  loss: float
  hypergradient_curvature: float
  upper_curvature: float
  lower_curvature: float
  lag: float


def _norm(matrix):
  return np.linalg.norm(matrix, 2)


def _measure(problem, x):
  q, h, c, centre, decay = problem
  y = np.linalg.solve(h, c @ x)
  pull = q @ (y - centre)
  slope = c.T @ np.linalg.solve(h, pull) + decay * x
  hold, d = c.T @ np.linalg.solve(h, c), slope / _norm(slope)
  for _ in range(4):
    d = hold @ d
    grip = _norm(d)
    d /= grip
  # The minimiser moves along H^-1 C d, and lags behind by H^-1 times that.
  moves = np.linalg.solve(h, c @ slope)
  return Point(
    x=x,
    loss=pull @ (y - centre) / 2 + decay * x @ x / 2,
    slope=slope,
    pull=pull @ np.linalg.solve(h, pull),
    lag=_norm(np.linalg.solve(h, moves)) / _norm(moves),
    grip=grip,
  )


def _walk(problem, x, count):
  """Points with steps and curvatures; a rejected trial repeats the last one."""
  last = _measure(problem, x)
  steepest, length = _norm(last.slope), 0.1 * _norm(x) / _norm(last.slope)
  points, steps, curvatures = [last], [0.0], [0.0]
  for _ in range(count - 1):
    new = _measure(problem, last.x - length * last.slope)
    moved, change = last.x - new.x, _norm(new.slope - last.slope)
    accepted = new.loss <= last.loss - last.slope @ moved / 4
    curvature = change / _norm(moved)
    known = accepted and change > steepest / 1000
    points.append(new if accepted else last)
    steps.append(length if accepted else 0.0)
    curvatures.append(curvature if known else 0.0)
    if not accepted:
      length /= 4
    else:
      length = min(4 * length, 1 / curvature if known else math.inf)
    last = points[-1]
  return points, np.array(steps), np.array(curvatures)


def _flow_times(points, steps, room):
  """Times of gradient flow, whose slope falls linearly within a step."""
  times = [0.0]
  end = points[-1].loss
  for before, after, step in zip(points, points[1:], steps[1:]):
    left = before.loss - end
    ratio = _norm(after.slope) / _norm(before.slope)
    if left <= room or not step:
      times.append(0.0)
      continue
    # A loss within the tolerance is at the end: its slope falls no further.
    ratio = max(ratio, math.sqrt(room / left))
    slower = 1 if abs(ratio - 1) < 1e-3 else math.log(ratio) / (ratio - 1)
    times.append(step * slower)
  return np.array(times)


def suggest(
  problem: Quadratic,
  x: np.ndarray,
  *,
  goal: str,
  number: float,
  points: int = 12,
  safety: float = 0.5,
  momentum: float = 0.9,
) -> Settings:
  """Settings from a walk.

  Args:
    problem: the quadratic.
    x: the start.
    goal: gap, accuracy or penalty.
    number: its value.
    points: the number of points of the walk.
    safety: s.
    momentum: the largest momentum.
  """
  walked, steps, curvatures = _walk(problem, x, points)
  losses = np.array([p.loss for p in walked])
  room = (losses[0] - losses[-1]) / 100
  room = min(room, number) if goal == 'accuracy' else room
  pull = max(p.pull for p in walked if p.loss <= losses[-1] + room)
  penalty = {
    'penalty': number,
    'accuracy': max(1, pull / number),
    'gap': max(1, math.sqrt(pull / (2 * number))),
  }[goal]
  assert penalty >= 1  # Without a rescaled value sequence.
  lower = safety / (_norm(problem.q) / penalty + _norm(problem.h))
  slow = lower / np.array([p.lag for p in walked])
  momentum = min(momentum, max(0, 1 - math.sqrt(slow[-1])) ** 2)
  lags = (1 - momentum) / slow + 2 * momentum / (1 - momentum)
  known = curvatures.copy()
  for i in range(1, points):
    known[i] = curvatures[i] or known[i - 1]
  bend = max(known * (1 + 4 * lags))
  grips = np.array([p.grip for p in walked])
  first = min(max(2 * bend / max(grips), 1), penalty)
  rate = min(max(steps), safety / (bend + first * max(grips) / 2))
  done = _flow_times(walked, steps, room) @ (1 / rate + first * grips)
  settled = math.ceil(1.25 * done + 10 * lags[-1])
  ramp = settled // 2 if first < penalty else 0
  return Settings(
    penalty=penalty,
    first_penalty=first,
    ramp_begin=settled,
    ramp=ramp,
    updates=settled + 2 * ramp,
    upper=rate * first,
    lower=lower,
    value=lower,
    momentum=momentum,
    gap=pull / (2 * penalty**2),
    loss=losses[-1],
    hypergradient_curvature=max(curvatures),
    upper_curvature=_norm(problem.q),
    lower_curvature=_norm(problem.h),
    lag=lags[-1],
  )
