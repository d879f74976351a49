"""Which device holds what: examples are split, everything else is copied.

With more than one device, of one process or several, the leading axis of shared
data is split over all of them and the rest is replicated; the compiler then
splits the work on the examples and adds up the results. A `Layout` also splits
params, frozen weights and what a solver keeps beside them. The result is that
of one device, up to rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# Elements a device below which a split costs more than it saves.
_WORTH_IT = 2**16


class Layout(NamedTuple):
  """How params lie on a mesh of devices.

  Attributes:
    mesh: the devices.
    specs: from a pytree of params, or of frozen weights, as
      `jax.ShapeDtypeStruct` without an axis of members, to a pytree or prefix
      of `PartitionSpec`; `PartitionSpec()` is whole on each device.
    examples: axes of the mesh over which examples are split; None for all.
  """

  mesh: jax.sharding.Mesh
  specs: Callable[[Any], Any]
  examples: tuple[str, ...] | None = None


class Placement(NamedTuple):
  """Where the arrays of a run go.

  Attributes:
    everywhere: the sharding of what is whole on each device; None where
      nothing is split and there is one process.
    examples: the sharding of examples, likewise.
    specs: of params, as in `Layout`; None if they are whole.
  """

  everywhere: NamedSharding | None = None
  examples: NamedSharding | None = None
  specs: Callable[[Any], Any] | None = None

  def replicate(self, tree: Any) -> Any:
    """Puts a pytree of arrays on all devices, whole."""
    if self.everywhere is None:
      return jax.tree.map(jnp.asarray, tree)
    return jax.device_put(tree, self.everywhere)

  def frozen(self, weights: Any) -> Any:
    """Puts weights that are not trained where the layout says."""
    if self.specs is None:
      return self.replicate(weights)
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, weights))
    return jax.device_put(weights, self._shardings(shapes))

  def carry(self, carry: Any) -> Any:
    """The shardings of a `program.Carry` of `jax.ShapeDtypeStruct`."""
    if self.specs is None:
      return self.everywhere
    one = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), carry.params
    )
    alone = self._shardings(one)
    params = jax.tree.map(self._for_members, alone)
    whole = jax.tree.map(lambda _: self.everywhere, carry)
    whole = whole._replace(
      params=params, state=_like_params(carry, params, self.everywhere)
    )
    if carry.best:
      whole = whole._replace(best=whole.best._replace(params=params))
    return whole

  def local(self, tree: Any) -> Any:
    """Makes whole arrays ordinary ones, on one device of this process."""
    if self.everywhere is None:
      return tree
    return jax.tree.map(
      lambda x: x.addressable_data(0) if x.is_fully_replicated else x, tree
    )

  def _shardings(self, shapes):
    specs = jax.tree.broadcast(self.specs(shapes), shapes, is_leaf=_is_spec)
    mesh = self.everywhere.mesh
    return jax.tree.map(
      lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec
    )

  def _for_members(self, sharding):
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def place(
  data: Any,
  shard: Any = None,
  *,
  layout: Layout | None = None,
  batch_sizes: tuple[int, ...] = (),
) -> tuple[Any, Placement]:
  """Puts shared data on the devices.

  Args:
    data: a pytree of arrays. If one of them lies on several devices already,
      all are left as they are.
    shard: whether to split the leading axis of a leaf: a pytree prefix of
      `data` of True, False and None. None splits it if the devices divide it
      and each gets enough to be worth it.
    layout: how params lie; None for whole on each device.
    batch_sizes: of the batches that the host makes.

  Returns:
    The data, and where all else goes.

  Raises:
    ValueError: if a leaf to split has no leading axis that the devices divide.
  """
  if layout is None:
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ('examples',), axis_types=(AxisType.Auto,))
    axes = mesh.axis_names
  else:
    # The compiler decides what happens between the arrays that are placed.
    names = layout.mesh.axis_names
    mesh = jax.sharding.Mesh(
      layout.mesh.devices, names, axis_types=(AxisType.Auto,) * len(names)
    )
    axes = names if layout.examples is None else layout.examples
    count = int(np.prod([mesh.shape[name] for name in axes]))
  leaves, structure = jax.tree.flatten(data)
  prefix = jax.tree.broadcast(shard, data, is_leaf=lambda x: x is None)
  wishes = jax.tree.leaves(prefix, is_leaf=lambda x: x is None)
  paths = [path for path, _ in jax.tree.leaves_with_path(data)]
  split = [
    _is_split(leaf, wish, count, jax.tree_util.keystr(path))
    for leaf, wish, path in zip(leaves, wishes, paths, strict=True)
  ]
  placed = any(
    isinstance(x, jax.Array) and len(x.sharding.device_set) > 1 for x in leaves
  )
  split_batches = count > 1 and all(n % count == 0 for n in batch_sizes)
  if jax.process_count() > 1 and batch_sizes and not split_batches:
    raise ValueError(
      f'batches of {", ".join(map(str, batch_sizes))} examples are to be split '
      f'over {count} devices of several processes: make each a multiple.'
    )
  needed = (
    any(split)
    or jax.process_count() > 1
    or layout is not None
    or (batch_sizes and split_batches)
  )
  if (placed and layout is None) or not needed:
    return jax.tree.map(jnp.asarray, data), Placement()
  everywhere = NamedSharding(mesh, PartitionSpec())
  examples = NamedSharding(mesh, PartitionSpec(axes))
  put = leaves
  if not placed:
    put = [
      jax.device_put(leaf, examples if is_split else everywhere)
      for leaf, is_split in zip(leaves, split, strict=True)
    ]
  return jax.tree.unflatten(structure, put), Placement(
    everywhere,
    examples if split_batches else everywhere,
    None if layout is None else layout.specs,
  )


def _is_spec(x: Any) -> bool:
  return isinstance(x, PartitionSpec)


def _like_params(carry: Any, shardings: Any, everywhere: NamedSharding) -> Any:
  """A solver keeps arrays like its params, under a path that ends like theirs.

  Of params with the shape of a leaf, the one whose path shares most with the
  end of the leaf's path tells where it goes. Only speed depends on it.
  """
  known = [
    (path, leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      jax.tree.leaves_with_path(carry.params),
      jax.tree.leaves(shardings),
      strict=True,
    )
  ]

  def of(path, leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return everywhere
    same = [(p, s) for p, shape, s in known if shape == leaf.shape]
    if not same:
      return everywhere
    return max(same, key=lambda pair: _shared_end(pair[0], path))[1]

  return jax.tree_util.tree_map_with_path(of, carry.state)


def _shared_end(one: tuple[Any, ...], other: tuple[Any, ...]) -> int:
  pairs = zip(map(str, reversed(one)), map(str, reversed(other)))
  return next((i for i, (a, b) in enumerate(pairs) if a != b), len(one))


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
