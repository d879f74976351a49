"""Cuts long audio in its pauses.

A network that normalises each utterance expects utterances like those of
training: one speaker, and short pauses.
"""

import itertools

import numpy as np
import scipy.ndimage

# A frame is quiet if it is this many decibels below the loudest frame within
# this many seconds: speakers may differ in level.
_QUIET, _NEAR = 25.0, 1.0
# Sound is louder than the pauses next to it by this many decibels. The rest is
# the middle of a long pause, where nothing louder than its noise is near.
_ABOVE_NOISE = 10.0
# Seconds of the shortest pause, and of quiet that a segment keeps on each side.
_PAUSE, _MARGIN = 0.2, 0.1
# Power of digital silence; rounding to 16 bits has about as much.
_FLOOR = 1e-10


def compute_levels(samples: np.ndarray, hop: int) -> np.ndarray:
  """Computes the power of frames.

  Args:
    samples: (samples,), full scale is 1.
    hop: samples of a frame.

  Returns:
    Decibels of whole frames, float32 (frames,).
  """
  count = len(samples) // hop
  framed = samples[: count * hop].reshape(count, hop)
  power = np.mean(framed.astype(np.float64) ** 2, axis=1)
  return (10 * np.log10(power + _FLOOR)).astype(np.float32)


def segments(
  levels: np.ndarray, frame_rate: float, longest: float
) -> list[tuple[int, int]]:
  """Cuts audio in its longest pauses first.

  Args:
    levels: decibels of frames, (frames,), at least one.
    frame_rate: frames per second.
    longest: seconds below which a segment is not cut further.

  Returns:
    First and last frame, exclusive, of each segment; frames between segments
    are quiet. A segment without a pause may be longer than `longest`.
  """
  bounds = _sounds(levels, frame_rate)
  margin = round(_MARGIN * frame_rate)
  bounds[:, 0] = np.maximum(bounds[:, 0] - margin, 0)
  bounds[:, 1] = np.minimum(bounds[:, 1] + margin, len(levels))
  cut, uncut = [], [bounds]
  while uncut:
    run = uncut.pop()
    start, stop = int(run[0, 0]), int(run[-1, 1])
    if len(run) == 1 or stop - start <= longest * frame_rate:
      cut.append((start, stop))
      continue
    lengths = run[1:, 0] - run[:-1, 1]
    # Of equal pauses the middle one: the second term is below one frame.
    off_centre = np.abs(run[1:, 0] + run[:-1, 1] - start - stop)
    place = 1 + int(np.argmax(lengths - off_centre / (2 * (stop - start))))
    uncut += [run[place:], run[:place]]
  return cut


def _sounds(levels, frame_rate):
  """First and last frame, exclusive, of each sound, (sounds, 2)."""
  size = 2 * round(_NEAR * frame_rate) + 1
  quiet = levels < scipy.ndimage.maximum_filter1d(levels, size) - _QUIET
  edges = np.flatnonzero(np.diff(np.pad(quiet, 1).astype(int)))
  pauses = edges.reshape(-1, 2)
  pauses = pauses[pauses[:, 1] - pauses[:, 0] >= round(_PAUSE * frame_rate)]
  ends = [(0, 0), *pauses, (len(levels), len(levels))]
  # Never empty: the loudest frame is above the noise of every pause.
  return np.array(
    [
      (before[1], after[0])
      for before, after in itertools.pairwise(ends)
      if _is_sound(levels, before, after)
    ]
  )


def _is_sound(levels, before, after):
  """Whether the frames between two pauses are louder than the pauses."""
  sound = levels[before[1] : after[0]]
  noise = np.concatenate([levels[slice(*before)], levels[slice(*after)]])
  if not len(sound) or not len(noise):
    return len(sound) > 0
  return np.max(sound) > np.median(noise) + _ABOVE_NOISE
