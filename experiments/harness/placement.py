"""Which device holds what: examples are split, everything else is copied.

With more than one device, of one process or several, the leading axis of shared
data is split over all of them and the rest is replicated; the compiler then
splits the work on the examples and adds up the results. The result is that of
one device, up to rounding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# Elements a device below which a split costs more than it saves.
_WORTH_IT = 2**16


def place(data: Any, shard: Any = None) -> tuple[Any, NamedSharding | None]:
  """Puts shared data on the devices.

  Args:
    data: a pytree of arrays. If one of them lies on several devices already,
      all are left as they are.
    shard: whether to split the leading axis of a leaf: a pytree prefix of
      `data` of True, False and None. None splits it if the devices divide it
      and each gets enough to be worth it.

  Returns:
    The data, and the sharding for all else; None if there is nothing to split
    and one process.

  Raises:
    ValueError: if a leaf to split has no leading axis that the devices divide.
  """
  leaves, structure = jax.tree.flatten(data)
  prefix = jax.tree.broadcast(shard, data, is_leaf=lambda x: x is None)
  wishes = jax.tree.leaves(prefix, is_leaf=lambda x: x is None)
  paths = [path for path, _ in jax.tree.leaves_with_path(data)]
  count = jax.device_count()
  split = [
    _is_split(leaf, wish, count, jax.tree_util.keystr(path))
    for leaf, wish, path in zip(leaves, wishes, paths, strict=True)
  ]
  placed = any(
    isinstance(x, jax.Array) and len(x.sharding.device_set) > 1 for x in leaves
  )
  if placed or not (any(split) or jax.process_count() > 1):
    return jax.tree.map(jnp.asarray, data), None
  mesh = jax.make_mesh((count,), ('examples',), axis_types=(AxisType.Auto,))
  everywhere = NamedSharding(mesh, PartitionSpec())
  examples = NamedSharding(mesh, PartitionSpec('examples'))
  put = [
    jax.device_put(leaf, examples if is_split else everywhere)
    for leaf, is_split in zip(leaves, split, strict=True)
  ]
  return jax.tree.unflatten(structure, put), everywhere


def replicate(tree: Any, everywhere: NamedSharding | None) -> Any:
  """Puts a pytree of arrays where `place` says that all else goes."""
  if everywhere is None:
    return jax.tree.map(jnp.asarray, tree)
  return jax.device_put(tree, everywhere)


def local(tree: Any, everywhere: NamedSharding | None) -> Any:
  """Makes replicated arrays ordinary ones, on one device of this process."""
  if everywhere is None:
    return tree
  return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def _is_split(leaf: Any, wish: bool | None, count: int, name: str) -> bool:
  shape = np.shape(leaf)
  divisible = bool(shape) and shape[0] > 0 and shape[0] % count == 0
  if wish and not divisible:
    raise ValueError(
      f'data{name} is to be split over {count} devices, which do not divide '
      f'the leading axis of its shape {shape}. Drop some examples, or give '
      'shard=False for it.'
    )
  if wish is None:
    enough = np.size(leaf) >= count * _WORTH_IT
    return count > 1 and divisible and enough
  return wish and count > 1
