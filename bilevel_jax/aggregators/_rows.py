"""Rows of a Jacobian: their products with each other and with weights."""

import functools
from typing import Any

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
  dtype = _trees.dtype_of((ours, theirs))

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


def in_range(found: types.Gramian, weights: chex.Array) -> chex.Array:
  """The weights; not a number where the lengths are too far apart for them."""
  lengths, info = found.lengths, jnp.finfo(found.lengths.dtype)
  longest = jnp.max(lengths)
  shortest = jnp.min(jnp.where(lengths > 0, lengths, longest))
  # With room for weights that are small beside the others.
  fits = longest * (info.tiny / info.eps) <= shortest
  return jnp.where(fits & (longest < jnp.inf), weights, jnp.nan)


def of_unit_rows(
  found: types.Gramian, pulls: chex.Array, unit: chex.Numeric = 1
) -> chex.Array:
  """Weights of rows as they are, from those of rows of the length `unit`."""
  return pulls * _trees.ratio(unit, found.lengths)


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
