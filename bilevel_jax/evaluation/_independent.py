"""Several independent Jacobians at one point, from parts of a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_jax import types
from bilevel_jax.oracles import _oracle


def deal_batch(batch: Any, parts: int) -> Any:
  """Deals the examples of a batch out in turn, like cards.

  Args:
    batch: a pytree of arrays with a leading axis of examples; a scalar PRNG key
      is split into one key a part.
    parts: how many parts.

  Returns:
    The pytree with a new leading axis of parts. On a batch that is itself one
    of several devices' parts, the dealt parts are those of the whole batch.

  Raises:
    ValueError: if a leaf has no leading axis or one that `parts` does not
      divide.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> print(bj.deal_batch(jnp.arange(4), 2))
    [[0 2]
     [1 3]]
  """

  def one(leaf):
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and not leaf.shape:
      return jax.random.split(leaf, parts)
    if not leaf.shape or leaf.shape[0] % parts:
      raise ValueError(
        f'deal_batch deals a batch into {parts} equal parts, but a leaf has '
        f'the shape {leaf.shape}: choose a batch size that {parts} divides, or '
        'pass a `split` of your own.'
      )
    dealt = leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:])
    return jnp.moveaxis(dealt, 1, 0)

  return jax.tree.map(one, batch)


def independent(
  oracle: optax.GradientTransformation,
  samples: int,
  *,
  split: Callable[[Any, int], Any] = deal_batch,
) -> optax.GradientTransformationExtraArgs:
  r"""Evaluates an oracle's Jacobian on several independent parts of a batch.

  For aggregators that multiply two of them, so that their noises do not
  correlate (`modo`, `sdmgrad`), and for `moco` with several samples.

  Args:
    oracle: gives a `Jacobian`.
    samples: how many, at least 1.
    split: makes a pytree with a leading axis of samples from (batch, samples);
      for instance `lambda batch, n: batch` for batches that come stacked.

  Returns:
    An oracle to a `Jacobian` whose rows are those of the first sample, then
    those of the second, and so on; what no weight touches is their mean.
    `bj.counts` counts each.

  Raises:
    TypeError: at the call, if the oracle gives no `Jacobian`.
    ValueError: if `samples` is below 1, or at the call, if a batch does not
      split.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> losses = lambda x, batch: jnp.stack([x * batch.mean(), x * 2.0])
    >>> oracle = bj.independent(bj.multi_objective(losses, 2), 2)
    >>> params = jnp.float32(1.0)
    >>> jacobian, _ = oracle.update(
    ...   jnp.array([1.0, 3.0]), oracle.init(params), params
    ... )
    >>> print(jacobian.rows)
    [1. 2. 3. 2.]
  """
  if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
    raise ValueError(
      f'independent takes a whole number of samples >= 1, got {samples}.'
    )
  inner = optax.with_extra_args_support(oracle)

  def update_fn(batch, state, params=None, **extra_args):
    batches = split(batch, samples)
    found, measured = [], []
    for i in range(samples):
      part = jax.tree.map(lambda leaf, i=i: leaf[i], batches)
      jacobian, state = inner.update(part, state, params, **extra_args)
      if not isinstance(jacobian, types.Jacobian):
        raise TypeError(
          'independent stacks the rows of Jacobians, got '
          f'{type(jacobian).__name__}: wrap an oracle that gives rows, '
          'bj.multi_objective(losses) for instance.'
        )
      found.append(jacobian)
      measured.append(_oracle.measured(state))
    join = lambda *leaves: jnp.concatenate(leaves)
    average = lambda *leaves: sum(leaves[1:], leaves[0]) / samples
    joined = types.Jacobian(
      rows=jax.tree.map(join, *(j.rows for j in found)),
      rest=jax.tree.map(average, *(j.rest for j in found)),
      values=jax.tree.map(join, *(j.values for j in found)),
    )
    means = jax.tree.map(average, *measured)
    return joined, _oracle.replace_measured(state, means)

  return optax.GradientTransformationExtraArgs(inner.init, update_fn)
