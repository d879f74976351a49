"""Small convex programs on a Gram matrix, exact, compiled and batched."""

import chex
import jax
import jax.numpy as jnp


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
  size = linear.shape[0]
  dtype = linear.dtype
  spacing = jnp.finfo(dtype).eps
  # Keeps the factorisation going where rows depend on each other.
  ridge = 4 * spacing * size * jnp.maximum(jnp.trace(matrix) / size, spacing)
  matrix = matrix + ridge * jnp.eye(size, dtype=dtype)
  tolerance = 16 * spacing * size * jnp.max(jnp.abs(linear))

  def restricted(free):
    both = free[:, None] & free[None, :]
    kept = jnp.where(both, matrix, 0) + jnp.diag((~free).astype(dtype))
    factor = jax.scipy.linalg.cho_factor(kept, lower=True)
    return jax.scipy.linalg.cho_solve(factor, jnp.where(free, linear, 0))

  def going(carry):
    _, _, done, count = carry
    return ~done & (count < 6 * size + 8)

  def step(carry):
    point, free, _, count = carry
    target = restricted(free)
    leaving = free & (target <= 0)
    blocked = jnp.any(leaving)
    # As far towards the target as all variables stay nonnegative.
    room = jnp.where(leaving, point / (point - target + 1e-30), jnp.inf)
    share = jnp.where(blocked, jnp.clip(jnp.min(room), 0, 1), 1)
    point = jnp.where(free, point + share * (target - point), 0)
    emptied = leaving & (room <= share)
    point = jnp.where(emptied, 0, jnp.maximum(point, 0))
    slope = jnp.where(free, -jnp.inf, linear - matrix @ point)
    enters = jnp.argmax(slope)
    steep = slope[enters] > tolerance
    one = jnp.arange(size) == enters
    free = jnp.where(blocked, free & ~emptied, free | (one & steep))
    return point, free, ~blocked & ~steep, count + 1

  zeros = jnp.zeros_like(linear)
  start = (
    zeros,
    zeros > 0,
    zeros[0] > 0,
    jnp.int32(0) + 0 * zeros[0].astype(jnp.int32),
  )
  return jax.lax.while_loop(going, step, start)[0]


def normalised(gramian: chex.Array) -> chex.Array:
  """A Gram matrix divided by its mean diagonal; zero stays zero."""
  scale = jnp.trace(gramian) / gramian.shape[0]
  return gramian / jnp.where(scale > 0, scale, 1)


def min_norm_weights(gramian: chex.Array) -> chex.Array:
  r"""Weights of the shortest vector in the convex hull of rows.

  .. math::
    \min_{w} w^\top G w, \qquad w \ge 0, \quad \textstyle\sum_m w_m = 1

  Args:
    gramian: :math:`G = J J^\top`, (objectives, objectives).

  Returns:
    The weights, (objectives,); equal ones where all rows are zero.
  """
  size = gramian.shape[0]
  gramian = normalised(gramian)
  if size == 1:
    return jnp.ones_like(gramian[0])
  if size == 2:
    # The point of a segment that is nearest to the origin.
    between = gramian[0, 0] + gramian[1, 1] - 2 * gramian[0, 1]
    share = (gramian[1, 1] - gramian[0, 1]) / jnp.where(between > 0, between, 1)
    share = jnp.where(between > 0, jnp.clip(share, 0, 1), 0.5)
    return jnp.stack([share, 1 - share])
  # The minimiser over a simplex is, up to its scale, that of another quadratic
  # over nonnegative variables.
  ones = jnp.ones_like(gramian[0])
  found = nonnegative_qp(gramian + 1, ones)
  total = jnp.sum(found)
  fine = (total > 0) & (jnp.trace(gramian) > 0)
  return jnp.where(fine, found / jnp.where(fine, total, 1), 1 / size)
