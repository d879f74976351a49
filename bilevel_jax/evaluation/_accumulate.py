"""Micro-batches: the mean gradient of a batch too large to evaluate at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences
from bilevel_jax.oracles import base


def split_batch(batch: Any, parts: int) -> Any:
  """Splits every leaf of a batch into equal parts along its first axis.

  Args:
    batch: a pytree of arrays with a leading axis of examples; a scalar PRNG key
      is split into one key a part.
    parts: how many parts.

  Returns:
    The pytree with a new leading axis of parts.

  Raises:
    ValueError: if a leaf has no leading axis or one that `parts` does not
      divide.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> print(bj.evaluation.split_batch({'image': jnp.arange(4)}, 2)['image'])
    [[0 1]
     [2 3]]
  """

  def one(leaf):
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and not leaf.shape:
      return jax.random.split(leaf, parts)
    if not leaf.shape or leaf.shape[0] % parts:
      raise ValueError(
        f'accumulate splits a batch into {parts} equal parts, but a leaf has '
        f'the shape {leaf.shape}: choose a batch size that {parts} divides, or '
        'pass a `split` of your own.'
      )
    return leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:])

  return jax.tree.map(one, batch)


def accumulate(
  oracle: optax.GradientTransformation,
  parts: int,
  *,
  split: Callable[[Any, int], Any] = split_batch,
) -> optax.GradientTransformationExtraArgs:
  r"""Evaluates an oracle on micro-batches and averages, within one update.

  .. math::
    d = \frac{1}{n} \sum_{i=1}^{n} d(batch_i)

  For losses that are means over examples, the gradients of losses and of value
  gaps are those of the whole batch, with the memory of one part. The
  gradient-norm penalty is not linear in the loss: there the result is the mean
  of the parts' penalties, which is larger.

  Args:
    oracle: what to evaluate; its state passes from part to part.
    parts: how many parts :math:`n`, at least 1.
    split: makes a pytree with a leading axis of parts from (batch, parts).

  Returns:
    An oracle for the whole batch; `bj.counts` counts each part.

  Raises:
    ValueError: if `parts` is below 1, or at the call, if a batch does not
      split.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> loss = lambda params, batch: jnp.mean((params - batch) ** 2)
    >>> oracle = bj.evaluation.accumulate(bj.gradient(loss), 2)
    >>> params = jnp.float32(1.0)
    >>> gradient, state = oracle.update(
    ...   jnp.arange(4.0), oracle.init(params), params
    ... )
    >>> print(gradient, bj.values(state)['loss'], bj.counts(state))
    -1.0 1.5 {'gradients/loss': 2}
  """
  if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
    raise ValueError(
      f'accumulate takes a whole number of parts >= 1, got {parts}.'
    )
  inner = optax.with_extra_args_support(oracle)

  def update_fn(batch, state, params=None, **extra_args):
    batches = split(batch, parts)
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    evaluate = lambda part, part_state: inner.update(
      part, part_state, params, **extra_args
    )
    shapes, _ = jax.eval_shape(evaluate, first, state)
    zeros = lambda shape: _sequences.vary(
      jnp.zeros(shape.shape, shape.dtype), _sequences.varying_axes(shape)
    )
    before = base.measured(state)

    def body(carry, part):
      total, part_state = carry
      gradients, part_state = evaluate(part, part_state)
      # A schedule inside the oracle sees one update, not one a part.
      part_state = base.hold_updates(part_state, state)
      total = jax.tree.map(lambda t, g: t + g / parts, total, gradients)
      measured = base.measured(part_state)
      # Out of the carry: in a shard_map they are of another type than before.
      return (total, base.replace_measured(part_state, before)), measured

    start = (jax.tree.map(zeros, shapes), state)
    (total, state), measured = jax.lax.scan(body, start, batches)
    state = base.next_update(state)
    means = jax.tree.map(lambda v: v.mean(axis=0), measured)
    return total, base.replace_measured(state, means)

  return optax.GradientTransformationExtraArgs(inner.init, update_fn)
