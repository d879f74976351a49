"""Parts of a batch: contiguous blocks of examples, or every n-th example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_jax import _checks


def _parted(name: str, batch: Any, parts: int, fold: Callable[..., Any]) -> Any:
  """Folds each leaf of a batch into a new leading axis of parts."""
  _checks.whole_number(name, 'parts', parts)

  def one(leaf):
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and not leaf.shape:
      return jax.random.split(leaf, parts)
    if not leaf.shape or leaf.shape[0] % parts:
      raise ValueError(
        f'{name} splits a batch into {parts} equal parts, but a leaf has the '
        f'shape {leaf.shape}: choose a batch size that {parts} divides, or '
        'pass your own `split`.'
      )
    return fold(leaf, leaf.shape[0] // parts)

  return jax.tree.map(one, batch)


def split_batch(batch: Any, parts: int) -> Any:
  """Splits every leaf of a batch into equal parts along its first axis.

  Args:
    batch: a pytree of arrays with a leading axis of examples; a scalar PRNG key
      is split into one key per part.
    parts: the number of parts.

  Returns:
    The pytree with a new leading axis of parts.

  Raises:
    ValueError: if a leaf has no leading axis, or `parts` does not divide it.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> print(bj.evaluation.split_batch({'image': jnp.arange(4)}, 2)['image'])
    [[0 1]
     [2 3]]
  """
  fold = lambda leaf, size: leaf.reshape(parts, size, *leaf.shape[1:])
  return _parted('split_batch', batch, parts, fold)


def deal_batch(batch: Any, parts: int) -> Any:
  """Deals the examples of a batch to the parts in turn, like cards.

  Args:
    batch: as in `split_batch`.
    parts: the number of parts.

  Returns:
    The pytree with a new leading axis of parts. If the batch is one of several
    devices' shares, its parts are shares of the parts of the whole batch.

  Raises:
    ValueError: as in `split_batch`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> print(bj.evaluation.deal_batch(jnp.arange(4), 2))
    [[0 2]
     [1 3]]
  """
  fold = lambda leaf, size: jnp.moveaxis(
    leaf.reshape(size, parts, *leaf.shape[1:]), 1, 0
  )
  return _parted('deal_batch', batch, parts, fold)
