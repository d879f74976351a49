"""Broken corpora of speech: archives, lists, transcripts, and their folders."""

import functools
import gzip
import io
import struct
import tarfile

import numpy as np

from experiments.speech import an4, folder, fsdd, librispeech, tedlium
from tests.faults.corpus import data_audio
from tests.faults.corpus import data_case as case

WAV = data_audio.wav()


def mfc(frames=20, announced=None):
  """Features of AN4."""
  values = np.ones(13 * frames, '>f4')
  count = len(values) if announced is None else announced
  return struct.pack('>i', count) + values.tobytes()


def _an4():
  """Three speakers for training, one for the test."""
  contents = {}
  for part, people in (('train', 'abc'), ('test', 'z')):
    names = [f'an4{part}/{p}/an0-{p}-b' for p in people]
    contents |= {f'an4/feat/{name}.mfc': mfc() for name in names}
    lines = [f'YES ({name.rpartition("/")[2]})\n' for name in names]
    contents[f'an4/etc/an4_{part}.fileids'] = '\n'.join(names)
    contents[f'an4/etc/an4_{part}.transcription'] = ''.join(lines)
  return contents


AN4 = _an4()
TEXTS, LIST = 'an4/etc/an4_train.transcription', 'an4/etc/an4_train.fileids'
FEATURES = 'an4/feat/an4train/a/an0-a-b.mfc'
_LINES = AN4[TEXTS]
TRANSCRIPTS = {
  'no name': (_LINES + 'NO NAME\n', 'line 4'),
  'latin-1': (_LINES.encode() + b'\xe9 (an0-d-b)\n', 'line 4'),
  'UTF-16': (_LINES.encode('utf-16'), 'line 1'),
  'name twice': (_LINES + 'NO (an0-a-b)\n', 'line 4'),
  'line of 17 MB': (lambda: 'a' * (17 * 2**20), 'line 1'),
  'line of spaces': (lambda: 'a' + ' ' * 2**20 + 'b', 'line 1'),
  **case.IRREGULAR,
  'link out of the folder': case.OUTSIDE,
}
LISTS = {
  'empty': '',
  'latin-1': (b'\xe9\n', 'line 1'),
  'names of other files': '../../../etc/passwd\n',
  **case.IRREGULAR,
  'link out of the folder': case.OUTSIDE,
}
FRAMES = {
  'named pipe': case.PIPE,
  'link to a device': case.ZERO,
  'link out of the folder': case.OUTSIDE,
}
CONTENTS = {
  'empty': b'',
  'three bytes': b'abc',
  'announces 2^31 numbers': mfc(announced=2**31 - 1),
  'announces -1 numbers': mfc(announced=-1),
  'no multiple of 13': mfc()[:-4].replace(mfc()[:4], struct.pack('>i', 259)),
  'no frame': mfc(0),
  'nan': mfc().replace(b'\x3f\x80\x00\x00', b'\x7f\xc0\x00\x00'),
  'HTML': case.HTML,
  **case.IRREGULAR,
}


def tar(*members, packing='gz'):
  """An archive of pairs of a name and a content, or of a header."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode=f'w:{packing}') as archive:
    for name, content in members:
      info = tarfile.TarInfo(name)
      if isinstance(content, str):
        content = content.encode()
      if isinstance(content, bytes):
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
      else:
        for key, value in content.items():
          setattr(info, key, value)
        archive.addfile(info)
  return file.getvalue()


def _raw(name, size, kind=b'0', content=b''):
  """A header of its own, and a content."""
  info = tarfile.TarInfo(name)
  info.size, info.type = size, kind
  return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def _sparse(size):
  """A file of holes alone, in the old format of GNU tar."""
  header = bytearray(_raw(FEATURES, 0, b'S'))
  octal = lambda n: f'{n:011o}\0'.encode()
  header[386:398], header[398:410] = octal(size), octal(0)
  header[483:495] = octal(size)
  header[148:156] = b' ' * 8
  header[148:156] = f'{sum(header):06o}\0 '.encode()
  return gzip.compress(bytes(header) + bytes(1024))


@functools.cache
def _archive():
  return tar(*AN4.items())


def _members(**changed):
  return lambda: tar(*AN4.items(), *changed.items())


ARCHIVES = {
  'empty': b'',
  'HTML': case.HTML,
  'no gzip': lambda: tar(*AN4.items(), packing=''),
  'zip': case.ZIP,
  'gzip of a text': case.packed(b'text'),
  'gzip of nothing': case.packed(b''),
  'cut': lambda: case.cut(_archive()),
  'flipped': lambda: case.flipped(_archive(), 90),
  'wrong checksum': lambda: case.flipped(_archive(), -6),
  'no member': lambda: tar(),
  'another folder': lambda: tar(('other/a', b'a')),
  'no transcript': (lambda: tar((FEATURES, mfc())), 'etc/an4_train'),
  'announces 2^40 bytes': lambda: case.packed(_raw(FEATURES, 2**40)),
  'announces 900 MB': lambda: case.packed(_raw(FEATURES, 900 * 10**6)),
  'another file of 2^40 bytes': lambda: case.packed(_raw('x', 2**40)),
  'negative size': lambda: case.packed(_raw(FEATURES, -600)),
  'holes of 900 MB': lambda: _sparse(900 * 10**6),
  'holes of 8 GiB': lambda: _sparse(2**33 - 1),
  'zeros in a file': lambda: case.bomb(_raw(FEATURES, 400 * 2**20), 400),
  'zeros in another file': lambda: case.bomb(_raw('x', 400 * 2**20), 400),
  'long name': lambda: case.bomb(_raw('x', 400 * 2**20, b'L'), 400),
  'attributes': lambda: case.bomb(_raw('x', 400 * 2**20, b'x'), 400, b'9'),
  'many members': lambda: case.bomb(b'', 40, _raw('a', 0) * 2),
  'links': lambda: tar(
    *((name, {'type': b'2', 'linkname': '/etc/passwd'}) for name in AN4)
  ),
  'devices': lambda: tar(*((name, {'type': b'3'}) for name in AN4)),
  'pipes': lambda: tar(*((name, {'type': b'6'}) for name in AN4)),
  **case.IRREGULAR,
}


def _recordings():
  names = [
    f'{d}_{s}_{i}.wav' for d in range(2) for s in 'ab' for i in (0, 7, 11)
  ]
  return {f'recordings/{name}': WAV for name in names}


DIGITS = {
  'no recording': lambda: tar(('recordings/readme', b'')),
  'no recording for the test': lambda: tar(('recordings/1_a_11.wav', WAV)),
  'indices of 5,000 digits': lambda: tar(
    *((f'recordings/{n}_a_{"9" * 5_000}.wav', WAV) for n in range(3))
  ),
  'broken recordings': lambda: tar(*((n, b'RIFF') for n in _recordings())),
}
LIBRI = {
  f'LibriSpeech/{part}/1/2/{name}': content
  for part in ('train-clean-100', 'dev-clean', 'test-clean')
  for name, content in (('1-2-0.flac', WAV), ('1-2.trans.txt', '1-2-0 YES\n'))
}
_BOOK = 'LibriSpeech/dev-clean/1/2/1-2.trans.txt'
BOOKS = {
  'empty': ('', case.FOLDER),
  'no name': ('YES\n', 'line 1'),
  'name twice': ('1-2-0 YES\n1-2-0 NO\n', 'line 2'),
  'path out of the folder': ('1-2-0 YES\n../../1-2-3 NO\n', 'line 2'),
  'absolute path': ('1-2-0 YES\n/etc/1-2-3 NO\n', 'line 2'),
  'NUL': ('1-2-0 YES\n1-2-\0 NO\n', 'line 2'),
  'name of 5,000 letters': (f'1-2-0 YES\n1-2-{"0" * 5_000} NO\n', 'line 2'),
  'latin-1': (b'1-2-0 \xe9\n', 'line 1'),
  'UTF-16': ('1-2-0 YES\n'.encode('utf-16'), 'line 1'),
  'line of 17 MB': (lambda: '1-2-0 ' + 'a' * (17 * 2**20), 'line 1'),
  **case.IRREGULAR,
  'folder': (None, case.FOLDER),
  'link out of the folder': case.OUTSIDE,
}
_TALK = 'TEDLIUM_release2/dev/stm/t.stm'
TALKS = {
  f'TEDLIUM_release2/{part}/{name}': content
  for part in ('train', 'dev', 'test')
  for name, content in (
    ('sph/t.sph', data_audio.sphere(bytes(16_000))),
    ('stm/t.stm', 't 1 s 0.0 0.5 <o,f0> yes\n'),
  )
}


def _segment(words):
  return f't 1 s 0.0 0.5 <o,f0> yes\n{words}\n', 'line 2'


SEGMENTS = {
  'empty': ('', case.FOLDER),
  'four words': _segment('t 1 s 0.0'),
  'start word': _segment('t 1 s now 0.5 yes'),
  'start nan': _segment('t 1 s nan 0.5 yes'),
  'start -1': _segment('t 1 s -1 0.5 yes'),
  'start 1_0': _segment('t 1 s 1_0 11 yes'),
  'stop inf': _segment('t 1 s 0 inf yes'),
  'stop 1e308': _segment('t 1 s 0 1e308 yes'),
  'stop 1e17': _segment('t 1 s 0 1e17 yes'),
  'stop before start': _segment('t 1 s 1 0.5 yes'),
  'path out of the folder': _segment('../../../t 1 s 0 0.5 yes'),
  'absolute path': _segment('/etc/t 1 s 0 0.5 yes'),
  'NUL': _segment('t\0 1 s 0 0.5 yes'),
  'talk of 5,000 letters': _segment('t' * 5_000 + ' 1 s 0 0.5 yes'),
  'latin-1': (b't 1 s 0.0 0.5 \xe9\n', 'line 1'),
  'UTF-16': ('t 1 s 0 0.5 yes\n'.encode('utf-16'), 'line 1'),
  **case.IRREGULAR,
  'link out of the folder': case.OUTSIDE,
}
_NAMES = [f'me/{i}.wav' for i in range(4)]
_OWN = ''.join(f'{name}\tWord\n' for name in _NAMES)
OWN = {name: WAV for name in _NAMES} | {folder.TABLE: _OWN}


def _line(text):
  return f'{_OWN}{text}\n', 'line 5'


OWN_TEXTS = {
  'text of a million words': ('me/0.wav\t' + 'a ' * 10**6, 'line 1'),
  'empty': ('', case.FOLDER),
  'no tab': _line('me/5.wav Word'),
  'no path': _line('\tWord'),
  'name twice': _line('me/0.wav\tWord'),
  'name twice, spelled otherwise': _line('./me//0.wav\tWord'),
  'path out of the folder': _line('../a.wav\tWord'),
  'path out of and in again': _line('../../../../etc/passwd\tWord'),
  'absolute path': _line('/etc/passwd\tWord'),
  'NUL': _line('me/\0.wav\tWord'),
  'name of 5,000 letters': _line('a' * 5_000 + '\tWord'),
  'latin-1': (_OWN.encode() + b'\xe9\tWord\n', 'line 5'),
  'UTF-16': (_OWN.encode('utf-16'), 'line 1'),
  'audio': (WAV + b'\xff\n', 'line 1'),
  'line of 17 MB': (lambda: 'a' * (17 * 2**20), 'line 1'),
  'all files are missing': ('a.wav\tWord\nb.wav\tWord\n', case.FOLDER),
  **case.IRREGULAR,
}
OWN_AUDIO = {
  'link out of the folder': case.OUTSIDE,
  'loop of links': case.Linked('0.wav'),
}


def cases() -> list[case.Case]:
  """All cases of this module."""

  def an4_of(folder):
    return an4.read(folder, validation_speakers=1)

  def fsdd_of(folder):
    corpus = fsdd.read(folder, train=4, validation=2, test=2)
    return [u.load() for u in corpus.train]

  def frames(path):
    return an4.read_features(path / 'a.mfc')

  make = functools.partial(case.cases, package='soundfile')
  listed = functools.partial(make, read=an4_of, others=AN4)
  own = functools.partial(make, read=folder.read, others=OWN)
  return [
    *listed('an4 texts', TEXTS, contents=TRANSCRIPTS),
    *listed('an4 list', LIST, contents=LISTS),
    *listed('an4 folder', FEATURES, contents=FRAMES),
    *make('an4 features', 'a.mfc', frames, CONTENTS),
    *make('an4 archive', 'an4_mfcc.tar.gz', an4_of, ARCHIVES),
    *make('digits', 'fsdd.tar.gz', fsdd_of, DIGITS),
    *make('librispeech', _BOOK, librispeech.read, BOOKS, others=LIBRI),
    *make('tedlium', _TALK, tedlium.read, SEGMENTS, others=TALKS),
    *own('own folder', folder.TABLE, contents=OWN_TEXTS),
    *own('own audio', _NAMES[0], contents=OWN_AUDIO),
  ]
