"""Broken files of weights: safetensors and their index."""

import json
import os
import pathlib
import struct

import ml_dtypes
import numpy as np

from tests.faults.corpus.models import Case, edit, put, special

FILE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
NORM, LAYER = 'model.norm.weight', 'model.layers.1.self_attn.k_proj.weight'


def split(raw):
  """Splits a file into its header and data."""
  (length,) = struct.unpack('<Q', raw[:8])
  return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header, data, length=None):
  """Joins a header, also as text, and data."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  size = len(text) if length is None else length
  return struct.pack('<Q', size) + text + data


def header(change, file=FILE):
  """Changes the header of a file."""

  def apply(raw):
    fields, data = split(raw)
    return joined(change(fields), data)

  return edit(file, apply)


def tensor(name, file=FILE, **changes):
  """Changes the entry of a tensor."""
  return header(
    lambda fields: {**fields, name: {**fields[name], **changes}}, file
  )


def shifted(name, start, end, file=FILE):
  """Moves the offsets of a tensor."""

  def change(fields):
    a, b = fields[name]['data_offsets']
    moved = {**fields[name], 'data_offsets': [a + start, b + end]}
    return {**fields, name: moved}

  return header(change, file)


def text(change):
  """Changes the text of the header."""

  def apply(raw):
    fields, data = split(raw)
    return joined(change(json.dumps(fields).encode()), data)

  return edit(FILE, apply)


def tensors(change, dtype='F32'):
  """Writes the tensors again, changed."""

  def apply(raw):
    fields, data = split(raw)
    arrays = {
      n: np.frombuffer(data[slice(*f['data_offsets'])], np.float32).reshape(
        f['shape']
      )
      for n, f in fields.items()
      if n != '__metadata__'
    }
    return packed(change(arrays))

  return edit(FILE, apply)


_NAMES = {
  'float32': 'F32',
  'float64': 'F64',
  'float16': 'F16',
  'bfloat16': 'BF16',
  'int8': 'I8',
  'int64': 'I64',
  'bool': 'BOOL',
  'float8_e4m3fn': 'F8_E4M3',
}


def packed(arrays):
  """Writes arrays as safetensors do."""
  fields, data = {}, b''
  for name, array in arrays.items():
    raw = np.ascontiguousarray(array).tobytes()
    fields[name] = {
      'dtype': _NAMES[array.dtype.name],
      'shape': list(array.shape),
      'data_offsets': [len(data), len(data) + len(raw)],
    }
    data += raw
  return joined(fields, data)


def _with(name, value, dtype=np.float32):
  def change(arrays):
    array = np.array(arrays[name], dtype)
    array.flat[-1] = value
    return {**arrays, name: array}

  return tensors(change)


def _cast(name, dtype):
  return tensors(lambda a: {**a, name: a[name].astype(dtype)})


def _huge_sparse(folder):
  """A file of a terabyte without data on the disk, which a header fits."""
  count = 2**38
  entry = {'dtype': 'F32', 'shape': [count], 'data_offsets': [0, 4 * count]}
  path = folder / FILE
  content = joined({'model.embed_tokens.weight': entry}, b'')
  path.write_bytes(content)
  os.truncate(path, len(content) + 4 * count)


def sharded(folder, change_map=lambda places: places, **fields):
  """Splits the weights into two files with an index."""
  header_fields, data = split((folder / FILE).read_bytes())
  header_fields.pop('__metadata__', None)
  arrays = {
    n: np.frombuffer(data[slice(*f['data_offsets'])], np.float32).reshape(
      f['shape']
    )
    for n, f in header_fields.items()
  }
  names, places = sorted(arrays), {}
  for i, part in enumerate((names[:9], names[9:]), 1):
    file = f'model-{i:05}-of-00002.safetensors'
    (folder / file).write_bytes(packed({n: arrays[n] for n in part}))
    places |= dict.fromkeys(part, file)
  (folder / FILE).unlink()
  index = {'metadata': {}, 'weight_map': change_map(places)} | fields
  (folder / INDEX).write_text(json.dumps(index))


def index(change=lambda places: places, after=lambda folder: None, **fields):
  def damage(folder):
    sharded(folder, change, **fields)
    after(folder)

  return damage


SECOND = 'model-00002-of-00002.safetensors'


def _outside(folder):
  (folder.parent / f'{folder.name}-outside.safetensors').write_bytes(
    (folder / SECOND).read_bytes()
  )


def _link_out(path: pathlib.Path):
  outside = path.parent.with_name(f'{path.parent.name}-outside.safetensors')
  outside.write_bytes(b'')
  path.symlink_to(outside)


def _duplicate(folder):
  """Copies a tensor into a file that no index names."""
  _, raw = folder, (folder / FILE).read_bytes()
  (folder / 'other.safetensors').write_bytes(raw)


_DEEP = b'{"a":' + b'[' * 100_000 + b']' * 100_000 + b'}'
_DAMAGE = {
  'is empty': ('', put(FILE, b'')),
  'has four bytes': ('', put(FILE, b'abcd')),
  'is a git-lfs pointer': (
    'git lfs',
    put(FILE, 'version https://git-lfs.github.com/spec/v1\noid sha256:0\n'),
  ),
  'is a page of HTML': ('', put(FILE, '<!DOCTYPE html><html></html>')),
  'is a pickle': ('', put(FILE, b'\x80\x04\x95\x10\x00\x00\x00\x00\x00')),
  'has a header of 2**63 bytes': (
    '',
    edit(FILE, lambda raw: struct.pack('<Q', 2**63) + raw[8:]),
  ),
  'has a header beyond its end': (
    '',
    edit(FILE, lambda raw: struct.pack('<Q', len(raw)) + raw[8:]),
  ),
  'has a header of 0 bytes': (
    '',
    edit(FILE, lambda raw: struct.pack('<Q', 0) + raw[8:]),
  ),
  'has a header that is not JSON': ('', text(lambda t: b'{' + t)),
  'has a header that is not UTF-8': (
    '',
    text(lambda t: t.replace(b'model.norm', b'model\xffnorm')),
  ),
  'has a header that is a list': ('', text(lambda t: b'[' + t + b']')),
  'has a deep header': ('', text(lambda t: _DEEP)),
  'has zero bytes in its header': (
    '',
    text(lambda t: t.replace(b'"dtype"', b'\0dtype"')),
  ),
  'has a tensor twice': (
    '',
    text(
      lambda t: (
        t[:-1] + b', "' + NORM.encode() + b'": ' + b'{"dtype": "F32",'
        b' "shape": [1], "data_offsets": [0, 4]}}'
      )
    ),
  ),
  'has overlapping tensors': ('', shifted(NORM, -4, -4)),
  'has reversed offsets': (
    '',
    tensor(NORM, data_offsets=[64, 0]),
  ),
  'has negative offsets': ('', tensor(NORM, data_offsets=[-64, 0])),
  'has offsets beyond its end': ('', shifted(NORM, 2**40, 2**40)),
  'has offsets that are texts': ('', tensor(NORM, data_offsets=['0', '64'])),
  'has an unknown dtype': ('', tensor(NORM, dtype='F33')),
  'has a dtype that is a number': ('', tensor(NORM, dtype=32)),
  'has 2**40 numbers': ('', tensor(NORM, shape=[2**40])),
  'has a shape whose product overflows': (
    '',
    tensor(NORM, shape=[2**33, 2**33]),
  ),
  'has a negative shape': ('', tensor(NORM, shape=[-16])),
  'has a shape of fractions': ('', tensor(NORM, shape=[16.5])),
  'has other offsets than its shape': ('', tensor(NORM, shape=[15])),
  'is cut short': ('', edit(FILE, lambda raw: raw[:-4])),
  'is cut in its header': ('', edit(FILE, lambda raw: raw[:100])),
  'has more than its header says': ('', edit(FILE, lambda raw: raw + b'abcd')),
  'has NaN in a norm': (NORM, _with(NORM, np.nan)),
  'has NaN in a layer': (LAYER, _with(LAYER, np.nan)),
  'has infinity': (LAYER, _with(LAYER, -np.inf)),
  'has NaN in bfloat16': (LAYER, _with(LAYER, np.nan, ml_dtypes.bfloat16)),
  'has infinity in float16': (LAYER, _with(LAYER, np.inf, np.float16)),
  'has 1e300 in float64': (LAYER, _with(LAYER, 1e300, np.float64)),
  'has weights of int8': (f'{LAYER}.*quantised', _cast(LAYER, np.int8)),
  'has weights of int64': (f'{LAYER}.*quantised', _cast(LAYER, np.int64)),
  'has weights of bool': (f'{LAYER}.*quantised', _cast(LAYER, np.bool_)),
  'has weights of float8': (
    f'{LAYER}.*quantised',
    _cast(LAYER, ml_dtypes.float8_e4m3fn),
  ),
  'lacks a tensor': (
    f'has no tensor {LAYER}',
    tensors(lambda a: {n: w for n, w in a.items() if n != LAYER}),
  ),
  'has no tensor': ('no .*safetensors', tensors(lambda a: {})),
  'has a transposed tensor': (
    f'{LAYER}.*shape',
    tensors(lambda a: {**a, LAYER: a[LAYER].T}),
  ),
  'has a flat tensor': (
    f'{LAYER}.*shape',
    tensors(lambda a: {**a, LAYER: a[LAYER].ravel()}),
  ),
  'has a scalar for a tensor': (
    f'{NORM}.*shape',
    tensors(lambda a: {**a, NORM: np.float32(1).reshape(())}),
  ),
  'has an empty tensor': (
    f'{NORM}.*shape',
    tensors(lambda a: {**a, NORM: np.zeros(0, np.float32)}),
  ),
  'has fewer embeddings': (
    'embed_tokens.*shape',
    tensors(
      lambda a: a | {n: w[:-9] for n, w in a.items() if 'embed_tokens' in n}
    ),
  ),
  'is a folder': ('regular', special(FILE, lambda path: path.mkdir())),
  'is a FIFO': ('regular', special(FILE, os.mkfifo)),
  'is a device': (
    'regular|outside',
    special(FILE, lambda path: path.symlink_to('/dev/zero')),
  ),
  'leads out of the folder': ('outside', special(FILE, _link_out)),
  'is a link to nothing': (
    'missing|link',
    special(FILE, lambda path: path.symlink_to(path.with_name('none'))),
  ),
}
CASES = {
  # A tensor that no file has is missing in the folder.
  f'{FILE} {name}': Case('model', '' if 'no ' in cause else FILE, cause, damage)
  for name, (cause, damage) in _DAMAGE.items()
}
CASES |= {
  f'{FILE} is a sparse terabyte': Case(
    'model', FILE, 'shape|tensor', _huge_sparse, heavy=True
  ),
  'a tensor is in two files': Case(
    'model', 'safetensors', 'more than one file', _duplicate
  ),
  'the folder has no weights': Case(
    'model', '', 'safetensors', lambda folder: (folder / FILE).unlink()
  ),
}
_INDEXES = {
  'is empty': ('', index(after=put(INDEX, b''))),
  'is a list': ('', index(after=put(INDEX, b'[]'))),
  'is cut short': ('', index(after=edit(INDEX, lambda raw: raw[:-9]))),
  'is deep': ('', index(after=put(INDEX, _DEEP))),
  'is a FIFO': ('regular', index(after=special(INDEX, os.mkfifo))),
  'has no weight_map': ('weight_map', index(after=put(INDEX, b'{}'))),
  'has a weight_map that is a list': ('weight_map', index(weight_map=[1])),
  'has an empty weight_map': ('weight_map', index(weight_map={})),
  'has a file that is a number': (NORM, index(lambda p: {**p, NORM: 1})),
  'names a file above the folder': (
    r'\.\./',
    index(
      lambda p: {**p, NORM: '../outside.safetensors'},
      _outside,
    ),
  ),
  'names a file by its full path': (
    '/etc/passwd',
    index(lambda p: {**p, NORM: '/etc/passwd'}),
  ),
  'names a file with a zero byte': (
    '',
    index(lambda p: {**p, NORM: 'a\0.safetensors'}),
  ),
  'names a file of another format': (
    r'pytorch_model\.bin',
    index(lambda p: {**p, NORM: 'pytorch_model.bin'}),
  ),
  'names another file for a tensor': (
    NORM,
    index(lambda p: {**p, NORM: 'model-00001-of-00002.safetensors'}),
  ),
  'names a tensor that no file has': (
    'model.more',
    index(lambda p: {**p, 'model.more': SECOND}),
  ),
}
CASES |= {
  f'{INDEX} {name}': Case('model', INDEX, cause, damage)
  for name, (cause, damage) in _INDEXES.items()
}
_SHARDS = {
  'is missing': ('missing', lambda path: path.unlink()),
  'is empty': ('', lambda path: path.write_bytes(b'')),
  'is cut short': ('', lambda path: path.write_bytes(path.read_bytes()[:-8])),
  'is a FIFO': ('regular', lambda path: (path.unlink(), os.mkfifo(path))),
  'is a page of HTML': ('', lambda path: path.write_text('<html></html>')),
}
CASES |= {
  f'a shard {name}': Case(
    'model',
    SECOND,
    cause,
    index(after=lambda folder, change=change: change(folder / SECOND)),
  )
  for name, (cause, change) in _SHARDS.items()
}
