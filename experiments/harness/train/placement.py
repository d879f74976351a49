"""Placement of arrays on devices: examples are split, the rest is replicated.

With several devices, of one process or more, the leading axis of shared data is
split over all of them and everything else is replicated. The compiler then
splits the work on examples and adds the results. A `Layout` also splits params,
frozen weights and the solver's state. The results equal those on one device up
to rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# Elements per device below which a split costs more than it saves.
_MIN_ELEMENTS = 2**16


class Layout(NamedTuple):
  """The placement of params on a mesh of devices.

  Attributes:
    mesh: the devices.
    specs: from a pytree of params or frozen weights, as `jax.ShapeDtypeStruct`
      without an axis of members, to a pytree or prefix of `PartitionSpec`;
      `PartitionSpec()` replicates.
    examples: axes of the mesh that split the examples; None for all.
  """

  mesh: jax.sharding.Mesh
  specs: Callable[[Any], Any]
  examples: tuple[str, ...] | None = None


class Placement(NamedTuple):
  """The placement of the arrays of a run.

  Attributes:
    everywhere: sharding of replicated arrays; None if nothing is split and
      there is one process.
    examples: sharding of examples, or None.
    specs: see `Layout`; None if params are replicated.
  """

  everywhere: NamedSharding | None = None
  examples: NamedSharding | None = None
  specs: Callable[[Any], Any] | None = None

  def replicate(self, tree: Any) -> Any:
    """Replicates a pytree of arrays on all devices."""
    if self.everywhere is None:
      return jax.tree.map(jnp.asarray, tree)
    return jax.device_put(tree, self.everywhere)

  def frozen(self, weights: Any) -> Any:
    """Places frozen weights."""
    if self.specs is None:
      return self.replicate(weights)
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, weights))
    return jax.device_put(weights, self._shardings(shapes))

  def carry(self, carry: Any) -> Any:
    """Returns the shardings of a `program.Carry` of `jax.ShapeDtypeStruct`."""
    if self.specs is None:
      return self.everywhere
    member = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), carry.params
    )
    params = jax.tree.map(self._for_members, self._shardings(member))
    shardings = jax.tree.map(lambda _: self.everywhere, carry)
    shardings = shardings._replace(
      params=params, state=_like_params(carry, params, self.everywhere)
    )
    if carry.best:
      best = shardings.best._replace(params=params)
      shardings = shardings._replace(best=best)
    return shardings

  def local(self, tree: Any) -> Any:
    """Returns replicated arrays as arrays of one device of this process."""
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
  """Places shared data on the devices.

  Args:
    data: a pytree of arrays. If one of them is on several devices already, all
      stay where they are.
    shard: see `Task`.
    layout: placement of params; None replicates them.
    batch_sizes: sizes of the stream's batches.

  Returns:
    The data, and the placement of everything else.

  Raises:
    ValueError: if the devices do not divide the leading axis of a leaf with
      `shard=True`.
  """
  if layout is None:
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ('examples',), axis_types=(AxisType.Auto,))
    axes = mesh.axis_names
  else:
    # Auto: the compiler chooses the shardings of intermediate arrays.
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
  """Guesses shardings of a solver's state, on which only speed depends.

  A leaf gets the sharding of the param with the same shape whose path shares
  the longest end with the leaf's path.
  """
  known = [
    (path, leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      jax.tree.leaves_with_path(carry.params),
      jax.tree.leaves(shardings),
      strict=True,
    )
  ]

  def choose(path, leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return everywhere
    same = [(p, s) for p, shape, s in known if shape == leaf.shape]
    if not same:
      return everywhere
    return max(same, key=lambda pair: _shared_end(pair[0], path))[1]

  return jax.tree_util.tree_map_with_path(choose, carry.state)


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
    enough = np.size(leaf) >= count * _MIN_ELEMENTS
    return count > 1 and divisible and enough
  return wish and count > 1
