"""Variance reduction by memory: the last gradient of every part of the data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from bilevel_jax import types
from bilevel_jax.evaluation import _accumulate, _storm
from bilevel_jax.oracles import base


class SagaState(NamedTuple):
  """State of `saga`.

  Attributes:
    count: updates so far, an int32 scalar.
    table: last gradients; leaves have a leading axis of `parts`.
    mean: the mean of the table over its parts.
    inner: the state of the oracle.
  """

  count: chex.Array
  table: Any
  mean: Any
  inner: Any


def saga(
  oracle: optax.GradientTransformation,
  parts: int | tuple[int, ...],
  *,
  index: Callable[[Any], Any] | None = None,
  examples: bool = False,
  like: Callable[[Any], Any] = lambda params: params,
) -> optax.GradientTransformationExtraArgs:
  r"""Corrects each gradient by the last one of the same part of the data.

  .. math::
    d = G_i(z) - t_i + \frac{1}{n} \sum_{j=1}^{n} t_j, \qquad
    t_i \leftarrow G_i(z)

  Near a solution its noise vanishes, so that a constant step converges as on
  the whole data, at the price of :math:`n` gradients in memory. The table
  starts at zero: until a part was seen, its gradient is not corrected.

  Args:
    oracle: what to evaluate.
    parts: :math:`n`, into how many parts the data are divided: fixed batches,
      or single examples. With fewer rows in one objective, the larger number.
    index: which part a batch is, from the batch; an integer scalar in
      [0, parts). With rows of several objectives that draw samples of their
      own, an integer for each row. By default parts come in turn, the first
      batch being part 0.
    examples: whether the batch holds single examples, each a part of its own:
      then `index` gives an integer for each, all different, and the oracle is
      mapped over them. One evaluation is counted, as for the whole batch.
    like: makes, from the parameters, a pytree of the structure of what the
      oracle gives, as in `storm`.

  Returns:
    An oracle.

  Raises:
    ValueError: if `parts` is below 1, if `examples` lacks an `index`, or at the
      call, if the oracle gives another structure than `like`.

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
  numbers = parts if isinstance(parts, tuple) else (parts,)
  for number in numbers:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
      raise ValueError(f'saga takes a whole number of parts >= 1, got {parts}.')
  if not numbers:
    raise ValueError('saga takes a number of parts for each row, got none.')
  if examples and len(numbers) > 1:
    raise ValueError('saga over examples takes one number of parts.')
  largest = max(numbers)
  if examples and index is None:
    raise ValueError(
      'saga over examples needs their numbers: pass index=..., a function from '
      'the batch to an integer for each example.'
    )
  inner = optax.with_extra_args_support(oracle)

  def init_fn(params):
    shape = like(params)
    # The sum of copies, and not an empty table, is sharded like its rows.
    table = jax.tree.map(
      lambda x: jnp.zeros_like(jnp.stack([x] * largest)), shape
    )
    mean = jax.tree.map(jnp.zeros_like, shape)
    return SagaState(jnp.zeros([], jnp.int32), table, mean, inner.init(params))

  def evaluate_each(batch, state, params, numbers, extra_args):
    """Gradients with a leading axis of examples."""
    split = _accumulate.split_batch(batch, numbers.shape[0])
    one = lambda part: inner.update(part, state, params, **extra_args)
    gradients, states = jax.vmap(one)(split)
    measured = base.measured(states)
    after = jax.tree.map(lambda x: x[0], states)
    means = jax.tree.map(lambda v: v.mean(axis=0), measured)
    return gradients, base.replace_measured(after, means)

  def update_fn(batch, state, params=None, **extra_args):
    if index is None:
      which = state.count % jnp.asarray(parts, jnp.int32)
    else:
      which = jnp.asarray(index(batch), jnp.int32)
    if examples:
      gradients, after = evaluate_each(
        batch, state.inner, params, which, extra_args
      )
    else:
      gradients, after = inner.update(batch, state.inner, params, **extra_args)
    by_row = isinstance(gradients, types.Jacobian) and which.ndim == 1
    if by_row and not examples:
      pick = lambda table: (which, jnp.arange(which.shape[0]))
    else:
      pick = lambda table: which

    def pair(gradient, table, mean):
      last = table[pick(table)]
      change = (gradient - last).astype(table.dtype)
      fresh = change.mean(0) if examples else change
      total = change.sum(0) if examples else change
      share = 1 / jnp.asarray(numbers, mean.dtype)
      if len(numbers) > 1:
        share = share.reshape(-1, *[1] * (mean.ndim - 1))
      elif not mean.shape:
        share = share[0]
      return _Updated(
        fresh + mean,
        table.at[pick(table)].add(change),
        (mean + total * share).astype(mean.dtype),
      )

    held = jax.tree.map(lambda t, m: _Updated(m, t, m), state.table, state.mean)
    new = _storm.map_given(
      'saga',
      lambda gradient, one: pair(gradient, one.table, one.mean),
      gradients,
      estimate=held,
    )
    part = lambda name: jax.tree.map(
      lambda one: getattr(one, name), new, is_leaf=_is_updated
    )
    directions = jax.tree.map(
      lambda given, found: None if given is None else found,
      gradients,
      part('direction'),
      is_leaf=lambda node: node is None,
    )
    count = optax.safe_increment(state.count)
    return directions, SagaState(count, part('table'), part('mean'), after)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Updated(NamedTuple):
  """What an update makes of one leaf."""

  direction: chex.Array
  table: chex.Array
  mean: chex.Array


def _is_updated(node: Any) -> bool:
  return isinstance(node, _Updated)
