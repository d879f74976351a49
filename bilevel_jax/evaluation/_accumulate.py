"""Micro-batches: the mean gradient of a batch evaluated in parts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _checks, _sequences, _trees, states
from bilevel_jax.evaluation import _parts
from bilevel_jax.oracles import base


def accumulate(
  oracle: optax.GradientTransformation,
  parts: int,
  *,
  split: Callable[[Any, int], Any] = _parts.split_batch,
  accumulator_dtype: Any = jnp.float32,
) -> base.Oracle:
  r"""Averages an oracle over micro-batches within one update.

  .. math::
    d = \frac{1}{n} \sum_{i=1}^{n} d(batch_i)

  For losses that are means over examples, the result is that of the whole batch
  with the memory of one part. Gradients of losses and of value gaps are linear
  in the samples: they are averaged, and the oracle's state passes from part to
  part. `implicit`, `gradient_norm` and `compositional` are not linear; there
  each evaluation of the losses is averaged, in a linear system each
  Hessian-vector product, which then costs one more gradient.

  Args:
    oracle: the oracle to evaluate.
    parts: the number of parts :math:`n`, at least 1.
    split: maps (batch, parts) to a pytree with a leading axis of parts. If
      leaves are not examples, running statistics for instance, pass a function
      that repeats them for each part.
    accumulator_dtype: smallest dtype of sums over parts; the result has the
      oracle's dtypes.

  Returns:
    An oracle for the whole batch; `bj.counts` counts each part, `bj.values` and
    `bj.outputs` are means over the parts.

  Raises:
    ValueError: if `parts` is below 1, or if the oracle is not linear in its
      samples and cannot average its losses; at the call, if a batch does not
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
  _checks.whole_number('accumulate', 'parts', parts)

  def scan(evaluate, batch, state):
    """The mean result of `evaluate(part, state)`, and the last state."""
    batches = split(batch, parts)
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    shapes, _ = jax.eval_shape(evaluate, first, state)

    def zeros(shape):
      dtype = _trees.wide(shape.dtype, accumulator_dtype)
      axes = _sequences.varying_axes(shape)
      return _sequences.vary(jnp.zeros(shape.shape, dtype), axes)

    def add(total, one):
      inexact = jnp.issubdtype(one.dtype, jnp.inexact)
      return total + one.astype(total.dtype) / parts if inexact else one

    def body(carry, part):
      total, state = carry
      result, state = evaluate(part, state)
      return (jax.tree.map(add, total, result), state), None

    start = (jax.tree.map(zeros, shapes), state)
    (total, state), _ = jax.lax.scan(body, start, batches)
    back = lambda one, shape: one.astype(shape.dtype)
    return jax.tree.map(back, total, shapes), state

  def mean_of_fn(fn, batch, *at):
    # Derivatives evaluate it again, so that only the batch stays in memory.
    once = jax.checkpoint(fn, prevent_cse=False)
    return scan(lambda part, state: (once(part, *at), state), batch, ())[0]

  def linear(one):
    def update_fn(batch, state, params=None, **extra_args):
      def evaluate(part, before):
        gradients, after = one.update(part, before, params, **extra_args)
        # Not in the carry, since in a shard_map they change their type.
        losses = states.measured(after)
        # A schedule inside the oracle counts one update, not one per part.
        after = states.hold_measured(states.hold_updates(after, before), before)
        return (gradients, losses), after

      (gradients, losses), after = scan(evaluate, batch, state)
      return gradients, states.replace_measured(
        states.next_update(after), losses
      )

    return base.Oracle(one.init, update_fn)

  mean = base.Mean(mean_of_fn, linear, parts)
  return base.take_mean(oracle, mean, 'accumulate')
