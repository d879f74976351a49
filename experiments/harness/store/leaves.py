"""The leaves of a pytree as named arrays of the host, and back."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

Path = list[Any]


def named(tree: Any) -> list[tuple[str, Any]]:
  """Leaves with their paths; a number keeps equal paths apart, and in order."""
  flat, _ = jax.tree.flatten_with_path(tree)
  return [
    (f'{i:04d}.{jax.tree_util.keystr(path, simple=True, separator=".")}', leaf)
    for i, (path, leaf) in enumerate(flat)
  ]


def paths(tree: Any) -> list[Path]:
  """Paths of the leaves as plain values: names, and numbers in sequences."""
  flat, _ = jax.tree.flatten_with_path(tree)
  return [list(map(_plain, path)) for path, _ in flat]


def _plain(entry: Any) -> Any:
  for attribute in ('name', 'idx', 'key'):
    if hasattr(entry, attribute):
      value = getattr(entry, attribute)
      return value if isinstance(value, str | int) else str(value)
  return str(entry)


def nested(items: list[tuple[Path, Any]]) -> Any:
  """Dicts in dicts from paths to leaves; a leaf without a path is itself."""
  if len(items) == 1 and not items[0][0]:
    return items[0][1]
  levels: dict[Any, list[tuple[Path, Any]]] = {}
  for (first, *rest), leaf in items:
    levels.setdefault(first, []).append((rest, leaf))
  return {key: nested(below) for key, below in levels.items()}


def copies(tree: Any) -> list[np.ndarray]:
  """The leaves as arrays of the host that share no buffer with them."""
  plain = [
    jax.random.key_data(leaf) if _is_key(leaf) else leaf
    for leaf in jax.tree.leaves(tree)
  ]
  # Of an array of the CPU, numpy gets a view, which a donation would break.
  return [np.array(leaf, copy=True) for leaf in whole(plain)]


def empty(leaf: Any) -> np.ndarray:
  """Zeros of the shape and dtype in which `copies` has a leaf."""
  if _is_key(leaf):
    leaf = jax.eval_shape(jax.random.key_data, leaf)
  return np.zeros(leaf.shape, leaf.dtype)


def from_numpy(array: np.ndarray, like: Any) -> jax.Array:
  """What `copies` made an array of, as a fresh one that may be donated."""
  # A copy: jax may otherwise share numpy's buffer.
  copy = lambda index: jnp.array(array[index], copy=True)
  where = getattr(like, 'sharding', None)
  if isinstance(like, jax.ShapeDtypeStruct) and where is not None:
    # In parts: no device may be able to hold the whole.
    array = jax.make_array_from_callback(array.shape, where, copy)
  else:
    array = copy(...)
  if not _is_key(like):
    return array
  # `like` may be a mere shape: only a traced one tells the implementation.
  found = []
  jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like)
  return jax.random.wrap_key_data(array, impl=found[0])


def describe(array: np.ndarray) -> str:
  """Its dtype and shape."""
  return f'{array.dtype}{list(array.shape)}'


def digest(array: np.ndarray) -> str:
  """A hex digest of its bytes."""
  content = np.ascontiguousarray(array).tobytes()
  return hashlib.blake2b(content, digest_size=16).hexdigest()


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def whole(tree: Any) -> Any:
  """Arrays of numpy, also of what lies on other processes, who all call it."""

  def gather(leaf):
    here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    if here or leaf.is_fully_replicated:
      return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)

  return jax.tree.map(np.asarray, jax.device_get(jax.tree.map(gather, tree)))
