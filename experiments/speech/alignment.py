"""When each label of a known text is said: the likeliest path that says it."""

from typing import NamedTuple

import chex
import numpy as np

from experiments import harness
from experiments.speech.units import BLANK
from experiments.speech.utterances import frames_needed


class Alignment(NamedTuple):
  """A path, and where labels are in it.

  Attributes:
    path: label or blank of each frame, int32 (frames,).
    starts: first frame of each label, int32 (n,).
    stops: the frame after its last, int32 (n,).
    log_prob: of the path.
  """

  path: np.ndarray
  starts: np.ndarray
  stops: np.ndarray
  log_prob: float


def align(log_probs: chex.Array, labels: chex.Array) -> Alignment:
  """The likeliest of the paths that say a text.

  Args:
    log_probs: of one output, (frames, labels); 0 is the blank.
    labels: the text, int (n,), none is blank.

  Returns:
    The alignment. Frames times the seconds of a frame are times.

  Raises:
    DamagedDataError: if no path of so many frames says the labels, or the
      output excludes every one.
  """
  outputs = np.asarray(log_probs, np.float64)
  labels = np.asarray(labels, np.int32).reshape(-1)
  frames, needed = len(outputs), frames_needed(labels)
  if frames < max(needed, 1):
    raise harness.DamagedDataError(
      f'{len(labels)} labels need {max(needed, 1)} frames, and there are '
      f'{frames}: a network that reads fewer frames into one, or shorter texts.'
    )
  # States: a blank before, between and behind the labels.
  states = np.full(2 * len(labels) + 1, BLANK, np.int32)
  states[1::2] = labels
  count = len(states)
  jumps = np.zeros(count, bool)
  jumps[3::2] = labels[1:] != labels[:-1]
  best = np.full(count, -np.inf)
  best[:2] = outputs[0, states[:2]]
  came = np.zeros((frames, count), np.int8)
  for t in range(1, frames):
    steps = np.full((3, count), -np.inf)
    steps[0] = best
    steps[1, 1:] = best[:-1]
    steps[2, 2:] = np.where(jumps[2:], best[:-2], -np.inf)
    came[t] = np.argmax(steps, axis=0)
    best = steps.max(axis=0) + outputs[t, states]
  at = count - 1
  if count > 1 and best[-2] > best[-1]:
    at = count - 2
  if not best[at] > -np.inf:
    raise harness.DamagedDataError(
      'the output gives no probability to any path that says the labels.'
    )
  log_prob = float(best[at])
  visited = np.zeros(frames, np.int32)
  for t in range(frames - 1, -1, -1):
    visited[t] = at
    at -= int(came[t, at])
  starts = np.searchsorted(visited, 2 * np.arange(len(labels)) + 1)
  stops = np.searchsorted(visited, 2 * np.arange(len(labels)) + 1, 'right')
  return Alignment(
    states[visited], starts.astype(np.int32), stops.astype(np.int32), log_prob
  )
