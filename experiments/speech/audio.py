"""Audio from files, mono and at one rate: wav, FLAC, SPH and whatever else.

The package soundfile reads what its library libsndfile knows. It takes what is
left of a wav or SPH file that is cut short without a word, so their headers are
compared with their sizes here. SPH files compressed by shorten, as LDC ships
them, it does not read.
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

# Seconds by which a part may reach over the end of its file: the time marks of
# transcripts are rounded.
TOLERANCE = 0.5
# Samples of a part, over all channels, at most: damaged headers announce more
# than there is memory, and rates that nothing has.
MOST = 2**28
_RATES = (1_000, 1_000_000)
# Samples, of two frames, by which MP3 may be shorter than it announces.
_MP3_FRAMES = 2 * 1152
# Bytes of a header that are looked at.
_HEADER = 1024
# Channels cancel each other out if their mean has less than this share of the
# variance that the mean of independent ones would have.
_CANCELLED = 0.1


class AudioError(harness.DamagedDataError):
  """Audio that cannot be used.

  Attributes:
    reason: in some words, to count by.
  """

  def __init__(self, message: str, reason: str):
    super().__init__(message)
    self.reason = reason


class Part(NamedTuple):
  """Audio that is known by its header and not read yet.

  Attributes:
    file: path, or the content as bytes.
    name: of the file, for messages.
    first: sample of the file, from 0.
    samples: how many of the file.
    from_rate: its samples a second.
    rate: those it is resampled to.
  """

  file: Any
  name: str
  first: int
  samples: int
  from_rate: int
  rate: int

  @property
  def length(self) -> int:
    """Samples after resampling."""
    up, down = _ratio(self)
    return -(-self.samples * up // down)


def _ratio(part):
  common = math.gcd(part.rate, part.from_rate)
  return part.rate // common, part.from_rate // common


def span(part: Part, first: int, last: int) -> Part:
  """Selects a range of a part.

  Args:
    part: the whole.
    first: resampled sample at which the range starts.
    last: resampled sample before which it stops.

  Returns:
    A part of at least `last - first` resampled samples, except at the end. It
    starts less than a sample of the file early.
  """
  up, down = _ratio(part)
  start, stop = first * down // up, -(-last * down // up)
  count = min(stop, part.samples) - start
  return part._replace(first=part.first + start, samples=count)


def part_of(
  file: Any,
  *,
  rate: int | None = None,
  start: float = 0.0,
  stop: float | None = None,
  name: str = '',
  max_samples: int | None = None,
) -> Part:
  """Finds out from its header what a file of audio has.

  Args:
    file: path, or the content as bytes.
    rate: samples a second that it is to have; None leaves those it has.
    start: of a part, in seconds.
    stop: likewise; None is the end of the file.
    name: of the file where it is given as bytes.
    max_samples: of the part over all channels, `MOST` by default.

  Returns:
    A `Part`.

  Raises:
    AudioError: if there is no such file, it is damaged, compressed, cut short
      or of another format, or the part is empty or behind its end.
  """
  if not isinstance(file, bytes):
    file = pathlib.Path(file)
    name = str(file)
    if file.is_dir():
      raise AudioError(
        f'{name} is a folder: give the files in it.', 'no such file'
      )
    if not file.is_file():
      raise AudioError(
        f'{name} does not exist: correct its name or the list that has it.',
        'no such file',
      )
  soundfile = harness.load_extra('soundfile', 'asr', 'reading audio')
  _check_header(file, name)
  with _reading(soundfile, name):
    info = soundfile.info(_stream(file))
  to = info.samplerate if rate is None else rate
  first = round(start * info.samplerate)
  last = info.frames if stop is None else round(stop * info.samplerate)
  if last > info.frames + TOLERANCE * info.samplerate:
    raise AudioError(
      f'{name} ends after {info.frames / info.samplerate:.2f} seconds, before '
      f'the part that ends at {stop}: correct its times, or get it again.',
      'behind the end of its audio',
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
  limit = MOST if max_samples is None else max_samples
  if (
    max(count * info.channels, part.length) > limit
    or not _RATES[0] <= info.samplerate <= _RATES[1]
  ):
    raise AudioError(
      f'{name} announces {count:,} samples of {info.channels} channels at '
      f'{info.samplerate:,} Hz: if that is so, split it; else get it again.',
      'damaged audio',
    )
  return part


def _warn(message: str) -> None:
  warnings.warn(message, RuntimeWarning, stacklevel=4)


def read(part: Part, notice: Callable[[str], None] = _warn) -> np.ndarray:
  """Reads audio: the mean of its channels, resampled.

  Args:
    part: of `part_of`.
    notice: gets one line if channels cancel each other out, such as a stereo
      signal of opposite phases; then one loud channel is read.

  Returns:
    float32 (part.length,), full scale is 1.

  Raises:
    AudioError: if the file is damaged, cut short, or has a sample that is not
      finite.
  """
  soundfile = harness.load_extra('soundfile', 'asr', 'reading audio')
  with _reading(soundfile, part.name):
    samples, _ = soundfile.read(
      _stream(part.file),
      frames=part.samples,
      start=part.first,
      dtype='float32',
      always_2d=True,
    )
    if len(samples) < part.samples:
      # Without a count in its header, the length of MP3 is estimated.
      lacks = part.samples - len(samples)
      form = soundfile.info(_stream(part.file)).format
      if form in ('MP3', 'MPEG') and len(samples) and lacks <= _MP3_FRAMES:
        samples = np.pad(samples, ((0, lacks), (0, 0)))
  if len(samples) != part.samples:
    raise _cut_short(
      part.name, f'{part.samples:,} samples', f'{len(samples):,}'
    )
  if not np.isfinite(samples).all():
    place = part.first + int(np.argmin(np.isfinite(samples).all(axis=1)))
    raise AudioError(
      f'{part.name}, sample {place + 1}, is not finite: write it again from '
      'what it was made of.',
      'samples that are not finite',
    )
  mono = _mono(samples, part.name, notice)
  up, down = _ratio(part)
  if up == down:
    return mono
  return scipy.signal.resample_poly(mono, up, down).astype(np.float32)


def _mono(samples, name, notice):
  mono = samples.mean(axis=1, dtype=np.float32)
  channels = samples.shape[1]
  if channels == 1:
    return mono
  variances = samples.var(axis=0, dtype=np.float64)
  independent = variances.mean() / channels
  if mono.var(dtype=np.float64) >= _CANCELLED * independent:
    return mono
  # The first of the loud ones: which of equals is loudest is rounding.
  channel = int(np.argmax(variances > variances.max() / 2))
  notice(
    f'{name}: its {channels} channels cancel each other out: channel '
    f'{channel + 1} is used in place of their mean.'
  )
  return samples[:, channel].copy()


class _reading:
  """Turns what soundfile raises into an `AudioError`."""

  def __init__(self, soundfile, name):
    self._raised, self._name = (soundfile.SoundFileError, OSError), name

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if isinstance(error, self._raised):
      said = ' '.join(str(getattr(error, 'error_string', error)).split())
      raise AudioError(
        f'{self._name} is damaged, cut short or no audio that libsndfile reads '
        f'({said.rstrip(".")}): get it again, or convert it to FLAC.',
        'damaged audio',
      ) from error


def _stream(file):
  return io.BytesIO(file) if isinstance(file, bytes) else os.fspath(file)


def _check_header(file, name):
  """Whether a file is as long as a header of SPH or RIFF announces."""
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
  elif head.startswith(b'RIFF') and len(head) >= 8:
    announced = int.from_bytes(head[4:8], 'little')
    # Programs that write into a pipe leave a size that says nothing.
    if 0 < announced < 2**31 and size < announced:
      raise _cut_short(name, f'{announced:,} bytes', f'{size:,}')


def _check_sphere(head, size, name):
  fields = dict(
    re.findall(r'^(\w+) -\w+ (.*)$', head.decode('latin-1'), re.MULTILINE)
  )
  coding = fields.get('sample_coding', 'pcm')
  if 'embedded' in coding or 'shorten' in coding:
    raise AudioError(
      f'{name} is SPH compressed as {coding.strip()}: decompress it, with '
      '`sph2pipe -p in.sph out.sph` for instance.',
      'compressed SPH',
    )
  try:
    begin = int(head.split(b'\n')[1])
    announced = begin + math.prod(
      int(fields[name])
      for name in ('sample_count', 'sample_n_bytes', 'channel_count')
    )
  except (KeyError, ValueError, IndexError):
    return  # What is wrong with it, libsndfile says.
  if size < announced:
    raise _cut_short(name, f'{announced:,} bytes', f'{size:,}')


def _cut_short(name, announced, has):
  return AudioError(
    f'{name} is cut short: it announces {announced} and has {has}; get it '
    'again, or convert it to FLAC.',
    'cut short',
  )
