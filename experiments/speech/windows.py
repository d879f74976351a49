"""Long audio in windows that overlap, so that memory and time stay bounded.

Each output frame is taken from one window. Two windows are joined within their
overlap, where both hear a pause: no word is cut, lost or repeated.
"""

import chex
import numpy as np


def spans(
  length: int, size: int, overlap: int, step: int
) -> list[tuple[int, int]]:
  """Divides a length into windows.

  Args:
    length: of the whole.
    size: of a window; the last one may be shorter.
    overlap: of neighbours, at least.
    step: each window starts at a multiple of it; at most `size - overlap`.

  Returns:
    Start and stop of each window.
  """
  advance = (size - overlap) // step * step
  count = 1 + max(0, -(-(length - size) // advance))
  return [(i * advance, min(i * advance + size, length)) for i in range(count)]


def seam(before: chex.Array, after: chex.Array, width: int) -> int:
  """Finds the pause in which to change from one window to the next.

  The outer quarters of the overlap are left out: one of the two windows has too
  little context there.

  Args:
    before: log-probability of the blank by the first window, (frames,) of the
      overlap.
    after: the same by the second window.
    width: frames of a pause.

  Returns:
    The frame of the overlap from which on the second window is used.
  """
  score = np.asarray(before, np.float64) + np.asarray(after, np.float64)
  first = len(score) // 4
  inner = score[first : len(score) - first]
  width = min(width, len(inner))
  sums = np.convolve(inner, np.ones(width), 'valid')
  return first + int(np.argmax(sums)) + width // 2
