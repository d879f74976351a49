"""Digests of a run's data: of all bytes of its arrays and files.

Several threads digest large contents in blocks. Digests of files are cached by
path, size, modification time and inode.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.app import errors
from experiments.harness.store import files, leaves

# Bytes of a block. A larger content has a digest of its blocks' digests.
_BLOCK = 2**24
# Up to this number, each array or file has its own digest.
_MAX_SEPARATE = 16
_CACHE = 'digests.json'


def digests(name: str, tree: Any) -> dict[str, str]:
  """Digests each array of a tree, or all together if they are many.

  Args:
    name: name of the tree.
    tree: a pytree of arrays. If an array is spread over processes, all of them
      have to call this.

  Returns:
    Hex digests by name and path.
  """
  leaves = jax.tree.leaves_with_path(tree)
  if len(leaves) > _MAX_SEPARATE:
    return {name: digest(tree)}
  return {
    f'{name}{jax.tree_util.keystr(path)}': _digest(leaf)
    for path, leaf in leaves
  }


def digest(tree: Any) -> str:
  """Digests a pytree of arrays together with their paths."""
  parts = [
    f'{jax.tree_util.keystr(path)}{_digest(leaf)}'
    for path, leaf in jax.tree.leaves_with_path(tree)
  ]
  return _hash(''.join(parts).encode()).hexdigest()


def digest_examples(examples: Iterable[Any]) -> str:
  """Digests pytrees of arrays one at a time.

  Args:
    examples: pytrees of small arrays of any shapes.

  Returns:
    A hex digest, which depends on the order.
  """
  total = _hash()
  described: dict[Any, bytes] = {}
  for example in examples:
    leaves, structure = jax.tree.flatten(example)
    arrays = [_plain(leaf) for leaf in leaves]
    kind = structure, tuple((x.dtype, x.shape) for x in arrays)
    if kind not in described:
      described[kind] = _hash(str(kind).encode()).digest()
    total.update(described[kind])
    for array in arrays:
      total.update(array.tobytes())
  return total.hexdigest()


def digest_files(
  name: str, paths: Sequence[files.Path], folder: files.Path | None
) -> dict[str, str]:
  """Digests the bytes of files; unchanged files are not read again.

  Args:
    name: name of the files together.
    paths: paths of the files. The digests do not depend on their common folder.
    folder: folder of the run, which caches the digests in `digests.json`; None
      caches nothing.

  Returns:
    Hex digests by name and path, or one of all if they are many.

  Raises:
    MissingDataError: if a file cannot be read.
    WriteError: if the folder cannot be written.
  """
  known = {} if folder is None else _read_cache(pathlib.Path(folder) / _CACHE)
  absolute = [os.path.abspath(path) for path in paths]
  stats = {path: _stat(path) for path in absolute}
  changed = [p for p, stat in stats.items() if known.get(p, [])[:-1] != stat]
  if changed:
    blocks = [
      (path, start)
      for path in changed
      for start in range(0, max(stats[path][0], 1), _BLOCK)
    ]
    parts: dict[str, list[bytes]] = {path: [] for path in changed}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      for (path, _), part in zip(blocks, pool.map(_hash_block, blocks)):
        parts[path].append(part)
    for path in changed:
      known[path] = [*stats[path], _hash(*parts[path]).hexdigest()]
    if folder is not None:
      files.write_text(pathlib.Path(folder) / _CACHE, files.seal(known))
  if len(absolute) > _MAX_SEPARATE:
    joined = ''.join(known[path][-1] for path in absolute)
    return {name: _hash(joined.encode()).hexdigest()}
  common = os.path.commonpath([os.path.dirname(path) for path in absolute])
  return {
    f'{name}[{os.path.relpath(path, common)!r}]': known[path][-1]
    for path in absolute
  }


def digest_sources(root: files.Path) -> str:
  """Digests a Python file, or the names and contents of all below a folder."""
  root = pathlib.Path(root)
  total = _hash()
  for path in sorted(root.rglob('*.py')) if root.is_dir() else [root]:
    with _reading(str(path)):
      content = path.read_bytes()
    name = path.relative_to(root).as_posix()
    total.update(f'{name} {len(content)} '.encode() + content)
  return total.hexdigest()


def _read_cache(path: pathlib.Path) -> dict[str, list[Any]]:
  """Returns the cached digests; {} if they are missing or damaged."""
  try:
    return files.unseal(path.read_bytes())
  except (OSError, ValueError):
    return {}


def _stat(path: str) -> list[int]:
  """Returns the size, modification time and inode of a file."""
  with _reading(path):
    stat = os.stat(path)
  return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _hash_block(block: tuple[str, int]) -> bytes:
  path, start = block
  with _reading(path), open(path, 'rb') as file:
    file.seek(start)
    return _hash(file.read(_BLOCK)).digest()


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise errors.MissingDataError(
      f'{path} cannot be read: {error.strerror or error}. Correct its name or '
      'get it again.'
    ) from error


def _digest(leaf: Any) -> str:
  array = np.ascontiguousarray(_plain(leaf))
  head = f'{array.dtype}{array.shape}'.encode()
  if array.nbytes <= _BLOCK:
    return _hash(head, array.tobytes()).hexdigest()
  content = array.reshape(-1).view(np.uint8)
  blocks = [
    content[start : start + _BLOCK] for start in range(0, len(content), _BLOCK)
  ]
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    parts = pool.map(lambda block: _hash(block).digest(), blocks)
    return _hash(head, *parts).hexdigest()


def _hash(*contents: Any) -> Any:
  state = hashlib.blake2b(digest_size=8)
  for content in contents:
    state.update(content)
  return state


def _plain(leaf: Any) -> np.ndarray:
  """Converts a leaf to a numpy array."""
  if isinstance(leaf, jax.Array):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    leaf = leaves.as_numpy(leaf)
  return np.asarray(leaf)
