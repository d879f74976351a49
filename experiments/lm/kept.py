"""What is computed once of frozen weights and data, kept in files."""

import hashlib
import io
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments import harness
from experiments.harness.store import files


def arrays(
  folder: files.Path | None,
  what: str,
  text: str,
  tree: Any,
  make: Callable[[], dict[str, Any]],
  *,
  names: Sequence[str],
  count: int,
) -> dict[str, np.ndarray]:
  """Makes arrays once for each model and data, and reads them afterwards.

  The file's name is a digest of all that the numbers depend on, every weight
  and token included: other weights, other rows or another order are another
  file. A file that is damaged is put aside with a warning, and made anew.

  Args:
    folder: of such files; of several processes, all may see the same. None
      keeps nothing.
    what: they are, in one word, for the file's name.
    text: whatever else they depend on: the configuration, the dtype.
    tree: arrays that they depend on.
    make: computes them.
    names: of the arrays.
    count: the length of their leading axis.

  Returns:
    The arrays by name.

  Raises:
    WriteError: if the folder cannot be written.
  """

  def made():
    return {n: np.asarray(harness.as_numpy(a)) for n, a in make().items()}

  if folder is None:
    return made()
  digest = _digest(f'1 {what} {text}', tree)
  path = pathlib.Path(folder) / f'{what}-{digest}.npz'
  found = _read(path, names, count)
  here = found is not None
  if jax.process_count() > 1:
    here = bool(np.all(multihost_utils.process_allgather(np.array(here))))
  if here and found is not None:
    return found
  found = made()
  buffer = io.BytesIO()
  np.savez(buffer, **{_stored_name(n, a): _plain(a) for n, a in found.items()})
  files.write_bytes(path, buffer.getvalue())
  return found


def _is_plain(array: np.ndarray) -> bool:
  """Whether numpy's files keep the dtype, which of bfloat16 they do not."""
  return array.dtype.kind != 'V'


def _stored_name(name: str, array: np.ndarray) -> str:
  return name if _is_plain(array) else f'{name}:{array.dtype.name}'


def _plain(array: np.ndarray) -> np.ndarray:
  return array if _is_plain(array) else array.view(f'u{array.dtype.itemsize}')


def _digest(text: str, tree: Any) -> str:
  """Of all numbers: a sample of them would not see a changed token."""
  found = hashlib.blake2b(text.encode(), digest_size=16)
  for path, leaf in jax.tree.leaves_with_path(tree):
    array = np.ascontiguousarray(harness.as_numpy(leaf))
    name = jax.tree_util.keystr(path)
    found.update(f'{name} {array.dtype} {array.shape}'.encode())
    found.update(array.view(np.uint8).data if array.size else b'')
  return found.hexdigest()


def _read(
  path: pathlib.Path, names: Sequence[str], count: int
) -> dict[str, np.ndarray] | None:
  """What a file holds; None if there is none, or it is damaged."""
  try:
    with np.load(io.BytesIO(path.read_bytes())) as file:
      stored = {
        n.partition(':')[0]: (n, n.partition(':')[2]) for n in file.files
      }
      columns = {}
      for name in names:
        full, dtype = stored[name]
        columns[name] = file[full].view(dtype) if dtype else file[full]
    if all(len(one) == count for one in columns.values()):
      return columns
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    pass
  files.put_aside(
    path, f'{path} is damaged; what it held is computed anew', path.parent
  )
  return None
