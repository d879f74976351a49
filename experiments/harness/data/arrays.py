"""Arrays of MATLAB files and of .npz archives."""

import math
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from experiments.harness.data import reading
from experiments.harness.store import files

# Maximum bytes of a file after decompression, cells within cells, and axes.
MOST_MAT, _DEPTH, _MOST_AXES = 2**28, 8, 32
# Types of elements of MATLAB files.
_MATRIX, _COMPRESSED = 14, 15
# Classes of arrays: cells, texts, numbers by the type in memory; and a flag.
_CELLS, _TEXT, _COMPLEX = 1, 4, 1 << 11
_NUMBERS = {6: 'f8', 7: 'f4', 8: 'i1', 9: 'u1', 10: 'i2', 11: 'u2', 12: 'i4'}
_NUMBERS |= {13: 'u4', 14: 'i8', 15: 'u8'}
# Types of numbers and codes of texts in a file.
_STORED = {1: 'i1', 2: 'u1', 3: 'i2', 4: 'u2', 5: 'i4', 6: 'u4', 7: 'f4'}
_STORED |= {9: 'f8', 12: 'i8', 13: 'u8'}
_CODES = {2: 'latin-1', 4: 'utf-16', 16: 'utf-8', 17: 'utf-16', 18: 'utf-32'}
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
  path = pathlib.Path(path)
  with reading.parsing(path, 'MATLAB file'):
    variables = {v.name: v for v in _variables(path)}
    for name in names:
      if name not in variables:
        raise reading.damaged(f'{path}, {name}', 'the variable is missing')
    return tuple(_values(variables[name]) for name in names)


class _Array(NamedTuple):
  """An array of a file, not yet read.

  Attributes:
    name: of the variable; empty for a cell.
    flags: class and flags.
    sizes: of the axes.
    parts: types and contents of its numbers, text or cells.
    order: of bytes.
  """

  name: str
  flags: int
  sizes: tuple[int, ...]
  parts: list[tuple[int, memoryview]]
  order: str


def _variables(path: pathlib.Path) -> Iterator[_Array]:
  """Yields the variables of a file, not yet read.

  `scipy.io.loadmat` ends the process on some damaged files (a segmentation
  fault), so that the few types in use are read here.
  """
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
    size = 0
    while len(tag := file.read(8)) == 8:
      kind, length = struct.unpack(f'{order}II', tag)
      piece = file.read(min(length, limit))
      if len(piece) < length:
        raise ValueError(f'a variable has {len(piece):,} of {length:,} bytes')
      if kind == _COMPRESSED:
        piece = _decompress(path, piece, limit)
      else:
        piece = tag + piece
      size += len(piece)
      if size > limit:
        raise _large(path, limit)
      for element in _elements(memoryview(piece), order):
        yield _open(*element, order)


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
    if start + length > min(stop, len(content)):
      raise ValueError(f'an element announces {length:,} bytes')
    yield kind, content[start : start + length]
    content = content[stop:]


def _open(kind: int, content: memoryview, order: str) -> _Array:
  """Reads what an array announces."""
  if kind != _MATRIX:
    raise ValueError(f'it has an element of type {kind} in place of an array')
  if not content:  # An empty cell.
    return _Array('', 6, (0, 0), [(9, content)], order)
  (_, flags), (_, shape), (_, name), *parts = _elements(content, order)
  sizes = struct.unpack(f'{order}{len(shape) // 4}i', shape)
  if not 2 <= len(sizes) <= _MOST_AXES or min(sizes) < 0:
    raise ValueError(f'an array has the sizes {sizes}')
  flag = struct.unpack(f'{order}I', flags[:4])[0]
  return _Array(bytes(name).decode('latin-1'), flag, sizes, parts, order)


def _values(array: _Array, depth: int = 0) -> np.ndarray:
  """Reads real numbers, texts, or cells of them."""
  array_class, count = array.flags & 0xFF, math.prod(array.sizes)
  if array_class == _CELLS:
    if count != len(array.parts) or depth == _DEPTH:
      raise ValueError(
        f'{len(array.parts):,} cells at depth {depth}, {count:,} announced'
      )
    cells = np.empty(count, object)
    for i, part in enumerate(array.parts):
      cells[i] = _values(_open(*part, array.order), depth + 1)
    return cells.reshape(array.sizes, order='F')
  if array_class not in (*_NUMBERS, _TEXT) or array.flags & _COMPLEX:
    raise ValueError(
      f'{array.name or "a cell"} has neither real numbers nor a text nor cells'
    )
  ((stored, data),) = array.parts
  numbers: Any
  if array_class == _TEXT:
    code = _CODES[stored]
    if code in ('utf-16', 'utf-32'):
      code += '-le' if array.order == '<' else '-be'
    numbers = np.array(list(bytes(data).decode(code)), 'U1')
  else:
    numbers = np.frombuffer(data, array.order + _STORED[stored])
  if len(numbers) != count:
    raise ValueError(f'{len(numbers):,} numbers of the announced {count:,}')
  numbers = numbers.reshape(array.sizes, order='F')
  if array_class == _TEXT:
    return np.array([''.join(row) for row in numbers.reshape(len(numbers), -1)])
  return numbers.astype(_NUMBERS[array_class])


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
