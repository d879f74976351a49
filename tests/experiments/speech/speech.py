"""Synthesised or artificial speech in files.

A synthesiser says the texts if one is installed (on Debian, apt-get install
espeak-ng or flite); else each text is some tones.
"""

import functools
import os
import shutil
import subprocess
import tempfile
import wave

import numpy as np
import pytest

RATE = 16_000


def data_folder():
  """The folder of data sets, or the test is skipped."""
  folder = os.environ.get('BILEVEL_JAX_DATA')
  if not folder or not os.path.isdir(f'{folder}/speech'):
    pytest.skip(
      'BILEVEL_JAX_DATA names no folder with speech/an4_mfcc.tar.gz and '
      'speech/fsdd.tar.gz.'
    )
  return folder


@functools.cache
def say(text):
  """Samples float32 of a text, and their rate."""
  with tempfile.TemporaryDirectory() as folder:
    path = f'{folder}/said.wav'
    if shutil.which('flite'):
      command = ['flite', '-t', text, '-o', path]
    elif shutil.which('espeak-ng'):
      command = ['espeak-ng', '-w', path, text]
    else:
      return tones(text), RATE
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    with wave.open(path) as file:
      content = file.readframes(file.getnframes())
      rate = file.getframerate()
  return np.frombuffer(content, '<i2').astype(np.float32) / 2**15, rate


def tones(text):
  """A tone of 50 ms a character."""
  time = np.arange(RATE // 20) / RATE
  pitches = [200 + 20 * (ord(c) % 50) for c in text]
  parts = [0.3 * np.sin(2 * np.pi * pitch * time) for pitch in pitches]
  return np.concatenate(parts).astype(np.float32)


def write(path, samples, rate=RATE, **how):
  """Writes audio, in the format that the name says."""
  import soundfile

  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == '.sph':
    how['format'] = 'NIST'
  soundfile.write(path, samples, rate, **how)
  return path


def compressed_sphere(path):
  """An SPH file whose header says that shorten has made it smaller."""
  header = (
    'NIST_1A\n   1024\nchannel_count -i 1\nsample_rate -i 16000\n'
    'sample_n_bytes -i 2\nsample_byte_format -s2 01\nsample_count -i 8000\n'
    'sample_coding -s26 pcm,embedded-shorten-v2.00\nend_head\n'
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(header.ljust(1024).encode() + b'ajkg\x02' + bytes(900))
  return path


def put(path, text):
  """Writes a text or bytes to a file, and makes its folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(text, bytes):
    path.write_bytes(text)
  else:
    path.write_text(text)
  return path


def check_loads(items):
  """Checks the lengths of loaded utterances."""
  for u in items:
    content, rate = u.load()
    assert content.dtype == np.float32 and len(content) == u.length
    assert u.seconds == pytest.approx(u.length / (rate or 100))
