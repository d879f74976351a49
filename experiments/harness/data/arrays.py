"""Arrays of MATLAB files."""

import pathlib
import struct
import zlib

import numpy as np
import scipy.io

from experiments.harness.data import sources
from experiments.harness.store import files

# Maximum bytes of a file after decompression.
MOST_MAT = 2**28
_COMPRESSED = 15


def read_mat(path: files.Path, *names: str) -> tuple[np.ndarray, ...]:
  """Reads variables of a MATLAB file of a version before 7.3.

  Args:
    path: the file.
    *names: names of the variables.

  Returns:
    The arrays.

  Raises:
    DamagedDataError: if it is no such file or lacks a variable.
  """
  path = pathlib.Path(path)
  with sources.parsing(path, 'MATLAB file'):
    _check_inflated(path)
    variables = scipy.io.loadmat(path, variable_names=names)
    if absent := set(names).difference(variables):
      raise ValueError(f'it has no variable {", ".join(sorted(absent))}')
    return tuple(variables[name] for name in names)


def _check_inflated(path):
  """Measures the decompressed size piece by piece, against zip bombs."""
  total = 0
  with open(path, 'rb') as file:
    order = {b'IM': '<', b'MI': '>'}.get(file.read(128)[126:])
    while order and len(tag := file.read(8)) == 8:
      kind, size = struct.unpack(f'{order}II', tag)
      end = file.tell() + size
      inflate = zlib.decompressobj()
      more = lambda end=end: file.read(min(end - file.tell(), 2**16))
      data = more() if kind == _COMPRESSED else b''
      while data:
        total += len(inflate.decompress(data, 2**20))
        if total > MOST_MAT:
          raise ValueError(f'it has more than the {MOST_MAT:,} bytes of a file')
        data = inflate.unconsumed_tail or more()
      file.seek(end)
