"""Stores arrays computed from frozen weights and data in files."""

import hashlib
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments import harness
from experiments.harness.store import files
from experiments.lm import checked_files


def load_or_compute(
  folder: files.Path | None,
  kind: str,
  text: str,
  tree: Any,
  compute: Callable[[], dict[str, Any]],
  *,
  names: Sequence[str],
  count: int,
) -> dict[str, np.ndarray]:
  """Loads arrays from a file, or computes and stores them.

  The name of the file has a digest of all inputs, including every weight and
  token. A damaged file is moved away with a warning and computed again.

  Args:
    folder: folder of the files, may be shared by processes; None stores
      nothing.
    kind: one word for the name of the file.
    text: further inputs as text, such as the config and the dtype.
    tree: arrays that are inputs.
    compute: computes the arrays.
    names: names of the arrays.
    count: length of their leading axis.

  Returns:
    The arrays by name.

  Raises:
    WriteError: if the folder cannot be written.
  """

  def compute_all():
    return {n: np.asarray(harness.as_numpy(a)) for n, a in compute().items()}

  if folder is None:
    return compute_all()
  digest = _digest(f'1 {kind} {text}', tree)
  path = pathlib.Path(folder) / f'{kind}-{digest}.npz'
  arrays = _read(path, names, count)
  loaded = arrays is not None
  if jax.process_count() > 1:
    loaded = bool(np.all(multihost_utils.process_allgather(np.array(loaded))))
  if loaded and arrays is not None:
    return arrays
  arrays = compute_all()
  buffer = io.BytesIO()
  np.savez(buffer, **{_stored_name(n, a): _plain(a) for n, a in arrays.items()})
  files.write_bytes(path, buffer.getvalue())
  return arrays


def _is_plain(array: np.ndarray) -> bool:
  """Whether numpy files support the dtype; they do not support bfloat16."""
  return array.dtype.kind != 'V'


def _stored_name(name: str, array: np.ndarray) -> str:
  return name if _is_plain(array) else f'{name}:{array.dtype.name}'


def _plain(array: np.ndarray) -> np.ndarray:
  return array if _is_plain(array) else array.view(f'u{array.dtype.itemsize}')


def _digest(text: str, tree: Any) -> str:
  """Digest of a text and of all numbers of a tree."""
  digest = hashlib.blake2b(text.encode(), digest_size=16)
  for path, leaf in jax.tree.leaves_with_path(tree):
    array = np.ascontiguousarray(harness.as_numpy(leaf))
    name = jax.tree_util.keystr(path)
    digest.update(f'{name} {array.dtype} {array.shape}'.encode())
    digest.update(array.view(np.uint8).data if array.size else b'')
  return digest.hexdigest()


def _read(
  path: pathlib.Path, names: Sequence[str], count: int
) -> dict[str, np.ndarray] | None:
  """Reads a file; None if it is missing or damaged."""
  try:
    content = checked_files.require_regular(path).read_bytes()
    with np.load(io.BytesIO(content)) as file:
      # Stored arrays are not compressed.
      if any(one.compress_type for one in file.zip.infolist()):
        raise ValueError(f'{path} is compressed')
      stored = {
        n.partition(':')[0]: (n, n.partition(':')[2]) for n in file.files
      }
      columns = {}
      for name in names:
        full, dtype = stored[name]
        columns[name] = file[full].view(dtype) if dtype else file[full]
    if all(len(column) == count for column in columns.values()):
      return columns
  except FileNotFoundError:
    return None
  except Exception:  # A damaged file may raise anything.
    pass
  files.put_aside(path, f'{path} is damaged; it is computed again', path.parent)
  return None
