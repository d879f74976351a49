"""Files of other packages' formats: numpy's, MATLAB's, and images."""

import math
import pathlib
import struct
import warnings
import zlib

import numpy as np
import PIL.Image
import scipy.io

from experiments.harness.data import sources
from experiments.harness.store import files

# Bytes of a MATLAB file after decompression, and pixels of an image, at most.
MOST_MAT, MOST_PIXELS = 2**28, 2**25
_COMPRESSED = 15


def read_npy(path: files.Path) -> np.ndarray:
  """Reads an array of finite numbers that numpy saved.

  Args:
    path: the file.

  Returns:
    The array.

  Raises:
    DamagedDataError: if it is something else; names it.
  """
  path = pathlib.Path(path)
  what = 'array of numpy'
  with sources.opened(path, what) as file:
    with sources.parsing(path, what):
      version = np.lib.format.read_magic(file)
      read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
      }[version]
      shape, by_columns, dtype = read(file)
      if dtype.kind not in 'biuf' or min(shape, default=0) < 0:
        raise ValueError(f'its values are of type {dtype}')
    content = sources.read_bytes(path, file, math.prod(shape) * dtype.itemsize)
    array = content.view(dtype).reshape(shape, order='F' if by_columns else 'C')
  return sources.check_finite(path, array)


def read_mat(path: files.Path, *names: str) -> tuple[np.ndarray, ...]:
  """Reads variables of a MATLAB file, before version 7.3.

  Args:
    path: the file.
    *names: of the variables.

  Returns:
    The arrays.

  Raises:
    DamagedDataError: if it is something else, or has no such variable.
  """
  path = pathlib.Path(path)
  with sources.parsing(path, 'MATLAB file'):
    _check_inflated(path)
    found = scipy.io.loadmat(path, variable_names=names)
    if absent := set(names).difference(found):
      raise ValueError(f'it has no variable {", ".join(sorted(absent))}')
    return tuple(found[name] for name in names)


def _check_inflated(path):
  """Decompresses what is compressed piece by piece, to see how much it is."""
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


def read_image(path: files.Path, side: int) -> np.ndarray:
  """Reads a BMP, JPEG or PNG image, resized.

  Args:
    path: the file.
    side: of the result.

  Returns:
    uint8 (side, side, 3).

  Raises:
    DamagedDataError: if it is something else, or too large; names it.
  """
  with (
    sources.parsing(path, 'image'),
    warnings.catch_warnings(action='ignore'),
    PIL.Image.open(path, formats=('BMP', 'JPEG', 'PNG')) as image,
  ):
    if image.width * image.height > MOST_PIXELS:
      raise ValueError(f'it has more than {MOST_PIXELS:,} pixels')
    return np.asarray(image.convert('RGB').resize((side, side)))
