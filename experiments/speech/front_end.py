"""Computes normalised log-mel features from samples, on the device.

Arrays have leading axes (batch, time). Padding is zero in the features and does
not affect the frames within the lengths.
"""

import dataclasses
import math
from typing import Annotated, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness

# Added to energies; below it, there is only quantisation noise.
_FLOOR = 1e-7


class FrontEnd(NamedTuple):
  """Settings of the features.

  Attributes:
    rate: sampling rate, hertz; None if the inputs are features, which are only
      normalised.
    numbers: mel bands, or numbers per frame of the input features.
    window: length of the window, seconds.
    hop: seconds between frames.
    lowest: lowest frequency of the bands, hertz.
  """

  rate: int | None
  numbers: int
  window: float = 0.025
  hop: float = 0.01
  lowest: float = 20.0

  @property
  def samples(self) -> tuple[int, int]:
    """Number of samples of a window and of a hop."""
    return round(self.window * self.rate), round(self.hop * self.rate)


def count_frames(front: FrontEnd, length: chex.Numeric) -> chex.Numeric:
  """Number of complete frames in `length` samples or feature frames."""
  if front.rate is None:
    return length
  window, hop = front.samples
  left = length - window + hop
  # Works for an int, an array and a tracer.
  return left * (left > 0) // hop


def filters(front: FrontEnd) -> np.ndarray:
  r"""Computes triangular filters, equally spaced on the mel scale.

  .. math:: m(f) = 2595 \log_{10}(1 + f / 700)

  Args:
    front: settings with a sampling rate.

  Returns:
    Weights of the spectral bins, (bins, bands), with a peak of 1.
  """
  size = _fft_size(front)
  top = 2595 * math.log10(1 + front.rate / 2 / 700)
  low = 2595 * math.log10(1 + front.lowest / 700)
  edges = 700 * (10 ** (np.linspace(low, top, front.numbers + 2) / 2595) - 1)
  bins = np.fft.rfftfreq(size, 1 / front.rate)[:, None]
  left, middle, right = edges[:-2], edges[1:-1], edges[2:]
  rising = (bins - left) / (middle - left)
  falling = (right - bins) / (right - middle)
  return np.maximum(np.minimum(rising, falling), 0).astype(np.float32)


def _fft_size(front: FrontEnd) -> int:
  """Size of the Fourier transform; each band has at least one bin."""
  size = 2 ** math.ceil(math.log2(front.samples[0]))
  low = front.lowest
  narrowest = (
    700
    * (
      (1 + low / 700)
      * ((1 + front.rate / 1400) / (1 + low / 700)) ** (1 / (front.numbers + 1))
      - 1
    )
    - low
  )
  while front.rate / size > narrowest:
    size *= 2
  return size


def log_mel(audio: chex.Array, front: FrontEnd) -> chex.Array:
  """Computes log energies in mel bands.

  Args:
    audio: samples, (..., samples), full scale is 1.
    front: settings with a sampling rate.

  Returns:
    (..., frames, bands).
  """
  window, hop = front.samples
  count = int(count_frames(front, audio.shape[-1]))
  places = np.arange(count)[:, None] * hop + np.arange(window)
  framed = audio[..., places] * np.hanning(window).astype(np.float32)
  energy = jnp.abs(jnp.fft.rfft(framed, _fft_size(front), axis=-1)) ** 2
  return jnp.log(energy @ filters(front) + _FLOOR)


def length_mask(lengths: chex.Array, size: int) -> chex.Array:
  """Mask of the frames within the lengths, bool (batch, size)."""
  return jnp.arange(size) < lengths[:, None]


def normalise(features: chex.Array, lengths: chex.Array) -> chex.Array:
  """Scales features to mean 0 and deviation 1 over each utterance.

  Args:
    features: (batch, frames, numbers).
    lengths: number of valid frames, int (batch,).

  Returns:
    Features of the same shape, zero beyond the lengths.
  """
  mask = length_mask(lengths, features.shape[1])[..., None]
  count = jnp.maximum(lengths, 1)[:, None, None]
  mean = jnp.sum(jnp.where(mask, features, 0), 1, keepdims=True) / count
  off = jnp.where(mask, features - mean, 0)
  spread = jnp.sum(off**2, 1, keepdims=True) / count
  return off * jax.lax.rsqrt(spread + 1e-5)


def compute_features(
  front: FrontEnd, audio: chex.Array, length: chex.Array
) -> tuple[chex.Array, chex.Array]:
  """Computes normalised features of a batch.

  Args:
    front: settings of the features.
    audio: samples (batch, samples), or features (batch, frames, numbers).
    length: number of valid samples or frames, int (batch,).

  Returns:
    Features (batch, frames, numbers) and their lengths, int (batch,).
  """
  if front.rate is None:
    return normalise(audio, length), length
  frames = count_frames(front, length)
  return normalise(log_mel(audio, front), frames), frames


def with_deltas(features: np.ndarray) -> np.ndarray:
  """Appends first and second differences to features (frames, n)."""
  slope = lambda x: np.gradient(x, axis=0) if len(x) > 1 else np.zeros_like(x)
  first = slope(features)
  parts = [features, first, slope(first)]
  return np.concatenate(parts, axis=1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Masks:
  """Settings of SpecAugment.

  Attributes:
    time_masks: number of masks over time.
    max_time_mask: largest length of a time mask, in frames; at most a fifth of
      the utterance.
    freq_masks: number of masks over frequency.
    max_freq_mask: largest width of a frequency mask, in bands.
  """

  time_masks: Annotated[int, harness.Allowed(0)] = 2
  max_time_mask: int = 20
  freq_masks: Annotated[int, harness.Allowed(0)] = 2
  max_freq_mask: int = 8


def spec_augment(
  key: chex.PRNGKey,
  features: chex.Array,
  lengths: chex.Array,
  masks: Masks,
) -> chex.Array:
  """Masks random frames and bands by zero, the mean of normalised features.

  Args:
    key: PRNG key.
    features: normalised features, (batch, frames, numbers).
    lengths: number of valid frames, int (batch,).
    masks: number and size of the masks.

  Returns:
    Features of the same shape.

  Source: Park and others, SpecAugment: A Simple Data Augmentation Method for
  Automatic Speech Recognition, 2019.
  """
  rows, frames, numbers = features.shape
  # One call: compiling several random draws takes seconds.
  count = masks.time_masks
  uniform = jax.random.uniform(key, (2, count + masks.freq_masks, rows))
  max_time = jnp.minimum(masks.max_time_mask, lengths // 5)
  times = _random_masks(uniform[:, :count], max_time, lengths, frames)
  max_freq = jnp.full(rows, min(masks.max_freq_mask, numbers // 2))
  bands = _random_masks(
    uniform[:, count:], max_freq, jnp.full(rows, numbers), numbers
  )
  return jnp.where(times[..., None] | bands[:, None], 0, features)


def _random_masks(uniform, max_width, lengths, size):
  """Union of masks with random widths and starts, bool (rows, size)."""
  below = lambda u, top: jnp.minimum(jnp.floor(u * (top + 1)), top)
  width = below(uniform[0], max_width)
  start = below(uniform[1], lengths - width)[..., None]
  place = jnp.arange(size)
  inside = (place >= start) & (place < start + width[..., None])
  return jnp.any(inside, axis=0)
