"""Broken MATLAB files, and weights in .npz archives."""

import functools
import io
import json
import struct
import zipfile
import zlib

import numpy as np
import scipy.io
import scipy.sparse

from experiments.moco import tabular_data
from experiments.speech import front_end, recogniser, units
from experiments.tracking import models
from tests.faults.corpus import data_case as case

SARCOS, SCHOOL = 'sarcos_inv_test.mat', 'school.mat'
TABLE = np.arange(8 * 28.0).reshape(8, 28)


def mat(packed=False, **variables):
  """A MATLAB file."""
  file = io.BytesIO()
  scipy.io.savemat(file, variables, do_compression=packed)
  return file.getvalue()


def row(*tables):
  """A row of cells."""
  cells = np.empty((1, len(tables)), object)
  cells[0] = tables
  return cells


def _table(values=TABLE, packed=False):
  return mat(packed, sarcos_inv_test=values)


def _with(place, value, dtype=np.float64):
  table = TABLE.astype(dtype)
  table[place] = value
  return _table(table)


def _header(version=b'\x00\x01IM'):
  return b' ' * 124 + version


def _element(kind, content, size=None):
  """An element, filled up to a multiple of 8 bytes."""
  size = len(content) if size is None else size
  return struct.pack('<II', kind, size) + content + bytes(-len(content) % 8)


def _matrix(kind=6, dims=(8, 28), content=b'', name=b'sarcos_inv_test'):
  """A variable; class 6 has doubles, class 1 cells."""
  return _element(
    14,
    _element(6, struct.pack('<II', kind, 0))
    + _element(5, struct.pack(f'<{len(dims)}i', *dims))
    + _element(1, name)
    + content,
  )


def _doubles(count):
  return _element(9, bytes(8 * count))


def _nested(depth):
  """Cells within cells; sizes are filled in from the outermost one."""
  head = _matrix(1, (1, 1), name=b'')
  size = len(head)
  parts = [
    struct.pack('<II', 14, size * (depth - i) - 8) + head[8:]
    for i in range(depth)
  ]
  return b''.join(parts)


def _deep(depth, name=b'X'):
  inner = _nested(depth)
  return _header() + _matrix(1, (1, 1), inner, name)


def _packed_variable(content):
  return _header() + _element(15, zlib.compress(content))


def _version_4(rows, columns):
  name = b'sarcos_inv_test\0'
  return struct.pack('<5i', 0, rows, columns, 0, len(name)) + name + bytes(64)


MATRICES = {
  'empty': b'',
  'HTML': case.HTML,
  'cut header': _table()[:100],
  'cut': lambda: case.cut(_table()),
  'cut packed': lambda: case.cut(_table(packed=True)),
  'flipped packed': lambda: case.flipped(_table(packed=True), 200),
  'HDF5': lambda: _header(b'\x00\x02IM') + b'\x89HDF\r\n\x1a\n' + bytes(500),
  'version 4': lambda: _version_4(8, 28),
  'version 4, terabytes': lambda: _version_4(2**20, 2**20),
  'another variable': (lambda: mat(X=TABLE), 'sarcos_inv_test'),
  'another shape': lambda: _table(TABLE[:, :27]),
  'four rows': lambda: _table(TABLE[:4]),
  'three axes': lambda: _table(np.ones((8, 28, 2))),
  'nan': (lambda: _with((2, 3), np.nan), 'row 3, column 4'),
  'inf': (lambda: _with((7, 27), -np.inf), 'row 8, column 28'),
  '1e39': (lambda: _with((0, 0), 1e39), 'row 1, column 1'),
  'complex': lambda: _with((0, 0), 1j, np.complex128),
  'text': lambda: _table('abc'),
  'cells': lambda: _table(row(TABLE, TABLE)),
  'structure': lambda: _table({'a': TABLE}),
  'sparse': lambda: _table(scipy.sparse.csc_matrix(TABLE)),
  'dims of 2^31': lambda: _header() + _matrix(6, (2**31 - 1,) * 2, _doubles(9)),
  'dims of 1 GiB': lambda: _header() + _matrix(6, (2**22, 28), _doubles(9)),
  'negative dims': lambda: _header() + _matrix(6, (-8, 28), _doubles(9)),
  'dims that overflow': lambda: _header() + _matrix(6, (2**30,) * 9),
  '10,000 dims': lambda: _header() + _matrix(6, (1,) * 10_000, _doubles(1)),
  'size of 4 GiB': lambda: _header() + _element(14, bytes(64), 2**32 - 1),
  'numbers of 4 GiB': lambda: (
    _header() + _matrix(6, (8, 28), _element(9, bytes(64), 2**32 - 8))
  ),
  'packed numbers of 4 GiB': lambda: _packed_variable(
    _matrix(6, (8, 28), _element(9, bytes(64), 2**32 - 8))
  ),
  'cells of 2^31': lambda: _header() + _matrix(1, (1, 2**31 - 1)),
  'cells of 100 million': lambda: _header() + _matrix(1, (1, 10**8)),
  'function': lambda: _header() + _matrix(16, (1, 1), _doubles(1)),
  'object': lambda: _header() + _matrix(3, (1, 1), _doubles(1)),
  'unknown class': lambda: _header() + _matrix(99, (1, 1), _doubles(1)),
  'unknown order': lambda: _header(b'\x00\x01XX') + _matrix(),
  'deep cells': lambda: _deep(20_000, b'sarcos_inv_test'),
  'zeros': lambda: (
    _header() + _element(15, case.bomb(_matrix()[:64], 400, wbits=15))
  ),
  **case.IRREGULAR,
}
X, Y = np.ones((6, 3)), np.ones((6, 1))
SCHOOLS = {
  'no scores': (lambda: mat(X=row(X, X)), 'Y'),
  'numbers instead of cells': lambda: mat(X=X, Y=Y),
  'no school': lambda: mat(X=row(), Y=row()),
  'fewer scores': lambda: mat(X=row(X, X), Y=row(Y, Y[1:])),
  'fewer schools': lambda: mat(X=row(X, X), Y=row(Y)),
  'few pupils': lambda: mat(X=row(X, X[:3]), Y=row(Y, Y[:3])),
  'other features': lambda: mat(X=row(X, X[:, :2]), Y=row(Y, Y)),
  'three axes': lambda: mat(X=row(np.ones((6, 3, 2))), Y=row(Y)),
  'nan': lambda: mat(X=row(X, X * np.nan), Y=row(Y, Y)),
  'text': lambda: mat(X=row(X, 'abc'), Y=row(Y, Y)),
  'cells in cells': lambda: mat(X=row(X, row(X, X)), Y=row(Y, Y)),
  'complex': lambda: mat(X=row(X, X * 1j), Y=row(Y, Y)),
  'deep cells': lambda: _deep(200_000),
}


def npy(array=None, *, header=None, version=1, content=b''):
  """A member of an archive, of an array or of any header."""
  if header is None:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()
  size = '<H' if version == 1 else '<I'
  text = header.encode()
  start = b'\x93NUMPY' + bytes((version, 0)) + struct.pack(size, len(text))
  return start + text + content


def _described(shape, dtype='<f4', order='False', more=''):
  named = f"'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}"
  return f'{{{named}{more}}}\n'


def archive(members, packing=zipfile.ZIP_STORED):
  """A zip archive of members by name."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', packing) as content:
    for name, member in members.items():
      content.writestr(f'{name}.npy', member)
  return file.getvalue()


@functools.cache
def _tracker():
  rules = np.array(models.tracker.Rules(), np.float64)
  weights = {
    f'weights/{name}': npy(np.ones(shape, np.float32))
    for name, shape in models.network.shapes(4).items()
  }
  noise = npy(np.array(models.motion.NOISE))
  return {'noise': noise, 'rules': npy(rules), **weights}


def _tracker_with(name, member, packing=zipfile.ZIP_STORED):
  members = {**_tracker(), name: member}
  if member is None:
    del members[name]
  return archive(members, packing)


def _embed(**header):
  return lambda: _tracker_with('weights/embed', npy(**header))


def _encrypted():
  content = bytearray(_tracker_with('more', npy(np.ones(3))))
  at = content.rindex(b'PK\x01\x02')
  content[at + 8] |= 1
  return bytes(content)


KEY = 'weights/embed'
TRACKERS = {
  'empty': b'',
  'HTML': case.HTML,
  'start of an archive': case.ZIP,
  'cut': lambda: case.cut(archive(_tracker())),
  'no member': lambda: archive({}),
  'no noise': (lambda: _tracker_with('noise', None), 'noise'),
  'no weights': (lambda: _tracker_with(KEY, None), 'embed'),
  'fewer rules': (lambda: _tracker_with('rules', npy(np.ones(2))), 'rules'),
  'objects': (
    _embed(header=_described((1,), '|O'), content=b'\x80\x04]\x94}\x94a.'),
    KEY,
  ),
  'objects announced': (_embed(header=_described((3,), '|O')), KEY),
  'texts': (lambda: _tracker_with('noise', npy(np.array(['a']))), 'noise'),
  'texts for weights': (
    lambda: _tracker_with('weights/input', npy(np.array(['a']))),
    'weights/input',
  ),
  'weights of another shape': (
    lambda: _tracker_with('weights/last', npy(np.ones((5, 1), np.float32))),
    'weights/last',
  ),
  'structured': (
    lambda: _tracker_with(KEY, npy(np.zeros(3, [('a', 'f4'), ('b', 'f4')]))),
    KEY,
  ),
  'nan': (lambda: _tracker_with(KEY, npy(np.full((99, 4), np.nan))), KEY),
  'noise inf': (
    lambda: _tracker_with('noise', npy(np.full(9, np.inf))),
    'noise',
  ),
  'complex': (lambda: _tracker_with(KEY, npy(np.ones((9, 4)) * 1j)), KEY),
  'terabytes': (_embed(header=_described((2**20, 2**20))), KEY),
  'a GiB': (_embed(header=_described((2**14, 2**14))), KEY),
  'a GiB in Fortran order': (
    _embed(header=_described((2**14, 2**14), order='True')),
    KEY,
  ),
  'negative shape': (_embed(header=_described((-1, 4))), KEY),
  'shape that overflows': (_embed(header=_described((2**62, 4))), KEY),
  'shape of 100 axes': (_embed(header=_described((1,) * 100)), KEY),
  'shape word': (_embed(header=_described("'a'")), KEY),
  'text of 2 GiB': (_embed(header=_described((), '<U536870911')), KEY),
  'header too long': (_embed(header=_described((3,)) + ' ' * 60_000), KEY),
  'header of 1 MB': (
    _embed(header=_described((3,)) + ' ' * 2**20, version=2),
    KEY,
  ),
  'header nested': (_embed(header='(' * 5_000 + ')' * 5_000), KEY),
  'header call': (_embed(header='__import__("os").getcwd()\n'), KEY),
  'header key': (_embed(header=_described((3,), more=", 'x': 1")), KEY),
  'header latin-1': (_embed(header='\xe9'), KEY),
  'version 9': (_embed(header=_described((3,)), version=9), KEY),
  'no magic': (lambda: _tracker_with(KEY, b'no array'), KEY),
  'empty member': (lambda: _tracker_with(KEY, b''), KEY),
  'fewer numbers': (
    _embed(header=_described((99, 4)), content=bytes(100)),
    KEY,
  ),
  'more numbers': (_embed(header=_described((1, 4)), content=bytes(100)), KEY),
  'zeros': (
    lambda: _tracker_with(
      KEY,
      npy(header=_described((2**24, 9)), content=bytes(9 * 2**26)),
      zipfile.ZIP_DEFLATED,
    ),
    '',
  ),
  'wrong checksum': lambda: case.flipped(archive(_tracker()), 300),
  'encrypted': _encrypted,
  **case.IRREGULAR,
}


@functools.cache
def _recogniser():
  front = front_end.FrontEnd(8_000, 16)
  shape = recogniser.Shape('conv', 8, 0, (2, 2), 3, 2, False, 11, front)
  about = {
    'shape': shape.to_json(),
    'units': 'x',
    'utterance_seconds': 1.0,
  }
  return about


def _about(**changes):
  about = {**_recogniser(), **changes}
  return lambda: archive({'about': npy(np.array(json.dumps(about)))})


RECOGNISERS = {
  'no description': (lambda: archive({'a': npy(np.ones(3))}), 'about'),
  'description of a number': lambda: archive({'about': npy(np.ones(3))}),
  'no JSON': lambda: archive({'about': npy(np.array('{'))}),
  'deep JSON': lambda: archive({'about': npy(np.array('[' * 100_000))}),
  'list': lambda: archive({'about': npy(np.array('[]'))}),
  'no weights': _about(),
  'no shape': _about(shape=None),
  'wrong shape': _about(shape={'x': 1}),
  'text of 2 GiB': (
    lambda: archive({'about': npy(header=_described((), '<U536870911'))}),
    'about',
  ),
  **case.IRREGULAR,
}
_UNITS = {'kind': 'characters', 'known': ['a', 'b']}


def _units(**changes):
  return units.files.seal({**_UNITS, **changes})


UNITS = {
  'empty': '',
  'HTML': case.HTML,
  'no digest': json.dumps(_UNITS),
  'another digest': lambda: _units().replace('"a"', '"c"'),
  'list': '[]',
  'null': 'null',
  'deep JSON': '[' * 100_000,
  'long integer': '{"kind": ' + '9' * 5_000 + '}',
  'latin-1': b'{"kind": "\xe9"}',
  'kind': (lambda: _units(kind='syllables'), 'kind'),
  'kind of a list': (lambda: _units(kind=['words']), 'kind'),
  'units of a number': (lambda: _units(known=3), 'known'),
  'units of a text': (lambda: _units(known='abc'), 'known'),
  'units of numbers': (lambda: _units(known=[1, 2]), 'known'),
  'units of objects': (lambda: _units(known=[{}]), 'known'),
  'same unit twice': (lambda: _units(known=['a', 'a']), 'known'),
  'no units': (lambda: units.files.seal({'kind': 'words'}), 'known'),
  'unit of two characters': (lambda: _units(known=['ab']), 'known'),
  **case.IRREGULAR,
}
PIECES = {
  'no model': lambda: units.files.seal({'kind': 'pieces'}),
  'model of a number': lambda: _units(kind='pieces', model=3),
  'no base64': lambda: _units(kind='pieces', model='!'),
  'empty model': lambda: _units(kind='pieces', model=''),
  'another model': lambda: _units(kind='pieces', model='aGVsbG8gd29ybGQ='),
}


def _sarcos(folder):
  return tabular_data.read_sarcos(str(folder))


def cases() -> list[case.Case]:
  """All cases of this module."""
  make = case.cases
  read_units = lambda folder: units.load(folder / 'units.json')
  return [
    *make('sarcos', SARCOS, _sarcos, MATRICES),
    *make(
      'school',
      SCHOOL,
      lambda folder: tabular_data.read_school(str(folder)),
      SCHOOLS,
    ),
    *make(
      'tracker',
      'search.npz',
      lambda folder: models.load(folder / 'search.npz'),
      TRACKERS,
    ),
    *make(
      'recogniser',
      'recogniser.npz',
      lambda folder: recogniser.load(folder / 'recogniser.npz'),
      RECOGNISERS,
    ),
    *make('units', 'units.json', read_units, UNITS),
    *make('units', 'units.json', read_units, PIECES, package='sentencepiece'),
  ]
