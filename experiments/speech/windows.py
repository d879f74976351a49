"""Divides long audio into overlapping windows, which bounds the memory.

Each output frame is taken from one window. Two windows are joined within their
overlap, where both recognise a pause: no word is cut, lost or repeated.
"""

import chex
import numpy as np


def spans(
  length: int, size: int, overlap: int, step: int
) -> list[tuple[int, int]]:
  """Divides a length into windows.

  Args:
    length: the length.
    size: size of a window; the last one may be shorter.
    overlap: smallest overlap of neighbours.
    step: windows start at its multiples; at most `size - overlap`.

  Returns:
    Start and stop of each window.
  """
  advance = (size - overlap) // step * step
  count = 1 + max(0, -(-(length - size) // advance))
  return [(i * advance, min(i * advance + size, length)) for i in range(count)]


def seam(before: chex.Array, after: chex.Array, width: int) -> int:
  """Finds the pause in which to change from one window to the next.

  The outer quarters of the overlap are excluded: one of the two windows has too
  little context there.

  Args:
    before: log-probability of the blank in the first window, (frames,) of the
      overlap.
    after: the same in the second window.
    width: frames of a pause.

  Returns:
    The first frame of the overlap that is taken from the second window.
  """
  score = np.asarray(before, np.float64) + np.asarray(after, np.float64)
  first = len(score) // 4
  inner = score[first : len(score) - first]
  width = min(width, len(inner))
  sums = np.convolve(inner, np.ones(width), 'valid')
  return first + int(np.argmax(sums)) + width // 2
