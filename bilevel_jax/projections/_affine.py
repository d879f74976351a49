"""Affine sets: solutions of linear equations, dense or matrix-free.

A set provides projections and coordinates of its directions, which the
hypergradient under equality constraints needs.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bilevel_jax import _trees


def is_concrete(tree: Any) -> bool:
  """Whether no leaf of a tree is a tracer."""
  return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True, eq=False)
class AffineSet:
  r"""The solutions of linear equations, as functions of pytrees.

  .. math::
    \{ z : A z + h(x) = c \}, \qquad
    \Pi(z) = (I - A^+ A) z + A^+ (c - h(x))

  Created by `affine_set`, `affine_operator_set` or `consensus_set`. It is
  callable: `set_(z)` projects, or `set_(z, x)` with a coupling h. A may be rank
  deficient.

  Attributes:
    onto: `onto(z, r)`, the point nearest to z with :math:`A z = r`.
    coordinates: :math:`V^\top z`, where the columns of V span the kernel of A.
    lift: `lift(u, like)`, :math:`V u` in the structure of `like`.
    zero: `zero(like)`, zero coordinates.
    apply: :math:`A z`; None if A is implicit.
    transpose: :math:`A^{+\top} z`; None if A is implicit.
    unattained: `unattained(like, r)`, :math:`(I - A A^+) r`, the part of a
      right-hand side outside the range of A; None if A is implicit.
    right: the right-hand side c; None for zero.
    coupling: h, a function of the upper variable; None for zero.
    rounds: communication rounds per use: 1 for a mean over clients.
  """

  onto: Callable[[Any, Any], Any]
  coordinates: Callable[[Any], Any]
  lift: Callable[[Any, Any], Any]
  zero: Callable[[Any], Any]
  apply: Callable[[Any], Any] | None = None
  transpose: Callable[[Any], Any] | None = None
  unattained: Callable[[Any, Any], Any] | None = None
  right: Any = None
  coupling: Callable[[Any], Any] | None = None
  rounds: int = 0

  def __call__(self, point: Any, upper: Any = None) -> Any:
    """The nearest point of the set; a coupled set needs the upper variable."""
    return self.onto(point, self.right_side(point, upper))

  def tangent(self, point: Any) -> Any:
    """The part of a direction along the set, (I - A^+ A) z."""
    return self.lift(self.coordinates(point), point)

  def right_side(self, point: Any, upper: Any = None) -> Any:
    """C - h(x) in the structure of A z; None if A is implicit."""
    if self.apply is None:
      return None
    right = self.right
    if right is None:
      shapes = jax.eval_shape(self.apply, point)
      right = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    if self.coupling is None:
      return right
    if upper is None:
      raise ValueError(
        'the right-hand side of this set depends on the upper variable: call '
        'set_(lower, upper).'
      )
    return jax.tree.map(
      lambda c, h: jnp.asarray(c, h.dtype) - h, right, self.coupling(upper)
    )

  def outside_range(self, point: Any, upper: Any = None) -> chex.Array:
    r"""The fraction of the right-hand side outside the range of A.

    .. math::
      \| (I - A A^+) (c - h(x)) \| / \| c - h(x) \|

    Args:
      point: any point, for its structure.
      upper: the upper variable, for a coupled set.

    Returns:
      A scalar in [0, 1]; if it is above rounding, the set is empty.
    """
    right = self.right_side(point, upper)
    if right is None or self.unattained is None:
      return jnp.zeros([])
    right = jax.tree.map(jnp.asarray, right)
    gap = optax.tree.norm(self.unattained(point, right))
    size = optax.tree.norm(right)
    return _trees.ratio(gap, size)

  def check(self, point: Any, upper: Any = None, name: str = '') -> None:
    """Raises ValueError if the set is empty; checks nothing while traced.

    Args:
      point: any point, for its structure.
      upper: the upper variable, for a coupled set.
      name: the sequence's name, for the error.
    """
    if self.apply is None or not is_concrete((point, upper, self.right)):
      return
    with jax.ensure_compile_time_eval():
      share = self.outside_range(point, upper)
    if not is_concrete(share):
      return
    # Above the rounding of a consistent right-hand side.
    tolerance = float(jnp.finfo(share.dtype).eps) ** 0.5
    if not float(share) <= tolerance:
      what = 'c' if self.coupling is None else 'c - h(x)'
      whose = f' of the sequence {name}' if name else ''
      raise ValueError(
        f'the affine set{whose} is empty: {float(share):.1e} of its right-hand '
        f'side {what} is outside the range of A. Make the equations '
        'consistent: if A is rank deficient, c and every value of h must be in '
        'its range, for instance A times a vector.'
      )


class AffineFactors(NamedTuple):
  """The factors of a matrix, computed once in float64.

  Attributes:
    matrix: A, (m, n).
    row_space: an orthonormal basis of the rows of A, (rank, n).
    null_space: an orthonormal basis of the kernel of A, (n, n - rank).
    range_space: an orthonormal basis of the columns of A, (m, rank).
    weights: A^+ is row_space^T weights; (rank, m).
  """

  matrix: Any
  row_space: Any
  null_space: Any
  range_space: Any
  weights: Any


def affine_factors(
  matrix: Any, *, rank_tolerance: float | None = None
) -> AffineFactors:
  """Factors a matrix for `affine_set` on the host, in float64.

  Args:
    matrix: A, (m, n), a concrete array.
    rank_tolerance: singular values below this times the largest count as zero;
      by default max(m, n) times the spacing of float64 at 1.

  Returns:
    NumPy arrays. Factors of matrices with equal shape and rank can be stacked,
    for `jax.vmap` over sets.

  Raises:
    ValueError: if the input is not a finite matrix.

  Example:
    >>> import bilevel_jax as bj
    >>> factors = bj.projections.affine_factors([[1.0, 1.0], [2.0, 2.0]])
    >>> print(factors.row_space.shape, factors.null_space.shape)
    (1, 2) (2, 1)
  """
  dense = np.asarray(matrix, np.float64)
  if dense.ndim != 2 or not np.all(np.isfinite(dense)):
    raise ValueError(
      f'an affine set takes a finite matrix, got an array of shape '
      f'{dense.shape}.'
    )
  left, sizes, rows = np.linalg.svd(dense, full_matrices=True)
  if rank_tolerance is None:
    rank_tolerance = max(dense.shape) * np.finfo(np.float64).eps
  rank = int(np.sum(sizes > rank_tolerance * max(sizes.max(initial=0), 1e-300)))
  return AffineFactors(
    matrix=dense,
    row_space=rows[:rank],
    null_space=rows[rank:].T,
    range_space=left[:, :rank],
    weights=left[:, :rank].T / sizes[:rank, None],
  )


def affine_set(
  matrix: Any,
  right: Any = None,
  *,
  coupling: Callable[[Any], Any] | None = None,
  rank_tolerance: float | None = None,
) -> AffineSet:
  r"""The solutions of linear equations with a dense matrix.

  .. math::
    \{ z : A z + h(x) = c \}

  The matrix is factored once, in float64 for variables of any dtype. A
  projection multiplies by an orthonormal basis of the rows of A, so the result
  is in the set up to the rounding of its dtype, even if A is ill-conditioned.

  Args:
    matrix: A, (m, n), of any rank, where n is the number of entries in all
      leaves of the sequence, in the order of `jax.tree.leaves`; or
      `AffineFactors`, whose arrays may be traced.
    right: c, (m,); None for zero.
    coupling: h, a function of the upper variable to (m,); None for zero.
    rank_tolerance: as in `affine_factors`.

  Returns:
    An `AffineSet`.

  Raises:
    ValueError: if the input is not a finite matrix; at the start of a solver,
      if the number of columns does not match the sequence, or the equations
      have no solution.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> line = bj.projections.affine_set([[1.0, 1.0]], [2.0])
    >>> print(line(jnp.array([3.0, 1.0])).round(4))
    [2. 0.]

  References:
    Xiao, Shen, Yin and Chen, `Alternating Projected SGD for
    Equality-constrained Bilevel Optimization
    <https://arxiv.org/abs/2211.07096>`_, 2023.
  """
  if isinstance(matrix, AffineFactors):
    factors = matrix
  else:
    factors = affine_factors(matrix, rank_tolerance=rank_tolerance)
  columns = factors.matrix.shape[1]
  if right is not None and not isinstance(right, jax.Array):
    right = np.asarray(right)
  # A constant right-hand side is also inverted once, in float64.
  fixed = None
  if right is not None and is_concrete((right, factors.weights)):
    fixed = np.asarray(factors.weights) @ np.asarray(right, np.float64)

  def flat(point):
    vector, unravel = ravel_pytree(point)
    if vector.shape[0] != columns:
      raise ValueError(
        f'the matrix of an affine set has {columns} columns, but the sequence '
        f'has {vector.shape[0]} entries.'
      )
    # Products use at least single precision.
    wide = jnp.promote_types(vector.dtype, jnp.float32)
    back = lambda out: unravel(out.astype(vector.dtype))
    return vector.astype(wide), back

  def times(factor, vector):
    factor = jnp.asarray(factor, vector.dtype)
    return jnp.matmul(factor, vector, precision=jax.lax.Precision.HIGHEST)

  def onto(point, r):
    vector, back = flat(point)
    if r is right and fixed is not None:
      target = jnp.asarray(fixed, vector.dtype)
    else:
      target = times(factors.weights, jnp.asarray(r, vector.dtype))
    excess = times(factors.row_space, vector) - target
    return back(vector - times(factors.row_space.T, excess))

  def coordinates(point):
    return times(factors.null_space.T, flat(point)[0])

  def lift(u, like):
    _, back = flat(like)
    return back(times(factors.null_space, u))

  def zero(like):
    return jnp.zeros(factors.null_space.shape[1], flat(like)[0].dtype)

  def transpose(point):
    along = times(factors.row_space, flat(point)[0])
    return times(factors.weights.T, along)

  def unattained(like, r):
    r = jnp.asarray(r, flat(like)[0].dtype)
    return r - times(factors.range_space, times(factors.range_space.T, r))

  return AffineSet(
    onto=onto,
    coordinates=coordinates,
    lift=lift,
    zero=zero,
    apply=lambda point: times(factors.matrix, flat(point)[0]),
    transpose=transpose,
    unattained=unattained,
    right=right,
    coupling=coupling,
  )


def affine_operator_set(
  apply: Callable[[Any], Any],
  right: Any = None,
  *,
  adjoint: Callable[[Any], Any] | None = None,
  coupling: Callable[[Any], Any] | None = None,
  steps: int = 200,
  tolerance: float | None = None,
) -> AffineSet:
  r"""The solutions of linear equations given by a function, matrix-free.

  .. math::
    \{ z : A z + h(x) = c \}, \qquad
    A^+ r \text{ by conjugate gradients on the normal equations}

  Conjugate gradients from zero find the solution of least norm, so A may be
  rank deficient.

  Args:
    apply: a linear function from the sequence, any pytree, to a pytree.
    right: c, with the structure of the result of `apply`; None for zero.
    adjoint: the adjoint function; by default `jax.linear_transpose` of `apply`.
    coupling: h, a function of the upper variable to the structure of c; None
      for zero.
    steps: maximal number of conjugate-gradient steps per projection.
    tolerance: relative residual at which the steps end; by default a few float
      spacings at 1.

  Returns:
    An `AffineSet`.

  Raises:
    ValueError: at the start of a solver, if the equations have no solution.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> total = lambda tree: tree['a'].sum() + tree['b']
    >>> set_ = bj.projections.affine_operator_set(total, 6.0)
    >>> point = {'a': jnp.zeros(2), 'b': jnp.float32(0.0)}
    >>> print(set_(point)['a'], set_(point)['b'])
    [2. 2.] 2.0
  """

  def adjoint_at(like):
    if adjoint is not None:
      return adjoint
    transposed = jax.linear_transpose(apply, like)
    return lambda r: transposed(r)[0]

  def resolved_tolerance(tree):
    if tolerance is not None:
      return tolerance
    return float(jnp.finfo(jnp.result_type(*jax.tree.leaves(tree))).eps) ** 0.9

  def least_norm(like, r):
    """A^+ r."""
    return _least_squares(
      apply, adjoint_at(like), r, steps, resolved_tolerance(r)
    )

  def subtract(z, change):
    return jax.tree.map(lambda a, d: a - d.astype(a.dtype), z, change)

  def onto(point, r):
    residual = lambda a, b: a - jnp.asarray(b, a.dtype)
    excess = jax.tree.map(residual, apply(point), r)
    return subtract(point, least_norm(point, excess))

  def tangent(point):
    return subtract(point, least_norm(point, apply(point)))

  return AffineSet(
    onto=onto,
    coordinates=tangent,
    # Projects again, so that the operator of a linear solver is symmetric.
    lift=lambda u, like: tangent(u),
    zero=optax.tree.zeros_like,
    apply=apply,
    transpose=lambda point: _least_squares(
      adjoint_at(point), apply, point, steps, resolved_tolerance(point)
    ),
    unattained=lambda like, r: subtract(r, apply(least_norm(like, r))),
    right=right,
    coupling=coupling,
  )


def _least_squares(apply, back, target, steps, tolerance):
  """A^+ target, by conjugate gradients on the normal equations from zero.

  Unlike for (A A^T) u = target, rounding errors outside the range of A are
  harmless.
  """
  square = lambda tree: optax.tree.norm(tree, squared=True)

  def step(carry):
    x, residual, direction, size, taken = carry
    image = apply(direction)
    length = _trees.ratio(size, square(image))
    x = _trees.add_scaled(x, length, direction)
    residual = _trees.add_scaled(residual, -length, image)
    slope = back(residual)
    new = square(slope)
    direction = _trees.add_scaled(slope, _trees.ratio(new, size), direction)
    return x, residual, direction, new, taken + 1

  slope = back(target)
  first = square(slope)
  start = (optax.tree.zeros_like(slope), target, slope, first, jnp.int32(0))
  unsolved = lambda c: (c[4] < steps) & (c[3] > tolerance**2 * first)
  return jax.lax.while_loop(unsolved, step, start)[0]


def consensus_set(axis_name: Hashable | None = None) -> AffineSet:
  r"""Equal copies of one variable; the projection is their mean.

  .. math::
    \{ (z_1, \dots, z_M) : z_1 = \dots = z_M \}, \qquad
    \Pi(z)_m = \frac{1}{M} \sum_{i=1}^{M} z_i

  Each client has one copy. A projection is one communication round, counted
  under `rounds`.

  Args:
    axis_name: the mapped axis of clients, of `jax.vmap` or `jax.shard_map`, or
      a tuple of several. By default the copies are the entries of the leading
      axis of each leaf.

  Returns:
    An `AffineSet`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> print(bj.projections.consensus_set()(jnp.array([1.0, 3.0])))
    [2. 2.]
  """
  if axis_name is not None:

    def mean(point):
      return jax.lax.pmean(point, axis_name)

    return AffineSet(
      onto=lambda point, r: mean(point),
      coordinates=mean,
      lift=lambda u, like: u,
      zero=optax.tree.zeros_like,
      rounds=1,
    )

  def average(point):
    return jax.tree.map(_trees.mean_of_rows, point)

  def spread(u, like):
    return jax.tree.map(lambda a, z: jnp.broadcast_to(a, z.shape), u, like)

  return AffineSet(
    onto=lambda point, r: spread(average(point), point),
    coordinates=average,
    lift=spread,
    zero=lambda like: jax.tree.map(lambda z: jnp.zeros_like(z[0]), like),
    rounds=1,
  )
