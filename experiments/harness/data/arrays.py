"""Arrays of MATLAB files and of .npz archives."""

import io
import math
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from experiments.harness.data import reading
from experiments.harness.store import files

# Maximum bytes of a file after decompression, cells within cells, and axes.
MOST_MAT, _DEPTH, _MOST_AXES = 2**28, 8, 32
# Types of elements of MATLAB files.
_MATRIX, _COMPRESSED = 14, 15
# Classes of arrays: cells, texts, numbers.
_CELLS, _NUMBERS = 1, (4, *range(6, 16))
# Kinds of NumPy's types: booleans, integers, numbers, texts.
_PLAIN = 'biufU'


def read_mat(path: files.Path, *names: str) -> tuple[np.ndarray, ...]:
  """Reads variables of a MATLAB file of versions 5 to 7.

  Args:
    path: the file.
    *names: names of the variables.

  Returns:
    The arrays of real numbers or texts, or of cells of them.

  Raises:
    MissingDataError: if the file is missing.
    DamagedDataError: if it is no such file or lacks a variable.
  """
  import scipy.io  # Slow to import, and needed here only.

  path = pathlib.Path(path)
  content = _inflate(path)
  with reading.parsing(path, 'MATLAB file'):
    variables = scipy.io.loadmat(io.BytesIO(content), variable_names=names)
  for name in names:
    if name not in variables:
      raise reading.damaged(f'{path}, {name}', 'the variable is missing')
    _check_real(variables[name], f'{path}, {name}')
  return tuple(variables[name] for name in names)


def _check_real(array, where):
  """Checks that an array has real numbers or texts, or cells of them."""
  if not isinstance(array, np.ndarray) or array.dtype.names:
    raise reading.damaged(where, 'it is no full array of numbers')
  if array.dtype.hasobject:
    for index, cell in np.ndenumerate(array):
      _check_real(cell, f'{where}, cell {", ".join(str(i + 1) for i in index)}')
  elif array.dtype.kind not in _PLAIN:
    raise reading.damaged(where, f'its numbers are {array.dtype}, not real')


def _inflate(path: pathlib.Path) -> bytes:
  """Decompresses the variables of a file, and checks their announced sizes."""
  limit = min(MOST_MAT, reading.growth_limit(reading.check_regular(path)))
  with reading.opened(path, 'MATLAB file') as file:
    header = file.read(128)
    order = {b'IM': '<', b'MI': '>'}.get(header[126:])
    if not order or struct.unpack(f'{order}H', header[124:126])[0] != 0x100:
      raise reading.damaged(
        path,
        'it is no MATLAB file of versions 5 to 7',
        'get it again, or save it by `save -v7` in MATLAB',
      )
    content = bytearray(header)
    with reading.parsing(path, 'MATLAB file'):
      while len(tag := file.read(8)) == 8:
        kind, length = struct.unpack(f'{order}II', tag)
        piece = file.read(min(length, limit))
        if len(piece) < length:
          raise ValueError(f'a variable has {len(piece):,} of {length:,} bytes')
        if kind == _COMPRESSED:
          piece = _decompress(path, piece, limit)
        else:
          piece = tag + piece
        if len(content) + len(piece) > limit:
          raise _large(path, limit)
        for element in _elements(memoryview(piece), order):
          _check_array(*element, order)
        content += piece
  return bytes(content)


def _decompress(path, piece, limit):
  inflate = zlib.decompressobj()
  content = inflate.decompress(piece, limit)
  if not inflate.eof:
    if len(content) == limit:
      raise _large(path, limit)
    raise ValueError('a variable is cut short')
  return content


def _large(path, limit):
  return reading.damaged(
    path, f'it has more than {limit:,} bytes after decompression'
  )


def _elements(
  content: memoryview, order: str
) -> Iterator[tuple[int, memoryview]]:
  """Yields types and contents of the elements of a file or of an array."""
  while len(content) >= 8:
    kind, length = struct.unpack(f'{order}II', content[:8])
    start, stop = 8, 8 + length + -length % 8
    if kind >> 16:  # At most 4 bytes, in the tag itself.
      kind, length, start, stop = kind & 0xFFFF, kind >> 16, 4, 8
    if start + length > len(content):
      raise ValueError(f'an element announces {length:,} bytes')
    yield kind, content[start : start + length]
    content = content[stop:]


def _check_array(
  kind: int, content: memoryview, order: str, depth: int = 0
) -> None:
  """Checks what an array announces, before it is allocated."""
  if kind != _MATRIX or depth > _DEPTH:
    raise ValueError(f'it has elements of type {kind} at depth {depth}')
  if not content:
    return
  (_, flags), (_, shape), *parts = _elements(content, order)
  array_class = struct.unpack(f'{order}I', flags[:4])[0] & 0xFF
  sizes = struct.unpack(f'{order}{len(shape) // 4}i', shape)
  if min(sizes) < 0 or len(sizes) > _MOST_AXES:
    raise ValueError(f'an array has the sizes {sizes}')
  arrays = [part for part in parts if part[0] == _MATRIX]
  for part in arrays:
    _check_array(*part, order, depth + 1)
  count = math.prod(sizes)
  if array_class == _CELLS and count != len(arrays):
    raise ValueError(f'{len(arrays):,} cells, not the announced {count:,}')
  if array_class in _NUMBERS and count > sum(len(x) for _, x in parts[1:]):
    raise ValueError(f'fewer bytes than the announced {count:,} numbers')


def read_npz(path: files.Path, what: str) -> dict[str, np.ndarray]:
  """Reads the arrays of an .npz archive.

  Args:
    path: the file.
    what: what the archive has, for messages.

  Returns:
    Arrays of numbers or texts by name.

  Raises:
    MissingDataError: if the file is missing.
    DamagedDataError: if the archive or an array is damaged, has other objects,
      or is larger than it may be; names the array.
  """
  size = reading.check_regular(path)
  with (
    reading.opened(path, what) as file,
    reading.parsing(path, f'{what}, an .npz archive'),
    zipfile.ZipFile(file) as archive,
  ):
    members = archive.infolist()
    reading.check_growth(path, size, sum(m.file_size for m in members))
    contents = {}
    for member in members:
      name = member.filename.removesuffix('.npy')
      if name in contents:
        raise reading.damaged(f'{path}, {name}', 'the array is there twice')
      with (
        reading.parsing(f'{path}, {reading.shorten(name)}', 'array'),
        archive.open(member) as content,
      ):
        contents[name] = _read_npy(content, member.file_size)
  return contents


def _read_npy(file: IO[bytes], size: int) -> np.ndarray:
  """Reads an array after checking its header against the size of its file."""
  version = np.lib.format.read_magic(file)
  readers: dict[tuple[int, int], Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }
  if version not in readers:
    raise ValueError(f'version {version}')
  shape, in_columns, dtype = readers[version](file)
  if dtype.kind not in _PLAIN:
    raise ValueError(f'its type is {dtype}, not numbers or a text')
  if not all(type(n) is int and n >= 0 for n in shape):
    raise ValueError(f'its shape is {shape}')
  count = math.prod(shape) * dtype.itemsize
  if count != size - file.tell():
    raise ValueError(
      f'its header announces {count:,} bytes, but it has {size - file.tell():,}'
    )
  content = file.read(count)
  array = np.frombuffer(content, dtype) if count else np.zeros(0, dtype)
  array = array.reshape(shape, order='F' if in_columns else 'C')
  if dtype.kind == 'f' and not np.isfinite(array).all():
    raise ValueError('a number is not finite')
  return array
