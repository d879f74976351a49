"""Aggregators in exact rational arithmetic, by trying all faces."""

import fractions
import itertools

import numpy as np


def _solve(matrix, right):
  """Solves a regular system of fractions by elimination."""
  table = [[*row, value] for row, value in zip(matrix, right, strict=True)]
  size = len(table)
  for k in range(size):
    pivot = next(i for i in range(k, size) if table[i][k] != 0)
    table[k], table[pivot] = table[pivot], table[k]
    for i in range(size):
      if i != k:
        factor = table[i][k] / table[k][k]
        table[i] = [
          a - factor * b for a, b in zip(table[i], table[k], strict=True)
        ]
  return [table[k][-1] / table[k][k] for k in range(size)]


def _nonnegative_qp(matrix, linear):
  """Minimises z' H z / 2 - b' z over z >= 0: the face with valid signs."""
  size = len(linear)
  for count in range(size + 1):
    for face in itertools.combinations(range(size), count):
      square = [[matrix[i][j] for j in face] for i in face]
      inside = _solve(square, [linear[i] for i in face])
      if min(inside, default=0) < 0:
        continue
      point = [fractions.Fraction(0)] * size
      for i, value in zip(face, inside, strict=True):
        point[i] = value
      slopes = [_dot(row, point) - b for row, b in zip(matrix, linear)]
      if min(slopes) >= 0:
        return point
  raise AssertionError('The rows depend on each other.')


def _dot(a, b):
  return sum((x * y for x, y in zip(a, b, strict=True)), fractions.Fraction(0))


def _gramian(rows):
  rows = [[fractions.Fraction(float(x)) for x in row] for row in rows]
  return rows, [[_dot(a, b) for b in rows] for a in rows]


def _weigh(weights, rows):
  return np.array(
    [float(_dot(weights, column)) for column in zip(*rows, strict=True)]
  )


def mgda(rows, regularisation=0):
  """The shortest vector of the hull, with `regularisation` times I added."""
  rows, matrix = _gramian(rows)
  for i in range(len(rows)):
    matrix[i][i] += fractions.Fraction(regularisation)
  point = _nonnegative_qp(matrix, [fractions.Fraction(1)] * len(rows))
  total = sum(point)
  return _weigh([value / total for value in point], rows)


def dual_proj(rows, preference, ridge=1e-6):
  """Projects a weighted sum onto the directions without conflicts."""
  rows, matrix = _gramian(rows)
  for i in range(len(rows)):
    matrix[i][i] *= 1 + fractions.Fraction(ridge)
  exact_weights = [fractions.Fraction(float(p)) for p in preference]
  lift = _nonnegative_qp(matrix, [-_dot(row, exact_weights) for row in matrix])
  return _weigh([p + v for p, v in zip(exact_weights, lift, strict=True)], rows)


def upgrad(rows, ridge=1e-6):
  """The mean of all rows, each projected."""
  each = np.eye(len(rows))
  return np.mean([dual_proj(rows, row, ridge) for row in each], axis=0)
