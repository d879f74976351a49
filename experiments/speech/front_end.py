"""From samples to normalised features, on the device.

All arrays have leading axes (batch, time); what lies beyond an utterance's
length is zero in the result, and changes nothing before it.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

# Below it the logarithm of an energy tells nothing but the quantisation.
_FLOOR = 1e-7


class FrontEnd(NamedTuple):
  """How features are made.

  Attributes:
    rate: samples a second; None if features are given, which are normalised
      only.
    numbers: mel bands, or numbers of a given frame.
    window: seconds.
    hop: seconds from a frame to the next.
    lowest: of the bands, hertz.
  """

  rate: int | None
  numbers: int
  window: float = 0.025
  hop: float = 0.01
  lowest: float = 20.0

  @property
  def samples(self) -> tuple[int, int]:
    """Samples of a window and of a hop."""
    return round(self.window * self.rate), round(self.hop * self.rate)


def frames_of(front: FrontEnd, length: chex.Numeric) -> chex.Numeric:
  """Whole frames in so many samples, or given frames; at least 0."""
  if front.rate is None:
    return length
  window, hop = front.samples
  left = length - window + hop
  # Of a whole number, an array and what is traced alike.
  return left * (left > 0) // hop


def filters(front: FrontEnd) -> np.ndarray:
  r"""Triangles that are even on the mel scale.

  .. math:: m(f) = 2595 \log_{10}(1 + f / 700)

  Args:
    front: with the sampling rate and the number of bands.

  Returns:
    Weights of the bins of a spectrum, (bins, bands), of peak 1.
  """
  size = _size(front)
  top = 2595 * math.log10(1 + front.rate / 2 / 700)
  low = 2595 * math.log10(1 + front.lowest / 700)
  edges = 700 * (10 ** (np.linspace(low, top, front.numbers + 2) / 2595) - 1)
  bins = np.fft.rfftfreq(size, 1 / front.rate)[:, None]
  left, middle, right = edges[:-2], edges[1:-1], edges[2:]
  rising = (bins - left) / (middle - left)
  falling = (right - bins) / (right - middle)
  return np.maximum(np.minimum(rising, falling), 0).astype(np.float32)


def _size(front: FrontEnd) -> int:
  """Points of the transform: so many that no band is without a bin."""
  size = 2 ** math.ceil(math.log2(front.samples[0]))
  low = front.lowest + 0.0
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
  """Logarithms of the energies in mel bands.

  Args:
    audio: samples, (..., samples), of the size of 1.
    front: with the sampling rate.

  Returns:
    (..., frames, bands).
  """
  window, hop = front.samples
  count = int(frames_of(front, audio.shape[-1]))
  places = np.arange(count)[:, None] * hop + np.arange(window)
  framed = audio[..., places] * np.hanning(window).astype(np.float32)
  energy = jnp.abs(jnp.fft.rfft(framed, _size(front), axis=-1)) ** 2
  return jnp.log(energy @ filters(front) + _FLOOR)


def mask_of(lengths: chex.Array, size: int) -> chex.Array:
  """Which frames an utterance has, bool (batch, size)."""
  return jnp.arange(size) < lengths[:, None]


def normalised(features: chex.Array, lengths: chex.Array) -> chex.Array:
  """Each number has mean 0 and deviation 1 over an utterance's frames.

  Args:
    features: (batch, frames, numbers).
    lengths: frames of each, int (batch,).

  Returns:
    The same shape; zero beyond the lengths.
  """
  mask = mask_of(lengths, features.shape[1])[..., None]
  count = jnp.maximum(lengths, 1)[:, None, None]
  mean = jnp.sum(jnp.where(mask, features, 0), 1, keepdims=True) / count
  off = jnp.where(mask, features - mean, 0)
  spread = jnp.sum(off**2, 1, keepdims=True) / count
  return off * jax.lax.rsqrt(spread + 1e-5)


def features_of(
  front: FrontEnd, audio: chex.Array, length: chex.Array
) -> tuple[chex.Array, chex.Array]:
  """Normalised features of a batch.

  Args:
    front: the front end.
    audio: samples (batch, samples), or given frames (batch, frames, numbers).
    length: of each, in samples or frames, int (batch,).

  Returns:
    Features (batch, frames, numbers) and their lengths, int (batch,).
  """
  if front.rate is None:
    return normalised(audio, length), length
  frames = frames_of(front, length)
  return normalised(log_mel(audio, front), frames), frames


def with_deltas(features: np.ndarray) -> np.ndarray:
  """Given features with their slopes and the slopes of these, 3 n numbers."""
  slope = lambda x: np.gradient(x, axis=0) if len(x) > 1 else np.zeros_like(x)
  first = slope(features)
  parts = [features, first, slope(first)]
  return np.concatenate(parts, axis=1).astype(np.float32)


class Augmentation(NamedTuple):
  """SpecAugment: stripes of an utterance are set to its mean.

  Attributes:
    times: stripes of frames.
    longest: of one, frames; and never more than a fifth of the utterance.
    bands: stripes of neighbouring numbers.
    widest: of one, numbers.
  """

  times: int = 2
  longest: int = 30
  bands: int = 2
  widest: int = 8


def spec_augment(
  key: chex.PRNGKey,
  features: chex.Array,
  lengths: chex.Array,
  how: Augmentation,
) -> chex.Array:
  """Features with stripes of zeros, the mean of normalised ones.

  Args:
    key: PRNG key.
    features: normalised, (batch, frames, numbers).
    lengths: frames of each, int (batch,).
    how: stripes.

  Returns:
    The same shape.

  Source: Park and others, SpecAugment: A Simple Data Augmentation Method for
  Automatic Speech Recognition, 2019.
  """
  rows, frames, numbers = features.shape
  # In one draw: to compile several takes seconds.
  drawn = jax.random.uniform(key, (2, how.times + how.bands, rows))
  longest = jnp.minimum(how.longest, lengths // 5)
  hidden = _stripes(drawn[:, : how.times], longest, lengths, frames)[..., None]
  whole = jnp.full(rows, numbers)
  widest = jnp.full(rows, min(how.widest, numbers // 2))
  bands = _stripes(drawn[:, how.times :], widest, whole, numbers)
  return jnp.where(hidden | bands[:, None], 0, features)


def _stripes(drawn, longest, lengths, size):
  """Where stripes of random lengths up to `longest` lie, bool (rows, size)."""
  below = lambda u, most: jnp.minimum(jnp.floor(u * (most + 1)), most)
  width = below(drawn[0], longest)
  start = below(drawn[1], lengths - width)[..., None]
  place = jnp.arange(size)
  inside = (place >= start) & (place < start + width[..., None])
  return jnp.any(inside, axis=0)
