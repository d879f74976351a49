"""Tests the front end against plain NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.speech import front_end

FRONT = front_end.FrontEnd(8_000, 12)


def _plain(audio, rate, bands):
  """Log mel energies, frame by frame and band by band."""
  window, hop = round(0.025 * rate), round(0.01 * rate)
  size = front_end._fft_size(front_end.FrontEnd(rate, bands))
  to_mel = lambda f: 2595 * math.log10(1 + f / 700)
  to_hertz = lambda m: 700 * (10 ** (m / 2595) - 1)
  low, top = to_mel(20.0), to_mel(rate / 2)
  edges = [
    to_hertz(low + (top - low) * i / (bands + 1)) for i in range(bands + 2)
  ]
  rows = []
  for start in range(0, len(audio) - window + 1, hop):
    piece = [
      audio[start + i] * (0.5 - 0.5 * math.cos(2 * math.pi * i / (window - 1)))
      for i in range(window)
    ]
    row = []
    for band in range(bands):
      left, middle, right = edges[band : band + 3]
      energy = 0.0
      for k in range(size // 2 + 1):
        f = k * rate / size
        if left < f < right:
          weight = (
            (f - left) / (middle - left)
            if f <= middle
            else (right - f) / (right - middle)
          )
          turn = np.exp(-2j * np.pi * k * np.arange(window) / size)
          energy += weight * abs(np.dot(piece, turn)) ** 2
      row.append(math.log(energy + 1e-7))
    rows.append(row)
  return np.array(rows)


def test_log_mel_is_the_plain_one():
  audio = np.random.default_rng(0).normal(size=700).astype(np.float32)
  audio[:350] *= 1e-4
  expected = _plain(audio.astype(np.float64), 8_000, 12)
  result = front_end.log_mel(jnp.asarray(audio), FRONT)
  np.testing.assert_allclose(result, expected, rtol=2e-3, atol=2e-3)
  assert result.shape[0] == front_end.count_frames(FRONT, 700)


@pytest.mark.parametrize('rate, bands', [(8_000, 80), (16_000, 80), (8_000, 4)])
def test_no_band_is_empty(rate, bands):
  weights = front_end.filters(front_end.FrontEnd(rate, bands))
  assert (weights.sum(axis=0) > 0).all()
  assert weights.max() <= 1


def test_what_lies_beyond_an_utterance_changes_nothing():
  rng = np.random.default_rng(1)
  audio = rng.normal(size=(2, 1_200)).astype(np.float32)
  length = np.array([1_200, 700])
  result, frames = front_end.compute_features(FRONT, audio, length)
  unpadded, unpadded_frames = front_end.compute_features(
    FRONT, audio[1:, :700], length[1:]
  )
  assert frames.tolist() == [13, 7] and unpadded_frames.tolist() == [7]
  np.testing.assert_allclose(result[1, :7], unpadded[0], atol=1e-5)
  assert not np.any(result[1, 7:])
  np.testing.assert_allclose(result[0].mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(result[0].std(axis=0), 1, atol=1e-3)


def test_audio_shorter_than_a_window_and_silence_stay_finite():
  length = np.array([100, 1_000])
  result, frames = front_end.compute_features(
    FRONT, np.zeros((2, 1_000)), length
  )
  assert frames.tolist() == [0, 11]
  # A constant has no spread to divide by: rounding only.
  assert np.all(np.abs(result) < 1e-2)


def test_masks_have_their_sizes():
  masks = front_end.Masks(1, 4, 1, 3)
  ones = jnp.ones((64, 40, 10))
  lengths = jnp.full(64, 20)
  result = np.asarray(
    front_end.spec_augment(jax.random.key(0), ones, lengths, masks)
  )
  gone_bands = (result == 0).all(axis=1).sum(axis=1)
  gone_times = (result == 0).all(axis=2).sum(axis=1)
  assert set(gone_bands) == {0, 1, 2, 3}
  # A fifth of 20 frames at most.
  assert set(gone_times) == {0, 1, 2, 3, 4}
  assert not (result[:, 20:] == 0).all(axis=2).any()
  # Each place is hidden at some time.
  assert (result[:, :20] == 0).all(axis=2).any(axis=0).sum() >= 18
  visible = result != 0
  expected = ~(
    (~visible).all(axis=1)[:, None, :] | (~visible).all(axis=2)[:, :, None]
  )
  np.testing.assert_array_equal(visible, expected)
