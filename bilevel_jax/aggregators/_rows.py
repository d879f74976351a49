"""Rows of a Jacobian: their inner products, factors and weighted sums."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _sequences, _trees, types
from bilevel_jax.aggregators import _quadratic

# Columns per matrix product on the CPU: one product over all columns is several
# times slower there.
CHUNK = 8192
# Parts for the entrywise product of two rows on the CPU.
_PARTS = 64


def require(
  jacobian: Any, name: str, objectives: int, *, rows: bool = False
) -> None:
  """Raises an error for anything but a Jacobian or Gramian of that many rows.

  Args:
    jacobian: the input of an aggregator.
    name: the aggregator's name, for the error.
    objectives: the number of rows that it takes.
    rows: whether it needs the rows themselves, not only a Gramian.
  """
  if isinstance(jacobian, types.Gramian):
    if rows:
      raise TypeError(
        f'{name} needs the rows of the Jacobian, not only their products: use '
        'bj.multi_objective without gramian=True.'
      )
    sizes = {jacobian.lengths.shape[0]}
  elif isinstance(jacobian, types.Jacobian):
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(jacobian.rows)}
    if not sizes:
      raise ValueError('the Jacobian has no leaves: no parameter is shared.')
  else:
    raise TypeError(
      f'{name} aggregates the rows of a Jacobian, got '
      f'{type(jacobian).__name__}: put an oracle that returns rows before it '
      'in the chain, bj.multi_objective(losses) or bj.value_gap(problem) '
      'without a penalty for instance.'
    )
  if sizes != {objectives}:
    actual = ' and '.join(map(str, sorted(sizes)))
    raise ValueError(
      f'{name} takes {objectives} rows, but the Jacobian has {actual}: pass it '
      'the number of objectives, and samples if the oracle is wrapped in '
      'bj.evaluation.independent.'
    )


def zeros(objectives: int, tree: Any) -> Any:
  """Rows of zeros for a pytree, sharded like its leaves."""

  def rows(leaf):
    # Broadcast from the leaf, since a new array would be on one device.
    leaf = jnp.zeros_like(leaf)
    return jnp.array(
      jnp.broadcast_to(leaf, (objectives, *leaf.shape)), copy=True
    )

  return jax.tree.map(rows, tree)


def tracked(
  name: str,
  objectives: int,
  params: Any,
  rest: tuple[str, ...] = (),
  accumulator_dtype: Any = jnp.float32,
) -> Any:
  """Rows of zeros for an aggregator that tracks a Jacobian's rows.

  Args:
    name: the aggregator's name, for the error.
    objectives: the number of rows.
    params: the parameters.
    rest: sequences outside the weighting, for which rows have None.
    accumulator_dtype: smallest dtype of a leaf.
  """
  shared = params
  if rest:
    _sequences.require_sequences(params, rest, f'{name}(rest=...)')
    shared = params._replace(**dict.fromkeys(rest))
  return zeros(objectives, _trees.accumulator_like(shared, accumulator_dtype))


def require_tracked(name: str, tracked: Any, jacobian: types.Jacobian) -> None:
  """Raises ValueError unless a Jacobian's rows match the tracked ones."""
  expected: Any = jax.tree.structure(tracked)
  rows: Any = jax.tree.structure(jacobian.rows)
  if expected != rows:
    raise ValueError(
      f'{name} tracks {expected}, but the rows are {rows}: pass {name} and the '
      'oracle the same `rest`.'
    )


def products(left: Any, right: Any = None, scale: Any = None) -> chex.Array:
  r"""The matrix :math:`A B^\top` of all inner products of rows.

  On a CPU it uses one thread: XLA does not split a product or a sum with a
  small result. Medians for rows of 663,552 numbers on two busy EPYC cores: one
  product takes 1.2, 4.7 and 15 ms for 2, 5 and 10 rows, a loop over chunks that
  fit in the cache 0.70, 2.4 and 8.7 ms, entrywise products 0.46, 4.1 and 37 ms.
  Two loops over half of the columns still run one after the other; a batched
  product over 64 parts takes 2.9 and 11 ms. Partial sums separated by a barrier
  use both cores and take 0.97 ms for two rows.

  Args:
    left: :math:`A`, a pytree whose leaves have a leading axis of rows.
    right: :math:`B`, of the same structure; by default `left`.
    scale: factors of the rows, (rows,), the same for both.

  Returns:
    (rows of left, rows of right), in float32 or wider.
  """
  right = left if right is None else right
  dtype = _trees.widest_dtype((left, right))

  def dot(a, b):
    if scale is not None:
      a, b = (scale[:, None] * x.astype(dtype) for x in (a, b))
    return jax.lax.dot_general(
      a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype
    )

  def leaf_products(a, b):
    a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    chunks = a.shape[1] // CHUNK
    if chunks < 2 or jax.default_backend() != 'cpu':
      return dot(a, b)
    if a.shape[0] == b.shape[0] == 2 and scale is None:
      done = a.shape[1] // _PARTS * _PARTS
      one, two = (
        x[:, :done].astype(dtype).reshape(2, _PARTS, -1) for x in (a, b)
      )
      start = jnp.sum(one[:, None] * two, axis=(-2, -1))
    else:
      done = chunks * CHUNK
      cut = functools.partial(
        jax.lax.dynamic_slice_in_dim, slice_size=CHUNK, axis=1
      )
      add = lambda i, sum_: sum_ + dot(cut(a, i * CHUNK), cut(b, i * CHUNK))
      axes = _sequences.varying_axes(a) | _sequences.varying_axes(b)
      zero = jnp.zeros((a.shape[0], b.shape[0]), dtype)
      start = jax.lax.fori_loop(0, chunks, add, _sequences.vary(zero, axes))
    return start + dot(a[:, done:], b[:, done:])

  leaves = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
  return sum(leaf_products(a, b) for a, b in leaves)


def power_of_two(numbers: chex.Array) -> chex.Array:
  """Powers of two, at most the numbers, so that scaling does not round.

  They are the numbers without their mantissas. Compared with `jnp.frexp`, it
  saves a sixth of the time to compile an aggregator.

  Args:
    numbers: nonnegative, float32 or float64. Below the smallest normal number,
      and at infinity, the result is the nearest power with a normal inverse.
  """
  info = jnp.finfo(numbers.dtype)
  kind = jnp.dtype(f'uint{info.bits}')
  exponents = jnp.array(jnp.inf, numbers.dtype).view(kind)
  powers = (numbers.view(kind) & exponents).view(numbers.dtype)
  return jnp.clip(powers, info.tiny, 1 / info.tiny)


def gramian(jacobian: types.Jacobian | types.Gramian) -> types.Gramian:
  """Lengths and cosines of a Jacobian's rows, and their weighted sum.

  If squares of the entries leave the range of floats, the products are computed
  again from rows divided by the power of two next to their largest entry. In
  that case the result has no derivative.
  """
  if isinstance(jacobian, types.Gramian):
    return jacobian
  rows = jacobian.rows
  plain = products(rows)
  square = jnp.diagonal(plain)
  smallest = jnp.finfo(plain.dtype).tiny ** 0.75
  in_bounds = jnp.all((square > smallest) & (square < 1 / smallest))

  def rescaled(carry):
    # The barrier stops the compiler from hoisting constants out of the loop.
    entries, _ = jax.lax.optimization_barrier((rows, carry))
    largest = functools.reduce(
      jnp.maximum,
      [
        jnp.max(jnp.abs(x.reshape(x.shape[0], -1)), axis=1, initial=0).astype(
          plain.dtype
        )
        for x in jax.tree.leaves(entries)
      ],
    )
    unit = power_of_two(largest)
    return True, unit, products(entries, scale=1 / unit)

  # A loop of at most one iteration instead of a branch: under vmap a branch
  # evaluates both sides, while a loop is skipped if no seed needs it.
  rows = jax.lax.stop_gradient(rows)
  start = (in_bounds, jnp.ones_like(square), jax.lax.stop_gradient(plain))
  _, unit, matrix = _quadratic.loop(lambda c: ~c[0], rescaled, start, rows)
  matrix = jnp.where(in_bounds, plain, matrix)
  return from_matrix(
    matrix, unit, jax.tree_util.Partial(weigh, jacobian), jacobian.values
  )


class Factor(NamedTuple):
  r"""Rows in an orthonormal basis of their span: :math:`U = L Q`.

  U has the rows divided by their lengths. L determines the angle between two
  rows up to rounding; the Gram matrix :math:`L L^\top` only up to the square
  root of rounding.

  Attributes:
    lengths: the norms of the rows, (objectives,).
    lower: L, lower triangular, (objectives, objectives); a row in the span of
      the earlier rows has a zero on the diagonal.
    combine: maps coordinates y (objectives,) in the basis and weights of the
      rows with the same direction to the gradient :math:`Q^\top y`.
  """

  lengths: chex.Array
  lower: chex.Array
  combine: Callable[[chex.Array, chex.Array], Any]


def cosine_factor(gram: types.Gramian) -> tuple[Factor, chex.Array]:
  r"""Factors the matrix of cosines; also returns whether that is accurate.

  Cosines have an error of a few float spacings :math:`\epsilon`, so the
  direction has a relative error of a few :math:`\epsilon / \lambda`, where
  :math:`\lambda` is the smallest eigenvalue of the cosines of the nonzero rows.
  The factor counts as accurate if :math:`\lambda > \epsilon^{1/3}`: for two
  rows in float32, at angles above 6 degrees.
  """
  lower, values = _root(gram.cosines)
  separate = values > jnp.finfo(values.dtype).eps ** (1 / 3)
  accurate = jnp.sum(separate) == jnp.sum(gram.lengths > 0)
  combine = lambda _, weights: gram.combine(weights)
  return Factor(gram.lengths, lower, combine), accurate


def factor(jacobian: types.Jacobian, lengths: chex.Array) -> Factor:
  """Factors the rows of a Jacobian by two passes of Gram-Schmidt.

  The second pass removes the rounding errors of the first, and two suffice. It
  is several times slower than `cosine_factor`, because each row needs at least
  one pass over all rows.

  Args:
    jacobian: the rows.
    lengths: their norms, (objectives,).
  """
  size, dtype = lengths.shape[0], lengths.dtype
  # Scaling keeps squares from overflowing.
  scale = 1 / power_of_two(lengths)
  rows = jax.tree.map(
    lambda x: x.astype(dtype) * _column(scale, x), jacobian.rows
  )
  # Bounds the rounding of a difference with one term per row.
  tolerance = (size + 2) * jnp.finfo(dtype).eps

  def add_row(i, carry):
    # Normalising the basis would round its vectors.
    basis, sizes, lower = carry
    rest = jax.tree.map(lambda x: x[i][None], rows)
    length = jnp.sqrt(products(rest)[0, 0])
    along = jnp.zeros_like(sizes)
    for _ in range(2):
      part = _trees.ratio(products(basis, rest)[:, 0], sizes**2)
      rest = jax.tree.map(
        lambda x, q, part=part: x - jnp.tensordot(part, q, axes=1), rest, basis
      )
      along = along + part
    remaining = jnp.sqrt(products(rest)[0, 0])
    independent = remaining > tolerance * length
    basis = jax.tree.map(
      lambda q, x: q.at[i].set(jnp.where(independent, x[0], 0)), basis, rest
    )
    sizes = sizes.at[i].set(jnp.where(independent, remaining, 0))
    row = along.at[i].set(1) * sizes
    return (
      basis,
      sizes,
      lower.at[i].set(_trees.ratio(row, jnp.linalg.norm(row))),
    )

  # Zeros that vary over the devices of a mesh like the rows.
  table = jnp.broadcast_to(lengths, (size, size))
  zeros = jax.tree.map(lambda x: 0 * x, (rows, lengths, table))
  basis, sizes, lower = jax.lax.fori_loop(0, size, add_row, zeros)

  def combine(coordinates, _):
    shares = _trees.ratio(coordinates, sizes)
    gradients = jax.tree.map(
      lambda q, row: jnp.tensordot(shares, q, axes=1).astype(row.dtype),
      basis,
      jacobian.rows,
    )
    return with_rest(gradients, jacobian.rest)

  return Factor(lengths, lower, combine)


def _root(cosines: chex.Array) -> tuple[chex.Array, chex.Array]:
  """A lower triangular root of a matrix of cosines, and its eigenvalues."""
  info = jnp.finfo(cosines.dtype)
  values, vectors = jnp.linalg.eigh(cosines)
  # An entry is exact up to a few roundings, and eigenvalues change by at most
  # the norm of all errors.
  tolerance = 8 * len(cosines) * info.eps
  values = jnp.where(values > tolerance * values[-1], values, 0)
  lower = jnp.linalg.qr((vectors * jnp.sqrt(values)).T, mode='r').T
  # A nonzero diagonal entry is at least the smallest singular value, which is
  # above the root of the tolerance; an exact zero becomes about eps.
  null = jnp.eye(len(lower), dtype=bool) & (jnp.abs(lower) < info.eps**0.75)
  # The first basis vector points along the first row, not against it.
  sign = jnp.where(jnp.diagonal(lower) < 0, -1, 1)
  return jnp.where(null, 0, lower * sign), values


def _column(numbers, rows):
  """One number per row, reshaped to multiply the rows."""
  return numbers.reshape(-1, *(1,) * (rows.ndim - 1))


def in_range(factor: types.Gramian | Factor, weights: chex.Array) -> chex.Array:
  """The weights, or NaN if the lengths of the rows differ too much."""
  lengths, info = factor.lengths, jnp.finfo(factor.lengths.dtype)
  longest = jnp.max(lengths)
  shortest = jnp.min(jnp.where(lengths > 0, lengths, longest))
  # Leaves a margin of 1 / eps for weights much smaller than the others.
  fits = longest * (info.tiny / info.eps) <= shortest
  return jnp.where(fits & (longest < jnp.inf), weights, jnp.nan)


def row_weights(
  factor: types.Gramian | Factor, unit_weights: chex.Array, unit: Any = 1
) -> chex.Array:
  """Converts weights of rows scaled to the length `unit` to row weights."""
  return unit_weights * _trees.ratio(unit, factor.lengths)


def from_matrix(
  matrix: chex.Array, unit: Any, combine: Any, values: Any
) -> types.Gramian:
  """A Gramian from the products of rows divided by `unit`."""
  norms = jnp.sqrt(jnp.diagonal(matrix))
  cosines = _trees.ratio(matrix, norms[:, None] * norms)
  return types.Gramian(norms * unit, cosines, combine, values)


def norm(gram: types.Gramian, weights: chex.Array) -> chex.Array:
  """The length of a weighted sum of rows."""
  unit_weights = weights * gram.lengths
  unit = jnp.max(jnp.abs(unit_weights))
  unit_weights = _trees.ratio(unit_weights, unit)
  square = unit_weights @ gram.cosines @ unit_weights
  return unit * jnp.sqrt(jnp.maximum(square, 0))


def weigh(jacobian: types.Jacobian, weights: chex.Array) -> Any:
  """The weighted gradient, including the unweighted sequences."""

  def total(row):
    # Keeps the dtype of the weights: bfloat16 has only three digits.
    dtype = jnp.promote_types(weights.dtype, row.dtype)
    sum_ = jnp.tensordot(weights.astype(dtype), row.astype(dtype), axes=1)
    return sum_.astype(row.dtype)

  gradients = jax.tree.map(total, jacobian.rows)
  return with_rest(gradients, jacobian.rest)


def combine(
  jacobian: types.Jacobian | types.Gramian, weights: chex.Array
) -> Any:
  """The weighted gradient of a Jacobian or a Gramian."""
  if isinstance(jacobian, types.Gramian):
    return jacobian.combine(weights)
  return weigh(jacobian, weights)


def with_rest(gradients: Any, rest: Any) -> Any:
  """Gradients with those of the unweighted sequences, by name, filled in."""
  return gradients._replace(**rest) if rest else gradients


def part(jacobian: types.Jacobian, index: int, objectives: int) -> Any:
  """The rows of one of several samples stacked in a Jacobian."""
  start = index * objectives
  return jax.tree.map(lambda x: x[start : start + objectives], jacobian.rows)
