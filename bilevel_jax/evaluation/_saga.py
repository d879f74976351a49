"""SAGA: variance reduction by the last gradient of each part of the data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import _checks, _trees, types
from bilevel_jax.evaluation import _storm
from bilevel_jax.oracles import base


class SagaState(NamedTuple):
  """State of `saga`.

  Attributes:
    count: evaluations so far, an int32 scalar.
    table: the last gradient of each part; leaves have a leading axis of parts.
    total: the sum of the table over its parts.
    visited: which parts have an entry, (parts,), or (parts, rows) if each row
      has its own parts.
    inner: the state of the oracle.
  """

  count: chex.Array
  table: Any
  total: Any
  visited: chex.Array
  inner: Any


class _LeafUpdate(NamedTuple):
  """The results of an update for one leaf."""

  corrected: chex.Array
  table: chex.Array
  total: chex.Array


def saga(
  oracle: optax.GradientTransformation,
  parts: int | tuple[int, ...],
  *,
  index: Callable[[Any], Any] | None = None,
  like: Callable[[Any], Any] | None = None,
  accumulator_dtype: Any = jnp.float32,
) -> base.Oracle:
  r"""Corrects each gradient by the previous one of the same part of the data.

  .. math::
    d = G_i(z) - t_i + \frac{1}{|S|} \sum_{j \in S} t_j
    \quad \text{if } i \in S, \qquad d = G_i(z) \quad \text{else}; \qquad
    \text{then } t_i \leftarrow G_i(z), \; S \leftarrow S \cup \{i\}

  where S is the set of visited parts. The noise vanishes near a solution, so a
  constant step converges as on the whole data, at the cost of :math:`n`
  gradients in memory. If parts are drawn uniformly, the expectation of
  :math:`d` is the gradient of the whole data from the first update on.

  Args:
    oracle: the oracle to evaluate, linear in its samples.
    parts: :math:`n`, the number of parts of the data: fixed batches, or single
      examples. If each row of a `Jacobian` draws its own samples, a tuple with
      a number for each row.
    index: maps the batch to its part, an integer scalar in [0, parts); if
      `parts` is a tuple, to one integer per row. An index out of range makes
      the gradient NaN. By default parts cycle, starting with part 0.
    like: maps the parameters to a pytree with the structure of the oracle's
      gradients, as in `storm`.
    accumulator_dtype: smallest dtype of the table's sum; the table and the
      result have the oracle's dtypes.

  Returns:
    An oracle.

  Raises:
    ValueError: if `parts` is below 1, or the oracle is not linear in its
      samples; at the call, if the oracle returns another structure than `like`.
    TypeError: at the call, if `parts` is a tuple and the oracle does not return
      that many rows.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> loss = lambda params, batch: (params - batch['y']) ** 2 / 2
    >>> oracle = bj.evaluation.saga(
    ...   bj.gradient(loss), 2, index=lambda b: b['i']
    ... )
    >>> params = jnp.float32(0.0)
    >>> state = oracle.init(params)
    >>> for i in (0, 1, 0, 1):
    ...   gradient, state = oracle.update({'i': i, 'y': 2.0 * i}, state, params)
    >>> print(gradient)  # That of the mean loss, for any part.
    -1.0

  References:
    Defazio, Bach and Lacoste-Julien, `SAGA: A Fast Incremental Gradient Method
    With Support for Non-Strongly Convex Composite Objectives
    <https://arxiv.org/abs/1407.0202>`_, 2014.
  """
  by_row = isinstance(parts, tuple)
  numbers = parts if isinstance(parts, tuple) else (parts,)
  for number in numbers:
    _checks.whole_number('saga', 'parts', number)
  if not numbers:
    raise ValueError('saga takes a number of parts for each row, got ().')
  base.require_linear(
    oracle,
    'saga',
    'use bj.evaluation.storm, which accepts any oracle, or bj.saba, whose '
    'tables hold directions that are linear',
  )
  largest = max(numbers)
  inner = base.as_oracle(oracle)
  like = like or _storm.like_moved(oracle)

  def init_fn(params):
    shape = like(params)
    # Broadcasting shards the table like its rows.
    table = jax.tree.map(
      lambda x: jnp.broadcast_to(jnp.zeros_like(x), (largest, *jnp.shape(x))),
      shape,
    )
    return SagaState(
      _trees.zeros([], jnp.int32),
      table,
      _trees.accumulator_like(shape, accumulator_dtype),
      _trees.zeros((largest, len(numbers)) if by_row else largest, bool),
      inner.init(params),
    )

  def update_fn(batch, state, params=None, **extra_args):
    if index is None:
      which = state.count % jnp.asarray(parts, jnp.int32)
    else:
      which = jnp.asarray(index(batch), jnp.int32)
    if which.shape != np.shape(parts):
      raise ValueError(
        f'saga: `index` returns an array of shape {which.shape}, but `parts` '
        f'is {parts}: return one integer for each number of parts.'
      )
    gradients, after = inner.update(batch, state.inner, params, **extra_args)
    at: Any = which
    if by_row:
      _require_rows(gradients, len(numbers))
      at = (which, jnp.arange(len(numbers)))
    inside = (which >= 0) & (which < jnp.asarray(parts))
    known = state.visited[at] & inside
    number = jnp.maximum(state.visited.sum(0), 1)
    # A compiled program cannot raise for a wrong index: NaN is noticed, a
    # gradient corrected by another part's is not.
    no_correction = jnp.where(inside, 0.0, jnp.nan)

    def one(gradient, table, total):
      dtype, tail = total.dtype, (1,) * (gradient.ndim - known.ndim)
      spread = lambda x: x.reshape(*x.shape, *tail)
      last, now = table[at].astype(dtype), gradient.astype(table.dtype)
      mean = total / spread(number).astype(dtype)
      other = spread(no_correction).astype(dtype)
      return _LeafUpdate(
        gradient.astype(dtype) - jnp.where(spread(known), last - mean, other),
        table.at[at].set(now),
        total + (now.astype(dtype) - last),
      )

    totals = _storm.matching('saga', gradients, state.total)
    tables = _storm.only_moved(gradients, state.table)
    new = jax.tree.map(one, gradients, tables, totals)
    field = lambda name: jax.tree.map(
      lambda leaf: getattr(leaf, name),
      new,
      is_leaf=lambda node: isinstance(node, _LeafUpdate),
    )
    return _trees.cast_like(field('corrected'), gradients), SagaState(
      optax.safe_increment(state.count),
      _storm.replaced(gradients, field('table'), state.table),
      _storm.replaced(gradients, field('total'), state.total),
      state.visited.at[at].set(True),
      after,
    )

  again = lambda one: saga(
    one, parts, index=index, like=like, accumulator_dtype=accumulator_dtype
  )
  return base.wrapped(inner, init_fn, update_fn, again=again, inside=True)


def _require_rows(gradients: Any, number: int) -> None:
  """Raises TypeError unless the gradients are a `Jacobian` of rows only."""
  leaves = jax.tree.leaves(gradients)
  if (
    not isinstance(gradients, types.Jacobian)
    or gradients.rest
    or any(jnp.shape(leaf)[:1] != (number,) for leaf in leaves)
  ):
    raise TypeError(
      f'saga with a tuple of parts takes a Jacobian of {number} rows and no '
      f'`rest`, got {type(gradients).__name__}: pass one number of parts, or '
      'an oracle that returns rows.'
    )
