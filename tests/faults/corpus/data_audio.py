"""Broken audio files: wav, FLAC, SPH, MP3 and Ogg."""

import functools
import io
import struct

import numpy as np

from experiments.speech import audio
from tests.faults.corpus import data_case as case

RATE = 8_000


@functools.cache
def encode(kind, subtype=None, seconds=0.25, zeros=False):
  """A valid file of noise, or of zeros."""
  import soundfile

  count = int(seconds * RATE)
  if zeros:
    samples = np.zeros(count, np.int16)
  else:
    samples = 0.1 * np.random.default_rng(0).normal(size=count)
  file = io.BytesIO()
  soundfile.write(file, samples, RATE, format=kind, subtype=subtype)
  return file.getvalue()


def wav(
  data=bytes(800),
  *,
  tag=1,
  channels=1,
  rate=RATE,
  bits=16,
  align=None,
  size=None,
  announced=None,
  more=b'',
):
  """A wav file whose header says anything."""
  align = channels * bits // 8 % 2**16 if align is None else align
  speed = rate * align % 2**32
  body = (
    b'WAVEfmt '
    + struct.pack('<IHHIIHH', 16, tag, channels, rate, speed, align, bits)
    + more
    + b'data'
    + struct.pack('<I', len(data) if size is None else size)
    + data
  )
  announced = len(body) if announced is None else announced
  return b'RIFF' + struct.pack('<I', announced) + body


def _floats(value):
  samples = np.zeros(200, '<f4')
  samples[7] = value
  return wav(samples.tobytes(), tag=3, bits=32)


def _changed(content, at, replacement):
  return content[:at] + replacement + content[at + len(replacement) :]


def _float_extensible(channels):
  guid = struct.pack('<HI', 3, channels) + bytes(16)
  body = struct.pack('<HHIIHHH', 0xFFFE, 2, RATE, 9, 8, 32, 22) + guid
  return b'RIFF' + struct.pack('<I', 99) + b'WAVEfmt ' + body + bytes(99)


WAV = {
  'empty': b'',
  'HTML': case.HTML,
  'picture': case.PNG,
  'start': b'RIFF',
  'header only': wav(b''),
  'no data': wav()[:36],
  'no format': b'RIFF' + struct.pack('<I', 12) + b'WAVEdata' + bytes(4),
  'no channel': wav(channels=0),
  '65,535 channels': wav(channels=65_535),
  '0 Hz': wav(rate=0),
  '10 Hz': wav(rate=10),
  '1e9 Hz': wav(rate=10**9),
  '4e9 Hz': wav(rate=2**32 - 1),
  'prime rate': wav(rate=999_983),
  '0 bits': wav(bits=0),
  '65,535 bits': wav(bits=65_535),
  'block of 0 bytes': wav(align=0, tag=2),
  'unknown coding': wav(tag=0x1234),
  'ADPCM without blocks': wav(tag=0x11, bits=4, align=0),
  'ADPCM of large blocks': wav(tag=0x11, bits=4, align=65_535),
  'GSM': wav(bytes(3), tag=0x31),
  'broken extension': _float_extensible(2**31),
  'announces 2^31 bytes': wav(size=2**31 - 1, announced=2**31 - 1),
  'announces 1 GB': wav(size=10**9, announced=10**9),
  'cut': lambda: case.cut(wav()),
  'nan': lambda: _floats(np.nan),
  'inf': lambda: _floats(-np.inf),
  'samples of 3e38': lambda: _floats(3e38),
  'format of 2^31 bytes': _changed(wav(), 16, struct.pack('<I', 2**31)),
  'a chunk of 4 GiB': wav(more=b'junk' + struct.pack('<I', 2**32 - 1)),
  'RF64 of 2^60 bytes': (
    b'RF64\xff\xff\xff\xffWAVEds64'
    + struct.pack('<IQQQI', 28, 2**60, 2**60, 2**59, 0)
    + wav()[12:]
  ),
  'W64': b'riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00' + bytes(40),
  **case.IRREGULAR,
}


def _flac(frames=None, rate=None, zeros=True, seconds=0.25):
  """A FLAC file whose first block announces anything."""
  content = encode('FLAC', None, seconds, zeros)
  start = int.from_bytes(content[18:26], 'big')
  if frames is not None:
    start = start >> 36 << 36 | frames
  if rate is not None:
    start = start & (1 << 44) - 1 | rate << 44
  return _changed(content, 18, start.to_bytes(8, 'big'))


FLAC = {
  'empty': b'',
  'start': b'fLaC',
  'announces 2^31 samples': lambda: _flac(2**31),
  'announces 2^36 samples': lambda: _flac(2**36 - 1),
  'announces 200 million samples': lambda: _flac(200_000_000),
  'announces 60 million samples': lambda: _flac(60_000_000),
  'announces fewer samples': lambda: _flac(0),
  '0 Hz': lambda: _flac(rate=0),
  '1 Hz': lambda: _flac(rate=1),
  'prime rate': lambda: _flac(rate=655_331),
  'metadata of 16 MiB': lambda: _changed(_flac(), 4, b'\x00\xff\xff\xff'),
  'cut': lambda: case.cut(_flac(zeros=False)),
  'flipped': lambda: case.flipped(_flac(zeros=False), -600),
  'silence of 150 minutes': lambda: _flac(seconds=9_000),
  **case.IRREGULAR,
}


def sphere(data=bytes(800), **fields):
  """An SPH file; a field of None is left out."""
  size = fields.pop('size', '1024')
  start = fields.pop('start', 'NIST_1A')
  values = {
    'channel_count': '-i 1',
    'sample_rate': f'-i {RATE}',
    'sample_n_bytes': '-i 2',
    'sample_byte_format': '-s2 01',
    'sample_coding': '-s3 pcm',
    'sample_count': f'-i {len(data) // 2}',
    **fields,
  }
  lines = [f'{k} {v}' for k, v in values.items() if v is not None]
  header = '\n'.join([start, f'   {size}', *lines, 'end_head', ''])
  return header.encode('latin-1').ljust(1024) + data


SPHERE = {
  'empty': b'',
  'start': b'NIST_1A\n',
  'header only': sphere(b''),
  'announces 2^31 samples': sphere(sample_count=f'-i {2**31}'),
  'announces 5,000 digits': sphere(sample_count='-i ' + '9' * 900),
  'negative count': sphere(sample_count='-i -400'),
  'no channel': sphere(channel_count='-i 0'),
  '10,000 channels': sphere(channel_count='-i 10000'),
  '0 Hz': sphere(sample_rate='-i 0'),
  'negative rate': sphere(sample_rate='-i -8000'),
  '1e9 Hz': sphere(sample_rate='-i 1000000000'),
  'samples of 0 bytes': sphere(sample_n_bytes='-i 0'),
  'samples of 9 bytes': sphere(sample_n_bytes='-i 9'),
  'order of bytes': sphere(sample_byte_format='-s2 77'),
  'shorten': sphere(sample_coding='-s26 pcm,embedded-shorten-v2.00'),
  'unknown coding': sphere(sample_coding='-s3 xyz'),
  'no rate': sphere(sample_rate=None),
  'header of 10^8 bytes': sphere(size='99999999'),
  'header of -1 bytes': sphere(size='-1'),
  'header of a word': sphere(size='many'),
  'latin-1': sphere(sample_rate='-i \xe9'),
  'NUL': sphere(sample_rate='-i \0'),
  'cut': lambda: case.cut(sphere(bytes(9_000))),
  **case.IRREGULAR,
}
_TAG = b'ID3\x03\x00\x00'
MP3 = {
  'empty': b'',
  'tag only': _TAG + bytes(4),
  'tag of 256 MiB': _TAG + b'\x7f\x7f\x7f\x7f' + bytes(99),
  'start of a frame': b'\xff\xfb\x90\x00',
  'noise': lambda: np.random.default_rng(0).bytes(9_000),
  'one frame': lambda: encode('MP3')[:200],
  **case.IRREGULAR,
}
OGG = {
  'empty': b'',
  'start': b'OggS',
  'first page': lambda: encode('OGG')[:58],
  'cut': lambda: case.cut(encode('OGG')),
  'flipped': lambda: case.flipped(encode('OGG'), 40),
  **case.IRREGULAR,
}


def cases() -> list[case.Case]:
  """All cases of this module."""

  def of(kind, contents):
    name = f'a.{kind}'
    read = lambda folder: audio.read(audio.probe(folder / name, rate=16_000))
    return case.cases(kind, name, read, contents, package='soundfile')

  return [
    *of('wav', WAV),
    *of('flac', FLAC),
    *of('sph', SPHERE),
    *of('mp3', MP3),
    *of('ogg', OGG),
  ]
