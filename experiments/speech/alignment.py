"""Forced alignment: the likeliest CTC path of a known text."""

from typing import NamedTuple

import chex
import numpy as np

from experiments import harness
from experiments.speech.units import BLANK
from experiments.speech.utterances import frames_needed


class Alignment(NamedTuple):
  """A path and the position of each label.

  Attributes:
    path: label or blank of each frame, int32 (frames,).
    starts: first frame of each label, int32 (n,).
    stops: last frame of each label, exclusive, int32 (n,).
    log_prob: log-probability of the path.
  """

  path: np.ndarray
  starts: np.ndarray
  stops: np.ndarray
  log_prob: float


def align(log_probs: chex.Array, labels: chex.Array) -> Alignment:
  """Finds the likeliest path that collapses to the labels.

  Args:
    log_probs: output for one utterance, (frames, labels); label 0 is the blank.
    labels: the text, int (n,), without blanks.

  Returns:
    The alignment, in frames.

  Raises:
    DamagedDataError: if there are too few frames for the labels, or every path
      has probability 0.
  """
  outputs = np.asarray(log_probs, np.float64)
  labels = np.asarray(labels, np.int32).reshape(-1)
  frames, needed = len(outputs), frames_needed(labels)
  if frames < max(needed, 1):
    raise harness.DamagedDataError(
      f'{len(labels)} labels need {max(needed, 1)} frames, but there are '
      f'{frames}: use a network with smaller strides, or shorter texts.'
    )
  # States: a blank before, between and after the labels.
  states = np.full(2 * len(labels) + 1, BLANK, np.int32)
  states[1::2] = labels
  count = len(states)
  may_skip_blank = np.zeros(count, bool)
  may_skip_blank[3::2] = labels[1:] != labels[:-1]
  best = np.full(count, -np.inf)
  best[:2] = outputs[0, states[:2]]
  backpointers = np.zeros((frames, count), np.int8)
  for t in range(1, frames):
    steps = np.full((3, count), -np.inf)
    steps[0] = best
    steps[1, 1:] = best[:-1]
    steps[2, 2:] = np.where(may_skip_blank[2:], best[:-2], -np.inf)
    backpointers[t] = np.argmax(steps, axis=0)
    best = steps.max(axis=0) + outputs[t, states]
  state = count - 1
  if count > 1 and best[-2] > best[-1]:
    state = count - 2
  if not best[state] > -np.inf:
    raise harness.DamagedDataError(
      'the output gives no probability to any path with these labels.'
    )
  log_prob = float(best[state])
  visited = np.zeros(frames, np.int32)
  for t in range(frames - 1, -1, -1):
    visited[t] = state
    state -= int(backpointers[t, state])
  starts = np.searchsorted(visited, 2 * np.arange(len(labels)) + 1)
  stops = np.searchsorted(visited, 2 * np.arange(len(labels)) + 1, 'right')
  return Alignment(
    states[visited], starts.astype(np.int32), stops.astype(np.int32), log_prob
  )
