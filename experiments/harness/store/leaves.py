"""Leaves of a pytree as named numpy arrays, and back."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

Path = list[Any]


def named(tree: Any) -> list[tuple[str, Any]]:
  """Returns the leaves with unique names: a number and the path."""
  flat, _ = jax.tree.flatten_with_path(tree)
  return [
    (f'{i:04d}.{jax.tree_util.keystr(path, simple=True, separator=".")}', leaf)
    for i, (path, leaf) in enumerate(flat)
  ]


def paths(tree: Any) -> list[Path]:
  """Returns the paths of the leaves: names, and indices in sequences."""
  flat, _ = jax.tree.flatten_with_path(tree)
  return [list(map(_plain, path)) for path, _ in flat]


def _plain(entry: Any) -> Any:
  for attribute in ('name', 'idx', 'key'):
    if hasattr(entry, attribute):
      value = getattr(entry, attribute)
      return value if isinstance(value, str | int) else str(value)
  return str(entry)


def nested(items: list[tuple[Path, Any]]) -> Any:
  """Builds nested dicts from paths and leaves; a bare leaf stays a leaf."""
  if len(items) == 1 and not items[0][0]:
    return items[0][1]
  levels: dict[Any, list[tuple[Path, Any]]] = {}
  for (first, *rest), leaf in items:
    levels.setdefault(first, []).append((rest, leaf))
  return {key: nested(below) for key, below in levels.items()}


def copies(tree: Any) -> list[np.ndarray]:
  """Copies the leaves to numpy arrays."""
  plain = [
    jax.random.key_data(leaf) if _is_key(leaf) else leaf
    for leaf in jax.tree.leaves(tree)
  ]
  # numpy views a CPU array without a copy, which a donation would invalidate.
  return [np.array(leaf, copy=True) for leaf in as_numpy(plain)]


def empty(leaf: Any) -> np.ndarray:
  """Returns zeros with the shape and dtype of a leaf's copy."""
  if _is_key(leaf):
    leaf = jax.eval_shape(jax.random.key_data, leaf)
  return np.zeros(leaf.shape, leaf.dtype)


def from_numpy(array: np.ndarray, like: Any) -> jax.Array:
  """Converts a copy back to a new array, which may be donated."""
  # A copy: otherwise jax may share numpy's buffer.
  copy = lambda index: jnp.array(array[index], copy=True)
  where = getattr(like, 'sharding', None)
  if isinstance(like, jax.ShapeDtypeStruct) and where is not None:
    # In parts: the array may exceed the memory of a device.
    array = jax.make_array_from_callback(array.shape, where, copy)
  else:
    array = copy(...)
  if not _is_key(like):
    return array
  # `like` may be a shape, whose implementation is known only under a trace.
  impls = []
  jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), like)
  return jax.random.wrap_key_data(array, impl=impls[0])


def describe(array: np.ndarray) -> str:
  """Formats the dtype and shape of an array."""
  return f'{array.dtype}{list(array.shape)}'


def digest(array: np.ndarray) -> str:
  """Returns a hex digest of the bytes of an array."""
  content = np.ascontiguousarray(array).tobytes()
  return hashlib.blake2b(content, digest_size=16).hexdigest()


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def as_numpy(tree: Any) -> Any:
  """Converts leaves to numpy arrays.

  If an array is spread over processes, all of them have to call this.
  """

  def gather(leaf):
    here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    if here or leaf.is_fully_replicated:
      return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)

  return jax.tree.map(np.asarray, jax.device_get(jax.tree.map(gather, tree)))
