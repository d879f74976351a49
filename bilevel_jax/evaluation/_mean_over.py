"""Data parallelism by hand: the mean gradient over a mapped axis."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences
from bilevel_jax.oracles import base


def mean_over(
  oracle: optax.GradientTransformation,
  axis_name: Hashable | tuple[Hashable, ...],
) -> optax.GradientTransformationExtraArgs:
  r"""Averages an oracle's gradients and losses over devices.

  .. math::
    d = \frac{1}{M} \sum_{m=1}^{M} d(batch_m)

  For `jax.shard_map`, `jax.pmap` and `jax.vmap` with an axis name. Under
  `jax.jit` with sharded batches, XLA inserts the mean itself: nothing is to be
  wrapped there.

  So is what the oracle keeps for its next evaluation, a warm start for
  instance: the state stays the same on all devices.

  Args:
    oracle: what to evaluate on each device's part of the batch.
    axis_name: the mapped axis, or several.

  Returns:
    An oracle; `bj.counts` counts what one device evaluates.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> loss = lambda params, batch: (params - batch) ** 2 / 2
    >>> oracle = bj.evaluation.mean_over(bj.gradient(loss), 'devices')
    >>> params = jnp.float32(0.0)
    >>> step = lambda b: oracle.update(b, oracle.init(params), params)[0]
    >>> print(jax.vmap(step, axis_name='devices')(jnp.array([1.0, 3.0])))
    [-2. -2.]
  """
  inner = optax.with_extra_args_support(oracle)

  def share(node):
    # Warm starts and the like: the state is the same on all devices.
    mean = lambda leaf: (
      jax.lax.pmean(leaf, axis_name)
      if jnp.issubdtype(leaf.dtype, jnp.inexact)
      else leaf
    )
    return node._replace(inner=jax.tree.map(mean, node.inner))

  def update_fn(batch, state, params=None, **extra_args):
    # In a shard_map, the derivative in parameters that all devices share is
    # already a sum over devices; in parameters that may differ, by their type,
    # it is each device's own.
    axes = _sequences.varying_axes(jax.lax.axis_index(axis_name))
    params = jax.tree.map(lambda leaf: _sequences.vary(leaf, axes), params)
    gradients, state = inner.update(batch, state, params, **extra_args)
    gradients, means = jax.lax.pmean(
      (gradients, base.measured(state)), axis_name
    )
    state = jax.tree.map(
      lambda node: share(node) if base.is_oracle_state(node) else node,
      state,
      is_leaf=base.is_oracle_state,
    )
    return gradients, base.replace_measured(state, means)

  return optax.GradientTransformationExtraArgs(inner.init, update_fn)
