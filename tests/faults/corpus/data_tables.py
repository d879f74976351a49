"""Broken csv and LIBSVM files, digits in the idx format, and ARPA models."""

import gzip
import struct

import numpy as np

from experiments import harness, vision
from experiments.moco import tabular_data
from experiments.speech import ngram
from experiments.stsa import tables as two_classes
from tests.faults.corpus import data_case as case

ADULT = (
  'age,workclass,education-num,marital-status,occupation,race,sex,'
  'capital-gain,capital-loss,hours-per-week,income-per-year\n'
)
_PERSON = '20,A,1,M,O,R,Male,1,0,40,<=50K\n'


def _table(**options):
  return lambda folder: harness.read_table(folder / 'table', **options)


def _rows(*lines):
  return '\n'.join(('a,b,c', '1,2,3', *lines, '4,5,6')) + '\n'


def _wide(last):
  """A header and two lines of 100,000 columns, of which the last is given."""
  count = 100_000
  header = ','.join(f'column_{i}' for i in range(count))
  line = ','.join(['1'] * (count - 1))
  return f'{header}\n{line},1\n{line},{last}\n'


CSV = {
  'empty': '',
  'line breaks only': '\n\n\n',
  'header only': 'a,b,c\n',
  'one column': '1\n2\n3\n',
  'short line': (_rows('1,2'), 'line 3'),
  'long line': (_rows('1,2,3,4'), 'line 3'),
  'comma at the end': (_rows('1,2,3,'), 'line 3'),
  'word': (_rows('1,none,3'), 'line 3, column b'),
  'empty cell': (_rows('1,,3'), 'line 3, column b'),
  'nan': (_rows('1,nan,3'), 'line 3, column b'),
  'inf': (_rows('-inf,2,3'), 'line 3, column a'),
  'above double precision': (_rows('1,2,1e999'), 'line 3, column c'),
  'above single precision': (_rows('1,2,1e39'), 'line 3, column c'),
  'underscore': (_rows('1_0,2,3'), 'line 3, column a'),
  'hexadecimal': (_rows('0x10,2,3'), 'line 3, column a'),
  'decimal comma': (_rows('"1,5",2,3'), 'line 3, column a'),
  '400,000 digits': (_rows('1' * 400_000 + ',2,3'), 'line 3'),
  'NUL': (_rows('1,\0,3'), 'line 3'),
  'control character': (_rows('1,\x0b2\x1b[2J,3'), 'line 3'),
  'open quote': (_rows('1,"2,3'), 'line'),
  'quote within a cell': (_rows('1,"2"x,3'), 'line 3'),
  'line break in a cell': (_rows('1,"2\nx",3'), 'line'),
  'latin-1': ('a,b,c\n1,2,3\n1,\xe9,3\n'.encode('latin-1'), 'line 3'),
  'UTF-16': ('a,b,c\n1,2,3\n'.encode('utf-16'), 'line 1'),
  'half a surrogate': (b'a,b\n1,\xed\xa0\x80\n', 'line 2'),
  'two byte order marks': ('\ufeff\ufeff1,2\n3,4\n' + '5,x\n', 'line'),
  'same name twice': 'a,a,c\n1,2,3\n',
  'names without text': ',,c\n1,2,3\n',
  'HTML': case.HTML,
  'JSON': case.JSON,
  'picture': (case.PNG, 'line 1'),
  'spreadsheet': case.ZIP + b'\xff',
  '100,000 columns': (lambda: _wide('x'), 'line 3, column column_99999'),
  '100,000 columns, a short line': (lambda: _wide('')[:-2], 'line 3'),
  'line of 17 MB': (lambda: '1' * (17 * 2**20), 'line 1'),
  **case.IRREGULAR,
}
PACKED = {
  'not gzip': 'a,b\n1,2\n',
  'empty': b'',
  'cut short': lambda: case.cut(case.packed(_rows().encode() * 99)),
  'wrong checksum': lambda: case.flipped(case.packed(_rows().encode()), -6),
  'wrong length': lambda: case.flipped(case.packed(_rows().encode()), -2),
  'bytes after the end': lambda: case.packed(_rows().encode()) + b'junk',
  'packed twice': lambda: case.packed(case.packed(_rows().encode())),
  'zeros without a line': lambda: case.bomb(b'a,b\n1,', 300),
  'equal lines': lambda: case.bomb(b'a,b\n', 40, b'1,%062d\n' % 0),
  'empty lines': lambda: case.bomb(b'a,b\n1,2\n', 40, b'\n'),
  'many members': lambda: case.packed(b'1,%062d\n' % 0 * 2**14) * 99,
  **case.IRREGULAR,
}
CLASSES = {
  'three classes': ('1,a\n2,b\n3,c\n', 'line 3'),
  'one class': '1,a\n2,a\n',
  'class of 100,000 letters': (f'1,a\n2,b\n3,{"c" * 100_000}\n', 'line 3'),
  'class nan': ('1,a\n2,nan\n', 'line 2'),
  'empty class': ('1,a\n2,\n', 'line 2'),
}
LIBSVM = {
  'label word': ('1 1:1\nx 1:1\n', 'line 2'),
  'label nan': ('1 1:1\nnan 1:1\n', 'line 2'),
  'index 0': ('1 0:1\n', 'line 1'),
  'index -1': ('1 -1:1\n', 'line 1'),
  'descending': ('1 2:1 1:1\n', 'line 1'),
  'index twice': ('1 2:1 2:1\n', 'line 1'),
  'index 1e3': ('1 1e3:1\n', 'line 1'),
  'index 1_0': ('1 1_0:1\n', 'line 1'),
  'index of 4 billion': ('1 4000000000:1\n', 'line 1'),
  'index of 60 million': ('1 60000000:1\n', 'line 1'),
  'index of 5,000 digits': ('1 ' + '9' * 5_000 + ':1\n', 'line 1'),
  'value nan': ('1 1:nan\n', 'line 1'),
  'value inf': ('1 1:1\n1 2:-inf\n', 'line 2'),
  'value 1e39': ('1 1:1e39\n', 'line 1'),
  'no value': ('1 1:\n', 'line 1'),
  'no index': ('1 :1\n', 'line 1'),
  'two colons': ('1 1:2:3\n', 'line 1'),
  'query': ('1 qid:3 1:1\n', 'line 1'),
  'NUL': ('1 1:1\0\n', 'line 1'),
  'latin-1': (b'1 1:1\n1 1:\xe9\n', 'line 2'),
  'labels only': '1\n2\n',
  'comments only': '# a:b\n',
}
NAMED = {
  'adult.csv: a column is missing': ADULT.replace('race', 'x') + _PERSON,
  'adult.csv: negative capital': ADULT + 6 * _PERSON.replace(',1,0', ',-1,0'),
  'adult.csv: two people': ADULT + 2 * _PERSON,
  'adult.csv: age': (ADULT + _PERSON.replace('20', '?'), 'line 2, column age'),
}
MAGIC = {
  'three classes': ('1,2,g\n3,4,h\n5,6,x\n', 'line 3'),
  'no class': ('1,2,g\n3,4,\n', 'line 2'),
}


def idx(array, *, magic=0x800, sizes=None):
  """A file in the format of MNIST."""
  sizes = array.shape if sizes is None else sizes
  header = struct.pack(f'>I{len(sizes)}I', magic + array.ndim, *sizes)
  return header + array.astype(np.uint8).tobytes()


IMAGES, LABELS = np.ones((6, 28, 28)), np.arange(6)
_DIGITS = {
  'train-images-idx3-ubyte': idx(IMAGES),
  'train-labels-idx1-ubyte': idx(LABELS),
}
IDX = {
  'empty': b'',
  'cut header': idx(IMAGES)[:10],
  'floats': idx(IMAGES, magic=0xD00),
  'another number of axes': idx(LABELS),
  'little endian': struct.pack('<4I', 0x803, 6, 28, 28) + bytes(6 * 784),
  'sizes of 2^32': idx(IMAGES, sizes=(2**32 - 1,) * 3),
  'sizes of 1 GiB': idx(IMAGES, sizes=(2**20, 32, 32)),
  'negative size': idx(IMAGES, sizes=(2**32 - 6, 28, 28)),
  'one byte less': idx(IMAGES)[:-1],
  'one byte more': idx(IMAGES) + b'0',
  'no image': idx(np.ones((0, 28, 28))),
  'images of 20 x 20': idx(np.ones((6, 20, 20))),
  'fewer images': idx(np.ones((5, 28, 28))),
  'HTML': case.HTML,
  'packed without .gz': case.packed(idx(IMAGES)),
  **case.IRREGULAR,
}
IDX_LABELS = {
  'a label of 10': (idx(np.arange(5, 11)), 'label 6'),
  'a label of 255': (idx(np.full(6, 255)), 'label 1'),
  'no label': idx(np.arange(0)),
}
IDX_PACKED = {
  'not gzip': idx(IMAGES),
  'cut short': lambda: case.cut(gzip.compress(idx(IMAGES))),
  'wrong checksum': lambda: case.flipped(gzip.compress(idx(IMAGES)), -6),
  'more than announced': lambda: case.bomb(idx(IMAGES), 300),
  'announced zeros': lambda: case.bomb(
    idx(IMAGES[:0], sizes=(300 * 2**20 // 784, 28, 28)), 300
  ),
  'terabytes announced': lambda: case.bomb(
    idx(IMAGES[:0], sizes=(2**20, 2**20, 4)), 300
  ),
  **case.IRREGULAR,
}

ARPA = (
  '\\data\\\nngram 1=2\nngram 2=1\n\n\\1-grams:\n-1 <s> -0.5\n-1 a\n\n'
  '\\2-grams:\n-0.2 <s> a\n\n\\end\\\n'
)
MODELS = {
  'empty': '',
  'no end': ARPA.replace('\\end\\', ''),
  'no data': ARPA.replace('\\data\\', ''),
  'count': ARPA.replace('1=2', '1=3'),
  'count of 2^60': ARPA.replace('1=2', f'1={2**60}'),
  'count of 5,000 digits': (ARPA.replace('1=2', '1=' + '9' * 5_000), 'line 2'),
  'order word': (ARPA.replace('ngram 1', 'ngram x'), 'line 2'),
  'order 0': (ARPA.replace('\\2-grams', '\\0-grams'), 'line 9'),
  'order -1': (ARPA.replace('\\2-grams', '\\-1-grams'), 'line 9'),
  'order of a billion': ARPA.replace('ngram 2', 'ngram 1000000000'),
  'probability word': (ARPA.replace('-0.2', 'x'), 'line 10'),
  'probability nan': (ARPA.replace('-0.2', 'nan'), 'line 10'),
  'probability above 1': (ARPA.replace('-0.2', '5'), 'line 10'),
  'back-off inf': (ARPA.replace('-0.5', 'inf'), 'line 6'),
  'too many words': (ARPA.replace('-0.2', '-0.2 a b c'), 'line 10'),
  'latin-1': (ARPA.encode() + b'\\\xe9', 'line'),
  **case.IRREGULAR,
}


def _digits(folder):
  return vision.load_digits(folder, {'train': None})


def _named(name, options):
  return lambda folder: tabular_data.read(name, str(folder), **options)


def cases() -> list[case.Case]:
  """All cases of this module."""
  make = case.cases
  images, labels = _DIGITS
  gz = f'{images}.gz'
  return [
    *make('csv', 'table', _table(), CSV),
    *make(
      'csv packed',
      'table.gz',
      lambda folder: harness.read_table(folder / 'table.gz'),
      PACKED,
    ),
    *make('classes', 'table', _table(classes=True), CLASSES),
    *make('libsvm', 'table', _table(), LIBSVM),
    *make('adult', 'adult.csv', _named('adult', {}), NAMED),
    *make('adult', 'adult.csv', _named('adult', {}), case.IRREGULAR),
    *make(
      'magic',
      'magic04.data',
      lambda folder: two_classes.read('magic', str(folder)),
      MAGIC,
    ),
    *make(
      'own table',
      'mine.csv',
      _named('mine.csv', {'targets': ('b', 'c')}),
      {'four rows': 'a,b,c\n' + '1,2,3\n' * 4, 'columns': 'a,b\n1,2\n'},
    ),
    *make('idx', images, _digits, IDX, others=_DIGITS),
    *make('idx labels', labels, _digits, IDX_LABELS, others=_DIGITS),
    *make(
      'idx packed', gz, _digits, IDX_PACKED, others={labels: _DIGITS[labels]}
    ),
    *make(
      'arpa',
      'a.arpa',
      lambda folder: ngram.read_arpa(folder / 'a.arpa'),
      MODELS,
    ),
    *make(
      'arpa packed',
      'a.arpa.gz',
      lambda folder: ngram.read_arpa(folder / 'a.arpa.gz'),
      {'many lines': lambda: case.bomb(ARPA[:40].encode(), 40, b'-1 a b ')},
    ),
  ]
