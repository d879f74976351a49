"""Explicit data parallelism: the mean gradient over a mapped axis."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import _sequences, states
from bilevel_jax.oracles import base


def mean_over(
  oracle: optax.GradientTransformation,
  axis_name: Hashable | tuple[Hashable, ...],
) -> base.Oracle:
  r"""Averages an oracle's gradients and losses over devices.

  .. math::
    d = \frac{1}{M} \sum_{m=1}^{M} d(batch_m)

  For `jax.shard_map`, `jax.pmap` and `jax.vmap` with an axis name. `jax.jit`
  with sharded batches needs no wrapper, since XLA inserts the mean.

  The oracle's inner state, a warm start for instance, is averaged too, so it
  stays the same on all devices. In `implicit`, `gradient_norm` and
  `compositional`, which are not linear in their samples, each evaluation of the
  losses is averaged instead: in a linear system, each Hessian-vector product.

  Args:
    oracle: the oracle to evaluate on each device's part of the batch.
    axis_name: the mapped axis, or several.

  Returns:
    An oracle; `bj.counts` counts what one device evaluates.

  Raises:
    ValueError: if the oracle is not linear in its samples and cannot average
      its losses.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp
    >>> loss = lambda params, batch: (params - batch) ** 2 / 2
    >>> oracle = bj.evaluation.mean_over(bj.gradient(loss), 'devices')
    >>> params = jnp.float32(0.0)
    >>> step = lambda b: oracle.update(b, oracle.init(params), params)[0]
    >>> print(jax.vmap(step, axis_name='devices')(jnp.array([1.0, 3.0])))
    [-2. -2.]
  """

  def mean(tree):
    one = lambda leaf: (
      jax.lax.pmean(leaf, axis_name)
      if jnp.issubdtype(leaf.dtype, jnp.inexact)
      else leaf
    )
    return jax.tree.map(one, tree)

  def own(tree):
    # In a shard_map, the derivative in a value whose type is shared by all
    # devices is already a sum over devices. In a value whose type varies over
    # devices, it is the device's own.
    axes = _sequences.varying_axes(jax.lax.axis_index(axis_name))
    return jax.tree.map(lambda leaf: _sequences.vary(leaf, axes), tree)

  def mean_of_fn(fn, batch, *at):
    return mean(fn(batch, *own(at)))

  def linear(one):
    def update_fn(batch, state, params=None, **extra_args):
      gradients, after = one.update(batch, state, own(params), **extra_args)
      after = states.map_inner(mean, after)
      gradients, losses = mean((gradients, states.measured(after)))
      return gradients, states.replace_measured(after, losses)

    return base.Oracle(one.init, update_fn)

  remedy = (
    'give jax.jit a sharded batch, without this wrapper, or chain it to its '
    'aggregator by bj.oracles.aggregated'
  )
  return base.take_mean(
    oracle, base.Mean(mean_of_fn, linear), 'mean_over', remedy
  )
