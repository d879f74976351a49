"""Rows of a Jacobian: their products with each other and with weights."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _sequences, _trees, types
from bilevel_jax.aggregators import _quadratic

# Columns of a skinny product that the CPU does at once: one product over all
# columns is several times slower there.
CHUNK = 8192
# Parts in which two rows are multiplied entry by entry on the CPU.
_PARTS = 64


def require(
  jacobian: Any, who: str, objectives: int, *, rows: bool = False
) -> None:
  """Raises unless given a Jacobian or a Gramian of so many objectives.

  Args:
    jacobian: what an aggregator was given.
    who: its name, for the error.
    objectives: the number of rows that it takes.
    rows: whether it needs the rows themselves.
  """
  if isinstance(jacobian, types.Gramian):
    if rows:
      raise TypeError(
        f'{who} needs the rows of the Jacobian, not only their products: use '
        'bj.multi_objective without gramian=True.'
      )
    found = {jacobian.lengths.shape[0]}
  elif isinstance(jacobian, types.Jacobian):
    found = {leaf.shape[0] for leaf in jax.tree.leaves(jacobian.rows)}
    if not found:
      raise ValueError('the Jacobian has no leaves: no parameter is shared.')
  else:
    raise TypeError(
      f'{who} aggregates the rows of a Jacobian, got '
      f'{type(jacobian).__name__}: put an oracle that gives rows before it in '
      'the chain, bj.multi_objective(losses) or bj.value_gap(problem) without '
      'a penalty for instance.'
    )
  if found != {objectives}:
    has = ' and '.join(map(str, sorted(found)))
    raise ValueError(
      f'{who} was made for {objectives} rows, but the Jacobian has {has}: give '
      'it the number of objectives, and samples if the oracle is wrapped in '
      'bj.evaluation.independent.'
    )


def zeros(objectives: int, tree: Any) -> Any:
  """Rows of zeros for a pytree, sharded like its leaves."""

  def rows(leaf):
    # By broadcasting: an array made from nothing would be on one device.
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
  """Rows of zeros for what an aggregator remembers of a Jacobian's rows.

  Args:
    name: of the aggregator, for the error.
    objectives: the number of rows.
    params: the parameters.
    rest: sequences that no weight touches: rows have None there.
    accumulator_dtype: the least width of a leaf.
  """
  shared = params
  if rest:
    _sequences.require_sequences(params, rest, f'{name}(rest=...)')
    shared = params._replace(**dict.fromkeys(rest))
  return zeros(objectives, _trees.accumulator_like(shared, accumulator_dtype))


def require_tracked(
  name: str, remembered: Any, jacobian: types.Jacobian
) -> None:
  """Raises ValueError unless a Jacobian has rows like those remembered."""
  expected: Any = jax.tree.structure(remembered)
  rows: Any = jax.tree.structure(jacobian.rows)
  if expected != rows:
    raise ValueError(
      f'{name} tracks {expected}, but the rows are {rows}: give {name} and the '
      'oracle the same `rest`.'
    )


def products(ours: Any, theirs: Any = None, scale: Any = None) -> chex.Array:
  r"""The matrix :math:`A B^\top` of all inner products of rows.

  On a CPU it runs on one thread: the compiler does not divide a product, or a
  sum, whose result is a few numbers. Rows of 663,552 numbers, medians on two
  busy cores of an EPYC: one product takes 1.2, 4.7 and 15 ms for 2, 5 and 10
  rows, a loop over chunks that stay in the cache .70, 2.4 and 8.7 ms, products
  entry by entry .46, 4.1 and 37 ms. Two loops over half of the columns each
  still run one after the other; a batched product over 64 parts takes 2.9 and
  11 ms. Sums in parts, kept apart by a barrier, do use both cores, and take .97
  ms for two rows.

  Args:
    ours: a pytree whose leaves have a leading axis of rows.
    theirs: another of the same structure; by default `ours`.
    scale: factors of the rows, (rows,), the same for both.

  Returns:
    (rows of ours, rows of theirs), in float32 or wider.
  """
  theirs = ours if theirs is None else theirs
  dtype = _trees.widest_dtype((ours, theirs))

  def dot(a, b):
    if scale is not None:
      a, b = (scale[:, None] * x.astype(dtype) for x in (a, b))
    return jax.lax.dot_general(
      a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype
    )

  def of_leaf(a, b):
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
      none = jnp.zeros((a.shape[0], b.shape[0]), dtype)
      start = jax.lax.fori_loop(0, chunks, add, _sequences.vary(none, axes))
    return start + dot(a[:, done:], b[:, done:])

  leaves = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
  return sum(of_leaf(a, b) for a, b in leaves)


def gramian(jacobian: types.Jacobian | types.Gramian) -> types.Gramian:
  """Lengths and cosines of a Jacobian's rows, and their weighted sum.

  Where squares of the entries leave the range of floats, the products are
  computed again, from rows that are divided by the powers of two next to their
  largest entries. There the result has no derivative.
  """
  if isinstance(jacobian, types.Gramian):
    return jacobian
  rows = jacobian.rows
  plain = products(rows)
  square = jnp.diagonal(plain)
  least = jnp.finfo(plain.dtype).tiny ** 0.75
  fine = jnp.all((square > least) & (square < 1 / least))

  def rescaled(carry):
    # Tied to the carry: the compiler moves what is constant before the loop.
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
    # Powers of two: the products have the digits that they have without.
    _, exponent = jnp.frexp(largest)
    bound = -jnp.finfo(plain.dtype).minexp
    exponent = jnp.clip(exponent, -bound, bound)
    one = jnp.ones_like(largest)
    scale = jnp.ldexp(one, -exponent)
    return True, jnp.ldexp(one, exponent), products(entries, scale=scale)

  # A loop of at most one round in place of a branch: mapped over seeds, a
  # branch evaluates both sides, and a loop ends where no seed needs it.
  rows = jax.lax.stop_gradient(rows)
  start = (fine, jnp.ones_like(square), jax.lax.stop_gradient(plain))
  _, unit, matrix = _quadratic.loop(lambda c: ~c[0], rescaled, start, rows)
  matrix = jnp.where(fine, plain, matrix)
  return from_matrix(
    matrix, unit, jax.tree_util.Partial(weigh, jacobian), jacobian.values
  )


class Factor(NamedTuple):
  r"""Rows in an orthonormal basis of their span: :math:`U = L Q`.

  U holds the rows divided by their lengths. The angle between two rows is in L
  to rounding; in the Gram matrix, :math:`L L^\top`, it is to the square root of
  rounding.

  Attributes:
    lengths: the norms of the rows, (objectives,).
    lower: L, lower triangular, (objectives, objectives); a row in the span of
      the rows before it has a zero on the diagonal.
    combine: from coordinates y (objectives,) in the basis, and weights of the
      rows that give the same direction, to the gradient :math:`Q^\top y`.
  """

  lengths: chex.Array
  lower: chex.Array
  combine: Callable[[chex.Array, chex.Array], Any]


def cosine_factor(gram: types.Gramian) -> tuple[Factor, chex.Array]:
  r"""Factors the matrix of cosines; also returns whether that is accurate.

  Cosines have an error of a few spacings :math:`\epsilon` of floats, so the
  direction has a relative error of a few :math:`\epsilon / \lambda`, where
  :math:`\lambda` is the smallest eigenvalue of the cosines of the rows that do
  not vanish. The factor is accurate if :math:`\lambda > \epsilon^{1/3}`: for
  two rows in float32, at angles above 6 degrees.
  """
  lower, values = _root(gram.cosines)
  separate = values > jnp.finfo(values.dtype).eps ** (1 / 3)
  accurate = jnp.sum(separate) == jnp.sum(gram.lengths > 0)
  combine = lambda _, weights: gram.combine(weights)
  return Factor(gram.lengths, lower, combine), accurate


def factor(jacobian: types.Jacobian, lengths: chex.Array) -> Factor:
  """Factors the rows of a Jacobian, by Gram and Schmidt's method, twice.

  Twice is enough: the second pass removes what rounding left in the first. It
  is several times slower than `cosine_factor`, because it reads the rows once
  or more for each row.

  Args:
    jacobian: the rows.
    lengths: their norms, (objectives,).
  """
  size, dtype = lengths.shape[0], lengths.dtype
  # By powers of two, so that scaling does not round and no square overflows.
  _, exponent = jnp.frexp(lengths)
  scale = jnp.ldexp(jnp.ones_like(lengths), -exponent)
  rows = jax.tree.map(
    lambda x: x.astype(dtype) * _column(scale, x), jacobian.rows
  )
  # A bound of the rounding of a difference of as many terms as rows.
  room = (size + 2) * jnp.finfo(dtype).eps

  def add_row(i, carry):
    # The basis is not divided by its lengths: that would round its vectors.
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
    left = jnp.sqrt(products(rest)[0, 0])
    there = left > room * length
    basis = jax.tree.map(
      lambda q, x: q.at[i].set(jnp.where(there, x[0], 0)), basis, rest
    )
    sizes = sizes.at[i].set(jnp.where(there, left, 0))
    row = along.at[i].set(1) * sizes
    return (
      basis,
      sizes,
      lower.at[i].set(_trees.ratio(row, jnp.linalg.norm(row))),
    )

  # Zeros that vary over the devices of a mesh as the rows do.
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
  # An entry is a sum over all parameters that ends within a few roundings of
  # the exact one, and eigenvalues move by at most the norm of all errors.
  room = 8 * len(cosines) * info.eps
  values = jnp.where(values > room * values[-1], values, 0)
  lower = jnp.linalg.qr((vectors * jnp.sqrt(values)).T, mode='r').T
  # A diagonal entry is not below the least singular value, the square root of
  # `room` at least; one that should be zero is of the order of rounding.
  null = jnp.eye(len(lower), dtype=bool) & (jnp.abs(lower) < info.eps**0.75)
  # The first vector of the basis points along the first row, not against it.
  sign = jnp.where(jnp.diagonal(lower) < 0, -1, 1)
  return jnp.where(null, 0, lower * sign), values


def _column(numbers, rows):
  """A number for each row, shaped to multiply the rows."""
  return numbers.reshape(-1, *(1,) * (rows.ndim - 1))


def in_range(factor: types.Gramian | Factor, weights: chex.Array) -> chex.Array:
  """The weights; not a number where the lengths are too far apart for them."""
  lengths, info = factor.lengths, jnp.finfo(factor.lengths.dtype)
  longest = jnp.max(lengths)
  shortest = jnp.min(jnp.where(lengths > 0, lengths, longest))
  # With room for weights that are small beside the others.
  fits = longest * (info.tiny / info.eps) <= shortest
  return jnp.where(fits & (longest < jnp.inf), weights, jnp.nan)


def of_unit_rows(
  factor: types.Gramian | Factor, pulls: chex.Array, unit: chex.Numeric = 1
) -> chex.Array:
  """Weights of rows as they are, from those of rows of the length `unit`."""
  return pulls * _trees.ratio(unit, factor.lengths)


def from_matrix(
  matrix: chex.Array, unit: Any, combine: Any, values: Any
) -> types.Gramian:
  """A Gramian from products of rows that were divided by `unit` before."""
  norms = jnp.sqrt(jnp.diagonal(matrix))
  cosines = _trees.ratio(matrix, norms[:, None] * norms)
  return types.Gramian(norms * unit, cosines, combine, values)


def norm(found: types.Gramian, weights: chex.Array) -> chex.Array:
  """The length of a weighted sum of rows."""
  pulls = weights * found.lengths
  unit = jnp.max(jnp.abs(pulls))
  pulls = _trees.ratio(pulls, unit)
  return unit * jnp.sqrt(jnp.maximum(pulls @ found.cosines @ pulls, 0))


def weigh(jacobian: types.Jacobian, weights: chex.Array) -> Any:
  """The weighted gradient, with what no weight may touch in its place."""

  def total(row):
    # Weights as they are: a share rounded to bfloat16 has three digits.
    dtype = jnp.promote_types(weights.dtype, row.dtype)
    found = jnp.tensordot(weights.astype(dtype), row.astype(dtype), axes=1)
    return found.astype(row.dtype)

  gradients = jax.tree.map(total, jacobian.rows)
  return with_rest(gradients, jacobian.rest)


def combine(
  jacobian: types.Jacobian | types.Gramian, weights: chex.Array
) -> Any:
  """The weighted gradient, from whatever there is of a Jacobian."""
  if isinstance(jacobian, types.Gramian):
    return jacobian.combine(weights)
  return weigh(jacobian, weights)


def with_rest(gradients: Any, rest: Any) -> Any:
  """Puts the gradients that no weight may touch in their places."""
  return gradients._replace(**rest) if rest else gradients


def part(jacobian: types.Jacobian, index: int, objectives: int) -> Any:
  """The rows of one of several samples that are stacked in a Jacobian."""
  start = index * objectives
  return jax.tree.map(lambda x: x[start : start + objectives], jacobian.rows)
