"""Reads audio files (wav, FLAC, SPH and others) as mono at one rate.

Reading is done by the package soundfile (libsndfile). It reads truncated wav
and SPH files without an error, so this module compares headers with file sizes.
It does not read SPH files compressed by shorten, the form that LDC ships.
"""

import io
import math
import os
import pathlib
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.signal

from experiments import harness
from experiments.harness.data import reading

# Seconds by which a part may exceed the end of its file: transcripts have
# rounded times.
TOLERANCE = 0.5
# Largest number of samples of a part, over all channels, and plausible sampling
# rates in hertz: damaged headers announce impossible values.
MAX_SAMPLES = 2**26
_RATES = (1_000, 1_000_000)
# Largest factor by which a rate is multiplied or divided to change it: the
# filter has 20 times as many numbers.
_MOST_RATIO = 100_000
# Largest absolute value of a sample: that of integers of 32 bits.
_LOUDEST = 2**31
# Frames that are read at once.
_BLOCK = 2**18
# Samples (two frames) by which MP3 may be shorter than announced.
_MP3_FRAMES = 2 * 1152
# Bytes of the header.
_HEADER = 1024
# Channels cancel each other out if the variance of their mean is below this
# fraction of that of independent channels.
_CANCELLED = 0.1


class AudioError(harness.DamagedDataError):
  """Audio that cannot be used.

  Attributes:
    reason: a short phrase by which such files are counted.
  """

  def __init__(self, message: str, reason: str):
    super().__init__(message)
    self.reason = reason


class Part(NamedTuple):
  """A range of an audio file whose samples are not read yet.

  Attributes:
    file: path, or the content as bytes.
    name: name of the file, for messages.
    first: first sample in the file, from 0.
    samples: number of samples in the file.
    from_rate: sampling rate of the file, hertz.
    rate: sampling rate after resampling, hertz.
  """

  file: Any
  name: str
  first: int
  samples: int
  from_rate: int
  rate: int

  @property
  def length(self) -> int:
    """Number of samples after resampling."""
    up, down = _ratio(self)
    return -(-self.samples * up // down)


def _ratio(part):
  common = math.gcd(part.rate, part.from_rate)
  return part.rate // common, part.from_rate // common


def span(part: Part, first: int, last: int) -> Part:
  """Selects a range of a part.

  Args:
    part: the part.
    first: first sample of the range, after resampling.
    last: last sample of the range, exclusive, after resampling.

  Returns:
    A part of at least `last - first` resampled samples, except at the end. It
    starts early by less than one sample of the file.
  """
  up, down = _ratio(part)
  start, stop = first * down // up, -(-last * down // up)
  count = min(stop, part.samples) - start
  return part._replace(first=part.first + start, samples=count)


def probe(
  file: Any,
  *,
  rate: int | None = None,
  start: float = 0.0,
  stop: float | None = None,
  name: str = '',
  max_samples: int | None = None,
) -> Part:
  """Reads the header of an audio file.

  Args:
    file: path, or the content as bytes.
    rate: sampling rate to resample to, hertz; None keeps that of the file.
    start: start of the part, seconds.
    stop: end of the part, seconds; None is the end of the file.
    name: name of a file that is given as bytes.
    max_samples: largest number of samples of the part over all channels,
      `MAX_SAMPLES` by default.

  Returns:
    A `Part`.

  Raises:
    AudioError: if the file is missing, damaged, truncated, compressed or of
      another format, or the part is empty or beyond the end.
  """
  if not isinstance(file, bytes):
    file = pathlib.Path(file)
    name = str(file)
    if os.path.isdir(file):
      raise AudioError(
        f'{name} is a folder: name the files in it.', 'no such file'
      )
    try:
      reading.check_regular(file)
    except harness.MissingDataError:
      raise AudioError(
        f'{name} does not exist: correct its name or the list that names it.',
        'no such file',
      ) from None
    except harness.DamagedDataError as error:
      raise AudioError(str(error), 'no such file') from error
  soundfile = harness.load_extra('soundfile', 'asr', 'reading audio')
  _check_header(file, name)
  with _decoding(soundfile, name):
    info = soundfile.info(_stream(file))
  to = info.samplerate if rate is None else rate
  first = round(start * info.samplerate)
  last = info.frames if stop is None else round(stop * info.samplerate)
  if last > info.frames + TOLERANCE * info.samplerate:
    raise AudioError(
      f'{name} lasts {info.frames / info.samplerate:.2f} seconds, but a part '
      f'of it ends at {stop}: correct its times, or get it again.',
      'beyond the end of its audio',
    )
  count = min(last, info.frames) - first
  if count < 1 or first < 0:
    raise AudioError(
      f'{name} has no audio from second {start} to '
      f'{"its end" if stop is None else stop}: remove it from the list, or '
      'correct its times.',
      'empty audio',
    )
  part = Part(file, name, first, count, info.samplerate, to)
  limit = MAX_SAMPLES if max_samples is None else max_samples
  if (
    not _RATES[0] <= info.samplerate <= _RATES[1]
    or max(_ratio(part)) > _MOST_RATIO
    or max(count * info.channels, part.length) > limit
  ):
    raise AudioError(
      f'{name} announces {count:,} samples of {info.channels} channels at '
      f'{info.samplerate:,} Hz: split it if that is right; otherwise get it '
      'again.',
      'damaged audio',
    )
  return part


def _warn(message: str) -> None:
  warnings.warn(message, RuntimeWarning, stacklevel=4)


def read(part: Part, notice: Callable[[str], None] = _warn) -> np.ndarray:
  """Reads the mean of the channels of a part, resampled.

  Args:
    part: a part from `probe`.
    notice: called with one line if channels cancel each other out, such as a
      stereo signal of opposite phases; then one loud channel is read.

  Returns:
    float32 (part.length,), full scale is 1.

  Raises:
    AudioError: if the file is damaged or truncated, or a sample is not finite.
  """
  soundfile = harness.load_extra('soundfile', 'asr', 'reading audio')
  with _decoding(soundfile, part.name):
    samples = _read_blocks(soundfile, part)
    if len(samples) < part.samples:
      # MP3 files without a count in the header have an estimated length.
      missing = part.samples - len(samples)
      file_format = soundfile.info(_stream(part.file)).format
      is_mp3 = file_format in ('MP3', 'MPEG')
      if is_mp3 and len(samples) and missing <= _MP3_FRAMES:
        samples = np.pad(samples, ((0, missing), (0, 0)))
  if len(samples) != part.samples:
    raise _truncated(
      part.name, f'{part.samples:,} samples', f'{len(samples):,}'
    )
  is_sound = np.abs(samples) <= _LOUDEST
  if not is_sound.all():
    place = int(np.argmin(is_sound.all(axis=1)))
    loud = np.isfinite(samples[place]).all()
    raise AudioError(
      f'{part.name}, sample {part.first + place + 1}, is '
      f'{f"above {_LOUDEST:,}" if loud else "not finite"}: make the file again '
      'from its original.',
      'non-finite samples',
    )
  mono = _mono(samples, part.name, notice)
  up, down = _ratio(part)
  if up == down:
    return mono
  return scipy.signal.resample_poly(mono, up, down).astype(np.float32)


def _read_blocks(soundfile, part):
  """Reads blocks, so that memory grows by content and not by the header."""
  blocks, left = [], part.samples
  with soundfile.SoundFile(_stream(part.file)) as file:
    file.seek(part.first)
    while left:
      block = file.read(min(left, _BLOCK), dtype='float32', always_2d=True)
      blocks.append(block)
      left -= len(block)
      if not len(block):
        break
  return np.concatenate(blocks)


def _mono(samples, name, notice):
  mono = samples.mean(axis=1, dtype=np.float32)
  channels = samples.shape[1]
  if channels == 1:
    return mono
  variances = samples.var(axis=0, dtype=np.float64)
  independent = variances.mean() / channels
  if mono.var(dtype=np.float64) >= _CANCELLED * independent:
    return mono
  # The first loud channel: which of several equally loud ones is loudest
  # depends on rounding.
  channel = int(np.argmax(variances > variances.max() / 2))
  notice(
    f'{name}: the {channels} channels cancel each other out: channel '
    f'{channel + 1} is used instead of their mean.'
  )
  return samples[:, channel].copy()


class _decoding:
  """Turns errors of soundfile into an `AudioError`."""

  def __init__(self, soundfile, name):
    self._raised, self._name = (soundfile.SoundFileError, OSError), name

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if isinstance(error, self._raised):
      detail = ' '.join(str(getattr(error, 'error_string', error)).split())
      raise AudioError(
        f'{self._name} is damaged, truncated or not supported by libsndfile '
        f'({detail.rstrip(".")}): get it again, or convert it to FLAC.',
        'damaged audio',
      ) from error


def _stream(file):
  # Encoded, since the name of a file need not be UTF-8.
  return io.BytesIO(file) if isinstance(file, bytes) else os.fsencode(file)


def _check_header(file, name):
  """Checks that a file is as long as its SPH or RIFF header announces."""
  if isinstance(file, bytes):
    head, size = file[:_HEADER], len(file)
  else:
    try:
      with open(file, 'rb') as opened:
        head = opened.read(_HEADER)
      size = file.stat().st_size
    except OSError as error:
      raise AudioError(
        f'{name} cannot be read: {error.strerror}.', 'damaged audio'
      ) from error
  if not size:
    raise AudioError(f'{name} is an empty file: get it again.', 'empty audio')
  if head.startswith(b'NIST_1A'):
    _check_sphere(head, size, name)
  elif head.startswith(b'RF64') and head[12:16] == b'ds64':
    announced = int.from_bytes(head[20:28], 'little')
    if size < announced:
      raise _truncated(name, f'{announced:,} bytes', f'{size:,}')
  elif head.startswith(b'RIFF') and len(head) >= 8:
    announced = int.from_bytes(head[4:8], 'little')
    # Programs that write into a pipe leave an invalid size.
    if 0 < announced < 2**31 and size < announced:
      raise _truncated(name, f'{announced:,} bytes', f'{size:,}')


def _check_sphere(head, size, name):
  fields = dict(
    re.findall(r'^(\w+) -\w+ (.*)$', head.decode('latin-1'), re.MULTILINE)
  )
  coding = fields.get('sample_coding', 'pcm')
  if 'embedded' in coding or 'shorten' in coding:
    raise AudioError(
      f'{name} is SPH compressed as {coding.strip()}: decompress it, for '
      'instance with `sph2pipe -p in.sph out.sph`.',
      'compressed SPH',
    )
  sizes = ('sample_count', 'sample_n_bytes', 'channel_count')
  try:
    begin, *factors = map(int, (head.split(b'\n')[1], *map(fields.get, sizes)))
  except TypeError:
    return  # A size is missing: libsndfile reports the error.
  except (ValueError, IndexError):
    begin, factors = 0, [0]
  if min(begin, *factors) < 1:
    raise AudioError(
      f'{name}: a size in its header is no number above 0: get it again, or '
      'convert it to FLAC.',
      'damaged audio',
    )
  announced = begin + math.prod(factors)
  if size < announced:
    raise _truncated(name, f'{announced:,} bytes', f'{size:,}')


def _truncated(name, announced, actual):
  return AudioError(
    f'{name} is truncated: its header announces '
    f'{reading.shorten(announced)}, but it has '
    f'{actual}: get it again, or convert it to FLAC.',
    'cut short',
  )
