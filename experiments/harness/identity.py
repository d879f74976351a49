"""What tells one run's arrays from another's: digests, fast for large ones."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Bytes up to which all of an array is read, and about what is read of others.
_WHOLE = 2**24
# Arrays up to which each is named.
_FEW = 16


def digests(name: str, tree: Any) -> dict[str, str]:
  """A digest for each array, or one for all where they are many.

  Args:
    name: of the tree.
    tree: a pytree of arrays. Of one above 16 MiB, equally spaced numbers count;
      of one that lies on other processes too, its shape.

  Returns:
    Hex digests by name and path.
  """
  leaves = jax.tree.leaves_with_path(tree)
  if len(leaves) > _FEW:
    return {name: digest(tree)}
  return {
    f'{name}{jax.tree_util.keystr(path)}': _digest(leaf)
    for path, leaf in leaves
  }


def digest(tree: Any) -> str:
  """One digest of a pytree of arrays and of their paths."""
  parts = [
    f'{jax.tree_util.keystr(path)}{_digest(leaf)}'
    for path, leaf in jax.tree.leaves_with_path(tree)
  ]
  return hashlib.blake2b(''.join(parts).encode(), digest_size=8).hexdigest()


def _digest(leaf: Any) -> str:
  if isinstance(leaf, jax.Array):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
  else:
    leaf = np.asarray(leaf)
  found = hashlib.blake2b(digest_size=8)
  found.update(f'{leaf.dtype}{leaf.shape}'.encode())
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
    # Odd, so that it is no multiple of a row of a power of two.
    stride = 1 if leaf.nbytes <= _WHOLE else 2 * (leaf.nbytes // _WHOLE) + 1
    read = np.asarray(leaf.reshape(-1)[::stride])
    found.update(np.ascontiguousarray(read).tobytes())
  return found.hexdigest()
