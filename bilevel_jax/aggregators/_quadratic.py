"""Small convex programs on products of rows, exact, compiled and batched."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _sequences, _trees, types


def solve(
  matrix: chex.Array, right: chex.Array, free: chex.Array | None = None
) -> chex.Array:
  """Solves a positive definite system for some of its variables.

  By elimination in a loop: for a few objectives it compiles in a fraction of
  the time that a factorisation takes, and costs as little.

  Args:
    matrix: (n, n), positive definite.
    right: (n,).
    free: which variables are solved for, (n,); the others are zero. All by
      default.

  Returns:
    (n,); the solution where a variable is free, elsewhere what is left of the
    right-hand side.
  """
  size = right.shape[0]
  places = jnp.arange(size)

  def eliminate(k, table):
    row = table[k] / table[k, k]
    others = table - table[:, k, None] * row
    swept = jnp.where((places == k)[:, None], row, others)
    return swept if free is None else jnp.where(free[k], swept, table)

  table = jnp.concatenate([matrix, right[:, None]], axis=1)
  return jax.lax.fori_loop(0, size, eliminate, table)[:, -1]


class Inverse(NamedTuple):
  """The pseudo-inverse of a triangular matrix, and whether it has full rank.

  Attributes:
    matrix: (n, n).
    regular: whether nothing was left out.
  """

  matrix: chex.Array
  regular: chex.Array


def triangular_inverse(lower: chex.Array) -> Inverse:
  r"""Inverts a lower triangular matrix with rows of length one or zero.

  By substitution, which keeps the digits of small entries on the diagonal, if
  it is regular. Otherwise by singular values, where those below
  :math:`(n + 2) \epsilon` times the largest count as zero: a factor of rows is
  known to that rounding.
  """
  size, dtype = lower.shape[0], lower.dtype
  room = (size + 2) * float(jnp.finfo(dtype).eps)
  regular = jnp.all(jnp.abs(jnp.diagonal(lower)) > room)
  eye = jnp.eye(size, dtype=dtype)
  exact = jax.scipy.linalg.solve_triangular(
    jnp.where(regular, lower, eye), eye, lower=True
  )
  cut = jnp.linalg.pinv(lower, rtol=room)
  return Inverse(jnp.where(regular, exact, cut), regular)


def loop(
  going: Callable[[Any], Any],
  step: Callable[[Any], Any],
  start: Any,
  data: Any,
) -> Any:
  """A while loop from constants, in a `jax.shard_map` over `data` as well."""
  axes = frozenset().union(*map(_sequences.varying_axes, jax.tree.leaves(data)))
  start = jax.tree.map(lambda x: _sequences.vary(jnp.asarray(x), axes), start)
  return jax.lax.while_loop(going, step, start)


def nonnegative_qp(matrix: chex.Array, linear: chex.Array) -> chex.Array:
  r"""Minimises a quadratic over nonnegative variables, by an active set.

  .. math::
    \min_{z \ge 0} \tfrac{1}{2} z^\top H z - b^\top z

  The method of Lawson and Hanson on the normal equations: variables enter one
  at a time, where the slope is steepest, and leave where they would become
  negative. Each iteration solves one system; finitely many give the minimiser.

  Args:
    matrix: :math:`H`, positive semidefinite, (n, n), of the order of one.
    linear: :math:`b`, (n,).

  Returns:
    The minimiser, (n,).
  """
  size, dtype = linear.shape[0], linear.dtype
  spacing = size * jnp.finfo(dtype).eps
  # Keeps the systems solvable where rows depend on each other.
  matrix = matrix + 4 * spacing * jnp.eye(size, dtype=dtype)
  tolerance = 16 * spacing * jnp.max(jnp.abs(linear))

  def step(carry):
    point, free, _, count = carry
    solved = solve(matrix, linear, free)
    leaving = free & (solved <= 0)
    # As far towards the solution as all variables stay nonnegative.
    gap = jnp.where(leaving, point - solved, 1)
    room = jnp.where(leaving, point / jnp.where(gap > 0, gap, 1), jnp.inf)
    nearest = jnp.min(room)
    blocked = nearest < jnp.inf
    share = jnp.minimum(nearest, 1)
    moved = jnp.where(free, point + share * (solved - point), 0)
    emptied = leaving & (room <= share)
    point = jnp.where(emptied, 0, jnp.maximum(moved, 0))
    slope = jnp.where(free, -jnp.inf, solved)
    enters = jnp.argmax(slope)
    steep = slope[enters] > tolerance
    entered = free | (steep & (jnp.arange(size) == enters))
    free = jnp.where(blocked, free & ~emptied, entered)
    return point, free, blocked | steep, count + 1

  def going(carry):
    return carry[2] & (carry[3] < 6 * size + 8)

  start = (jnp.zeros(size, dtype), jnp.zeros(size, bool), True, 0)
  return loop(going, step, start, (matrix, linear))[0]


def min_norm_weights(found: types.Gramian) -> chex.Array:
  r"""Weights of the shortest vector in the convex hull of rows.

  .. math::
    \min_{w} \| J^\top w \|^2, \qquad w \ge 0, \quad \textstyle\sum_m w_m = 1

  Args:
    found: lengths and cosines of the rows.

  Returns:
    The weights, (objectives,); equal ones where all rows are zero.
  """
  lengths = found.lengths
  shortest = jnp.min(lengths)
  # Of rows of length one, by how much each counts in the sum of weights. Where
  # a row vanishes, it and its like are the hull's shortest vectors.
  counts = _trees.ratio(shortest, lengths)
  counts = jnp.where(lengths > shortest, counts, 1)
  # The minimiser over a simplex is, up to its scale, that of another quadratic
  # over nonnegative variables.
  pulls = nonnegative_qp(found.cosines + counts[:, None] * counts, counts)
  weights = pulls * counts
  none = jnp.max(lengths) == 0
  return jnp.where(none, 1 / lengths.shape[0], weights / jnp.sum(weights))


def onto_simplex(point: chex.Array) -> chex.Array:
  """The nearest point of the simplex; no sorting, so that it compiles soon."""
  above = point[None, :] >= point[:, None]
  excess = jnp.sum(jnp.where(above, point, 0), axis=1) - 1
  return jnp.maximum(point - jnp.max(excess / jnp.sum(above, axis=1)), 0)
