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


def _active_set(
  solve_free: Callable[[chex.Array], tuple[chex.Array, chex.Array, Any]],
  size: int,
  data: tuple[chex.Array, ...],
  first: chex.Array | None = None,
) -> tuple[chex.Array, Any]:
  """Lawson and Hanson's method: the minimiser, and what belongs to it.

  Variables enter one at a time, where the slope is steepest, and leave where
  they would become negative. Each iteration solves one system; finitely many
  give the minimiser.

  Args:
    solve_free: from the free variables to (solved, room, image): the minimiser
      over them where a variable is free, elsewhere the slope by which the
      objective falls; the rounding of slopes; arrays that belong to this
      minimiser.
    size: the number of variables.
    data: arrays on which `solve_free` depends.
    first: where it starts; by default zero, and no variable is free.
  """
  dtype = data[0].dtype

  def step(carry):
    point, free, _, count, _ = carry
    solved, room, image = solve_free(free)
    leaving = free & (solved <= 0)
    # As far towards the solution as all variables stay nonnegative.
    gap = jnp.where(leaving, point - solved, 1)
    reach = jnp.where(leaving, point / jnp.where(gap > 0, gap, 1), jnp.inf)
    nearest = jnp.min(reach)
    blocked = nearest < jnp.inf
    share = jnp.minimum(nearest, 1)
    moved = jnp.where(free, point + share * (solved - point), 0)
    emptied = leaving & (reach <= share)
    point = jnp.where(emptied, 0, jnp.maximum(moved, 0))
    slope = jnp.where(free, -jnp.inf, solved - room)
    enters = jnp.argmax(slope)
    steep = slope[enters] > 0
    entered = free | (steep & (jnp.arange(size) == enters))
    free = jnp.where(blocked, free & ~emptied, entered)
    return point, free, blocked | steep, count + 1, image

  def going(carry):
    return carry[2] & (carry[3] < 6 * size + 8)

  if first is None:
    first = jnp.zeros(size, dtype)
  free = first > 0
  shapes = jax.eval_shape(solve_free, free)[2]
  image = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  start = (first, free, True, 0, image)
  point, _, _, _, image = loop(going, step, start, data)
  return point, image


def nonnegative_qp(matrix: chex.Array, linear: chex.Array) -> chex.Array:
  r"""Minimises a quadratic over nonnegative variables, by an active set.

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
  # Keeps the systems solvable where rows depend on each other.
  matrix = matrix + 4 * spacing * jnp.eye(size, dtype=dtype)
  room = 16 * spacing * jnp.max(jnp.abs(linear))
  solve_free = lambda free: (solve(matrix, linear, free), room, ())
  return _active_set(solve_free, size, (matrix, linear))[0]


def constrained_qp(
  matrix: chex.Array,
  linear: chex.Array,
  equations: chex.Array,
  right: chex.Array,
  start: chex.Array,
) -> chex.Array:
  r"""Minimises a quadratic over nonnegative variables that satisfy equations.

  .. math::
    \min_{z \ge 0, \; A z = c} \tfrac{1}{2} z^\top H z - b^\top z

  By an active set, from a point that satisfies them, as `nonnegative_qp`.

  Args:
    matrix: :math:`H`, positive semidefinite, (n, n), of the order of one.
    linear: :math:`b`, (n,).
    equations: :math:`A`, (m, n), whose rows have largest entries of about one.
    right: :math:`c`, (m,).
    start: a vertex of the set, (n,): as many entries as equations, or fewer,
      are positive, and the others zero.

  Returns:
    The minimiser, (n,).
  """
  size, dtype = linear.shape[0], linear.dtype
  spacing = size * jnp.finfo(dtype).eps
  # On the set, the squares of the equations change nothing; they make the
  # systems regular where the matrix is not.
  eye = jnp.eye(size, dtype=dtype)
  raised = matrix + 4 * spacing * eye + equations.T @ equations
  sides = jnp.concatenate([(linear + right @ equations)[None], equations])

  def solve_free(free):
    solved = jax.vmap(lambda side: solve(raised, side, free))(sides)
    inside = jnp.where(free, solved, 0)
    lacking = right - equations @ inside[0]
    schur = equations @ inside[1:].T
    ridge = jnp.finfo(dtype).eps * jnp.trace(schur)
    steady = schur + ridge * jnp.eye(len(right), dtype=dtype)
    multipliers = solve(steady, lacking)
    sizes = jnp.abs(sides[0]) + jnp.abs(multipliers) @ jnp.abs(equations)
    room = 16 * spacing * jnp.max(sizes)
    return solved[0] + multipliers @ solved[1:], room, ()

  data = (matrix, linear, equations, right)
  return _active_set(solve_free, size, data, start)[0]


class Nearest(NamedTuple):
  """The minimiser of a quadratic with a factor, and its image.

  Attributes:
    point: z, (n,).
    image: A z, (m,), also where the terms of this product cancel.
  """

  point: chex.Array
  image: chex.Array


def nonnegative_factored(factor: chex.Array, linear: chex.Array) -> Nearest:
  r"""As `nonnegative_qp` for :math:`H = A^\top A`, from the factor alone.

  .. math::
    \min_{z \ge 0} \tfrac{1}{2} \| A z \|^2 - b^\top z

  By QR factorisations: the relative error of :math:`A z` is a few roundings
  times the condition number of :math:`A`; from :math:`H`, times its square.

  Args:
    factor: :math:`A`, of full rank, (m, n) with m >= n.
    linear: :math:`b`, (n,).
  """
  size, dtype = linear.shape[0], linear.dtype
  spacing = 2 * (size + 2) * jnp.finfo(dtype).eps
  triangular = jax.scipy.linalg.solve_triangular

  def solve_free(free):
    # Columns that are not free become unit vectors apart from all others.
    apart = jnp.diag(1 - free.astype(dtype))
    tall = jnp.concatenate([jnp.where(free, factor, 0), apart])
    basis, upper = jnp.linalg.qr(tall)
    along = triangular(upper, jnp.where(free, linear, 0), trans=1)
    image = basis[: factor.shape[0]] @ along
    room = jnp.abs(linear) + jnp.abs(image) @ jnp.abs(factor)
    solved = jnp.where(free, triangular(upper, along), linear - image @ factor)
    return solved, spacing * room, image

  return Nearest(*_active_set(solve_free, size, (factor, linear)))


def full_rank(lower: chex.Array, root: chex.Numeric = 0.0) -> chex.Array:
  r"""Columns :math:`A` with :math:`A^\top A = L L^\top + r^2 I`, (2n, n).

  For a triangular matrix with rows of length one or less. The root is at least
  their rounding, so that the condition number is below one over this rounding.

  Args:
    lower: :math:`L`, (n, n).
    root: :math:`r`, one number or one for each row.
  """
  size, dtype = lower.shape[0], lower.dtype
  least = (size + 2) * jnp.finfo(dtype).eps
  apart = jnp.maximum(jnp.asarray(root, dtype), least)
  return jnp.concatenate([lower.T, apart * jnp.eye(size, dtype=dtype)])


def separate(cosines: chex.Array) -> chex.Array:
  r"""Whether rows with these cosines are far from linearly dependent.

  If so, the smallest eigenvalue is above :math:`\epsilon^{1/3}`, and what is
  computed from the cosines keeps more than half of their digits. Rows of zeros
  do not count.
  """
  size, dtype = cosines.shape[0], cosines.dtype
  eye = jnp.eye(size, dtype=dtype)
  # Transposed, so that the layout that LAPACK takes is not that of the cosines.
  matrix = jnp.where(eye > 0, 1, cosines).T
  lower = jnp.linalg.cholesky(matrix, symmetrize_input=False)
  inverse = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
  # The sum of the inverse eigenvalues; not a number if there is no root.
  return jnp.sum(inverse**2) < jnp.finfo(dtype).eps ** (-1 / 3)


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


def min_norm(
  lengths: chex.Array, columns: chex.Array
) -> tuple[chex.Array, chex.Array]:
  """As `min_norm_weights`, from a factor of the cosines.

  Of all vectors with a product of at least one with each row, the shortest has
  the same direction. Unlike the weights it does not come from terms that
  cancel where the hull is close to zero.

  Args:
    lengths: norms of the rows, (objectives,).
    columns: the rows divided by their lengths in an orthonormal basis, of full
      rank, (coordinates, objectives).

  Returns:
    The shortest vector of the hull in this basis, and the weights.
  """
  shortest = jnp.min(lengths)
  counts = _trees.ratio(shortest, lengths)
  counts = jnp.where(lengths > shortest, counts, 1)
  point, image = nonnegative_factored(columns, counts)
  weights = point * counts
  total = jnp.sum(weights)
  none = jnp.max(lengths) == 0
  weights = jnp.where(none, 1 / lengths.shape[0], weights / total)
  return shortest * (image / total), weights


def onto_simplex(point: chex.Array) -> chex.Array:
  """The nearest point of the simplex; no sorting, so that it compiles soon."""
  above = point[None, :] >= point[:, None]
  excess = jnp.sum(jnp.where(above, point, 0), axis=1) - 1
  return jnp.maximum(point - jnp.max(excess / jnp.sum(above, axis=1)), 0)
