"""Variance reduction by memory: the last gradient of every part of the data."""

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
    table: last gradients; leaves have a leading axis of parts.
    total: the sum of the table over its parts.
    seen: which parts have an entry, (parts,); (parts, rows) where each row has
      parts of its own.
    inner: the state of the oracle.
  """

  count: chex.Array
  table: Any
  total: Any
  seen: chex.Array
  inner: Any


class _Kept(NamedTuple):
  """What an update makes of one leaf."""

  found: chex.Array
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
  r"""Corrects each gradient by the last one of the same part of the data.

  .. math::
    d = G_i(z) - t_i + \frac{1}{|S|} \sum_{j \in S} t_j
    \quad \text{if } i \in S, \qquad d = G_i(z) \quad \text{else}; \qquad
    \text{then } t_i \leftarrow G_i(z), \; S \leftarrow S \cup \{i\}

  where S holds the parts that were seen so far. Near a solution its noise
  vanishes, so that a constant step converges as on the whole data, at the price
  of :math:`n` gradients in memory. Where parts are drawn uniformly, the mean of
  :math:`d` is the gradient of the whole data, from the first update on.

  Args:
    oracle: what to evaluate, linear in its samples.
    parts: :math:`n`, into how many parts the data are divided: fixed batches,
      or single examples. Where the rows of a `Jacobian` draw samples of their
      own, a tuple of a number for each row.
    index: which part a batch is, from the batch; an integer scalar in
      [0, parts), or for a tuple an integer for each row; any other makes the
      gradient NaN. By default parts come in turn, the first batch being part 0.
    like: makes, from the parameters, a pytree of the structure of what the
      oracle gives, as in `storm`.
    accumulator_dtype: what the sum of the table is kept in, at least; the table
      and the result have the oracle's dtypes.

  Returns:
    An oracle.

  Raises:
    ValueError: if `parts` is below 1, or the oracle is not linear in its
      samples; at the call, if the oracle gives another structure than `like`.
    TypeError: at the call, if `parts` is a tuple and the oracle gives something
      else than that many rows.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> loss = lambda params, batch: (params - batch['y']) ** 2 / 2
    >>> oracle = bj.evaluation.saga(
    ...   bj.gradient(loss), 2, index=lambda b: b['i']
    ... )
    >>> params = jnp.float32(0.0)
    >>> state = oracle.init(params)
    >>> for i in (0, 1, 0, 1):
    ...   found, state = oracle.update({'i': i, 'y': 2.0 * i}, state, params)
    >>> print(found)  # The gradient of the mean, whichever part comes.
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
    raise ValueError('saga takes a number of parts for each row, got none.')
  base.require_linear(
    oracle,
    'saga',
    'take bj.evaluation.storm, which corrects any oracle by the same batch, or '
    'tables of linear directions, as bj.saba does',
  )
  largest = max(numbers)
  inner = base.as_oracle(oracle)
  like = like or _storm.like_moved(oracle)

  def init_fn(params):
    shape = like(params)
    # By broadcasting, so that the table is sharded like its rows.
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
        f'saga: `index` gives an array of shape {which.shape}, but `parts` is '
        f'{parts}: one integer for each number of parts.'
      )
    gradients, after = inner.update(batch, state.inner, params, **extra_args)
    at: Any = which
    if by_row:
      _require_rows(gradients, len(numbers))
      at = (which, jnp.arange(len(numbers)))
    inside = (which >= 0) & (which < jnp.asarray(parts))
    known, number = state.seen[at] & inside, jnp.maximum(state.seen.sum(0), 1)
    # An index is data, which no program can refuse: NaN is found, a gradient
    # corrected by another part's is not.
    nothing = jnp.where(inside, 0.0, jnp.nan)

    def one(gradient, table, total):
      dtype, tail = total.dtype, (1,) * (gradient.ndim - known.ndim)
      spread = lambda x: x.reshape(*x.shape, *tail)
      last, now = table[at].astype(dtype), gradient.astype(table.dtype)
      mean = total / spread(number).astype(dtype)
      return _Kept(
        gradient.astype(dtype)
        - jnp.where(spread(known), last - mean, spread(nothing).astype(dtype)),
        table.at[at].set(now),
        total + (now.astype(dtype) - last),
      )

    totals = _storm.where_given('saga', gradients, state.total)
    tables = _storm.only_given(gradients, state.table)
    new = jax.tree.map(one, gradients, tables, totals)
    part = lambda name: jax.tree.map(
      lambda kept: getattr(kept, name),
      new,
      is_leaf=lambda node: isinstance(node, _Kept),
    )
    return _trees.cast_like(part('found'), gradients), SagaState(
      optax.safe_increment(state.count),
      _storm.with_given(gradients, part('table'), state.table),
      _storm.with_given(gradients, part('total'), state.total),
      state.seen.at[at].set(True),
      after,
    )

  again = lambda one: saga(
    one, parts, index=index, like=like, accumulator_dtype=accumulator_dtype
  )
  return base.wrapped(inner, init_fn, update_fn, again=again, inside=True)


def _require_rows(gradients: Any, number: int) -> None:
  """Raises TypeError unless gradients are rows, and nothing besides."""
  leaves = jax.tree.leaves(gradients)
  if (
    not isinstance(gradients, types.Jacobian)
    or gradients.rest
    or any(jnp.shape(leaf)[:1] != (number,) for leaf in leaves)
  ):
    raise TypeError(
      f'saga with parts for each of {number} rows takes a Jacobian of so many '
      f'rows and no `rest`, got {type(gradients).__name__}: pass one number of '
      'parts, or an oracle that gives rows.'
    )
