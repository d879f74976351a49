"""Exact solvers for small quadratic programs on inner products of rows."""

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

  Elimination in a loop: for a few objectives it runs as fast as a factorisation
  and compiles in a fraction of the time.

  Args:
    matrix: (n, n), positive definite.
    right: (n,).
    free: mask of the variables to solve for, (n,); the others are zero. By
      default all are free.

  Returns:
    (n,); the solution of the free variables, and the residual of the
    right-hand side elsewhere.
  """
  size = right.shape[0]
  indices = jnp.arange(size)

  def eliminate(k, table):
    row = table[k] / table[k, k]
    others = table - table[:, k, None] * row
    swept = jnp.where((indices == k)[:, None], row, others)
    return swept if free is None else jnp.where(free[k], swept, table)

  table = jnp.concatenate([matrix, right[:, None]], axis=1)
  return jax.lax.fori_loop(0, size, eliminate, table)[:, -1]


class Inverse(NamedTuple):
  """The pseudo-inverse of a triangular matrix, and whether it has full rank.

  Attributes:
    matrix: (n, n).
    regular: whether the matrix has full rank.
  """

  matrix: chex.Array
  regular: chex.Array


def triangular_inverse(lower: chex.Array) -> Inverse:
  r"""Inverts a lower triangular matrix with rows of length one or zero.

  A regular matrix by substitution, which keeps the digits of small diagonal
  entries. Otherwise by singular values; those below :math:`(n + 2) \epsilon`
  times the largest, the rounding of a factor of rows, count as zero.
  """
  size, dtype = lower.shape[0], lower.dtype
  tolerance = (size + 2) * float(jnp.finfo(dtype).eps)
  regular = jnp.all(jnp.abs(jnp.diagonal(lower)) > tolerance)
  eye = jnp.eye(size, dtype=dtype)
  exact = jax.scipy.linalg.solve_triangular(
    jnp.where(regular, lower, eye), eye, lower=True
  )
  truncated = jnp.linalg.pinv(lower, rtol=tolerance)
  return Inverse(jnp.where(regular, exact, truncated), regular)


def loop(
  condition: Callable[[Any], Any],
  step: Callable[[Any], Any],
  start: Any,
  data: Any,
) -> Any:
  """A while loop from constants that works in a `jax.shard_map` over `data`."""
  axes = frozenset().union(*map(_sequences.varying_axes, jax.tree.leaves(data)))
  start = jax.tree.map(lambda x: _sequences.vary(jnp.asarray(x), axes), start)
  return jax.lax.while_loop(condition, step, start)


def _active_set(
  solve_free: Callable[[chex.Array], tuple[chex.Array, chex.Array, Any]],
  size: int,
  data: tuple[chex.Array, ...],
  first: chex.Array | None = None,
) -> tuple[chex.Array, Any]:
  """Lawson and Hanson's method: the minimiser and its image.

  Variables enter one at a time, where the slope is steepest, and leave when
  they would become negative. Each iteration solves one system, and finitely
  many reach the minimiser.

  Args:
    solve_free: maps the mask of free variables to (solved, tolerance, image).
      `solved` has the minimiser over the free variables, and the descent slope
      of the others; `tolerance` is the rounding of slopes; `image` has further
      arrays that depend on this minimiser.
    size: the number of variables.
    data: arrays on which `solve_free` depends.
    first: the initial point; by default zero, without free variables.
  """
  dtype = data[0].dtype

  def step(carry):
    point, free, _, count, _ = carry
    solved, tolerance, image = solve_free(free)
    leaving = free & (solved <= 0)
    # Moves towards the solution until a variable becomes zero.
    gap = jnp.where(leaving, point - solved, 1)
    reach = jnp.where(leaving, point / jnp.where(gap > 0, gap, 1), jnp.inf)
    nearest = jnp.min(reach)
    blocked = nearest < jnp.inf
    share = jnp.minimum(nearest, 1)
    moved = jnp.where(free, point + share * (solved - point), 0)
    emptied = leaving & (reach <= share)
    point = jnp.where(emptied, 0, jnp.maximum(moved, 0))
    slope = jnp.where(free, -jnp.inf, solved - tolerance)
    enters = jnp.argmax(slope)
    steep = slope[enters] > 0
    entered = free | (steep & (jnp.arange(size) == enters))
    free = jnp.where(blocked, free & ~emptied, entered)
    return point, free, blocked | steep, count + 1, image

  def condition(carry):
    return carry[2] & (carry[3] < 6 * size + 8)

  if first is None:
    first = jnp.zeros(size, dtype)
  free = first > 0
  shapes = jax.eval_shape(solve_free, free)[2]
  image = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  start = (first, free, True, 0, image)
  point, _, _, _, image = loop(condition, step, start, data)
  return point, image


def nonnegative_qp(matrix: chex.Array, linear: chex.Array) -> chex.Array:
  r"""Minimises a quadratic over nonnegative variables by an active set.

  .. math::
    \min_{z \ge 0} \tfrac{1}{2} z^\top H z - b^\top z

  Args:
    matrix: :math:`H`, positive semidefinite, (n, n), of the order of one.
    linear: :math:`b`, (n,).

  Returns:
    The minimiser, (n,).
  """
  size, dtype = linear.shape[0], linear.dtype
  spacing = size * jnp.finfo(dtype).eps
  # Keeps the systems solvable for linearly dependent rows.
  matrix = matrix + 4 * spacing * jnp.eye(size, dtype=dtype)
  tolerance = 16 * spacing * jnp.max(jnp.abs(linear))
  solve_free = lambda free: (solve(matrix, linear, free), tolerance, ())
  return _active_set(solve_free, size, (matrix, linear))[0]


def constrained_qp(
  matrix: chex.Array,
  linear: chex.Array,
  equations: chex.Array,
  right: chex.Array,
  start: chex.Array,
) -> chex.Array:
  r"""Minimises a quadratic over nonnegative solutions of linear equations.

  .. math::
    \min_{z \ge 0, \; A z = c} \tfrac{1}{2} z^\top H z - b^\top z

  An active-set method like `nonnegative_qp`, from a feasible point.

  Args:
    matrix: :math:`H`, positive semidefinite, (n, n), of the order of one.
    linear: :math:`b`, (n,).
    equations: :math:`A`, (m, n), whose rows have largest entries of about one.
    right: :math:`c`, (m,).
    start: a vertex of the feasible set, (n,), with at most m positive entries.

  Returns:
    The minimiser, (n,).
  """
  size, dtype = linear.shape[0], linear.dtype
  spacing = size * jnp.finfo(dtype).eps
  # The squared equations are constant on the feasible set and make the systems
  # regular.
  eye = jnp.eye(size, dtype=dtype)
  augmented = matrix + 4 * spacing * eye + equations.T @ equations
  sides = jnp.concatenate([(linear + right @ equations)[None], equations])

  def solve_free(free):
    solved = jax.vmap(lambda side: solve(augmented, side, free))(sides)
    inside = jnp.where(free, solved, 0)
    residual = right - equations @ inside[0]
    schur = equations @ inside[1:].T
    ridge = jnp.finfo(dtype).eps * jnp.trace(schur)
    schur = schur + ridge * jnp.eye(len(right), dtype=dtype)
    multipliers = solve(schur, residual)
    sizes = jnp.abs(sides[0]) + jnp.abs(multipliers) @ jnp.abs(equations)
    tolerance = 16 * spacing * jnp.max(sizes)
    return solved[0] + multipliers @ solved[1:], tolerance, ()

  data = (matrix, linear, equations, right)
  return _active_set(solve_free, size, data, start)[0]


class Nearest(NamedTuple):
  """The minimiser of a quadratic with a known factor, and its image.

  Attributes:
    point: z, (n,).
    image: A z, (m,), accurate even if the terms of this product cancel.
  """

  point: chex.Array
  image: chex.Array


def nonnegative_factored(factor: chex.Array, linear: chex.Array) -> Nearest:
  r"""As `nonnegative_qp` for :math:`H = A^\top A`, without forming H.

  .. math::
    \min_{z \ge 0} \tfrac{1}{2} \| A z \|^2 - b^\top z

  With QR factorisations, the relative error of :math:`A z` is a few roundings
  times the condition number of :math:`A`; from H it would be times its square.

  Args:
    factor: :math:`A`, of full rank, (m, n) with m >= n.
    linear: :math:`b`, (n,).
  """
  size, dtype = linear.shape[0], linear.dtype
  spacing = 2 * (size + 2) * jnp.finfo(dtype).eps
  triangular = jax.scipy.linalg.solve_triangular

  def solve_free(free):
    # Fixed columns become unit vectors orthogonal to all others.
    fixed = jnp.diag(1 - free.astype(dtype))
    tall = jnp.concatenate([jnp.where(free, factor, 0), fixed])
    basis, upper = jnp.linalg.qr(tall)
    along = triangular(upper, jnp.where(free, linear, 0), trans=1)
    image = basis[: factor.shape[0]] @ along
    sizes = jnp.abs(linear) + jnp.abs(image) @ jnp.abs(factor)
    solved = jnp.where(free, triangular(upper, along), linear - image @ factor)
    return solved, spacing * sizes, image

  return Nearest(*_active_set(solve_free, size, (factor, linear)))


def full_rank(lower: chex.Array, root: chex.Numeric = 0.0) -> chex.Array:
  r"""Columns :math:`A` with :math:`A^\top A = L L^\top + r^2 I`, (2n, n).

  For a triangular matrix with rows of length one or less. The root is raised to
  at least their rounding, which bounds the condition number by its inverse.

  Args:
    lower: :math:`L`, (n, n).
    root: :math:`r`, one number or one for each row.
  """
  size, dtype = lower.shape[0], lower.dtype
  rounding = (size + 2) * jnp.finfo(dtype).eps
  diagonal = jnp.maximum(jnp.asarray(root, dtype), rounding)
  return jnp.concatenate([lower.T, diagonal * jnp.eye(size, dtype=dtype)])


def separate(cosines: chex.Array) -> chex.Array:
  r"""Whether rows with these cosines are far from linearly dependent.

  If so, the smallest eigenvalue is above :math:`\epsilon^{1/3}`, and results
  from the cosines keep more than half of their digits. Zero rows do not count.
  """
  size, dtype = cosines.shape[0], cosines.dtype
  eye = jnp.eye(size, dtype=dtype)
  # Transposed, so that LAPACK's layout is not forced on the cosines.
  matrix = jnp.where(eye > 0, 1, cosines).T
  lower = jnp.linalg.cholesky(matrix, symmetrize_input=False)
  inverse = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
  # The sum of the inverse eigenvalues; NaN if there is no root.
  return jnp.sum(inverse**2) < jnp.finfo(dtype).eps ** (-1 / 3)


def _row_shares(lengths: chex.Array) -> chex.Array:
  """How much each unit row counts in the sum of weights, (objectives,).

  If a row is zero, the zero rows are the shortest vectors of the hull.
  """
  shortest = jnp.min(lengths)
  return jnp.where(lengths > shortest, _trees.ratio(shortest, lengths), 1)


def min_norm_weights(gram: types.Gramian) -> chex.Array:
  r"""Weights of the shortest vector in the convex hull of rows.

  .. math::
    \min_{w} \| J^\top w \|^2, \qquad w \ge 0, \quad \textstyle\sum_m w_m = 1

  Args:
    gram: lengths and cosines of the rows.

  Returns:
    The weights, (objectives,), equal if all rows are zero.
  """
  lengths, shares = gram.lengths, _row_shares(gram.lengths)
  # Up to its scale, the minimiser over a simplex is that of another quadratic
  # over nonnegative variables.
  matrix = gram.cosines + shares[:, None] * shares
  weights = nonnegative_qp(matrix, shares) * shares
  all_zero = jnp.max(lengths) == 0
  return jnp.where(all_zero, 1 / lengths.shape[0], weights / jnp.sum(weights))


def min_norm(
  lengths: chex.Array, columns: chex.Array
) -> tuple[chex.Array, chex.Array]:
  """As `min_norm_weights`, from a factor of the cosines.

  The shortest vector whose product with each row is at least one has the same
  direction. Unlike the weighted sum, its terms do not cancel if the hull is
  close to zero.

  Args:
    lengths: norms of the rows, (objectives,).
    columns: the rows divided by their lengths in an orthonormal basis, of full
      rank, (coordinates, objectives).

  Returns:
    The shortest vector of the hull in this basis, and the weights.
  """
  shares = _row_shares(lengths)
  point, image = nonnegative_factored(columns, shares)
  weights = point * shares
  total = jnp.sum(weights)
  all_zero = jnp.max(lengths) == 0
  weights = jnp.where(all_zero, 1 / lengths.shape[0], weights / total)
  return jnp.min(lengths) * (image / total), weights


def onto_simplex(point: chex.Array) -> chex.Array:
  """The nearest point of the simplex, without sorting to compile faster."""
  above = point[None, :] >= point[:, None]
  excess = jnp.sum(jnp.where(above, point, 0), axis=1) - 1
  return jnp.maximum(point - jnp.max(excess / jnp.sum(above, axis=1)), 0)
