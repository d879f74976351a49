"""Times and confidences of recognised words, by forced alignment."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from experiments.speech import alignment
from experiments.speech.units import Units


class Word(NamedTuple):
  """A recognised word.

  Attributes:
    text: the word.
    start: seconds from the start of the audio.
    stop: seconds, exclusive.
    confidence: geometric mean of the probabilities of its labels, over their
      frames.
  """

  text: str
  start: float
  stop: float
  confidence: float


def align(
  units: Units, log_probs: np.ndarray, labels: np.ndarray, frame: float
) -> list[Word]:
  """Finds the times of the words of a recognised text.

  Args:
    units: of the labels.
    log_probs: outputs of the network, (frames, units).
    labels: the recognised labels, int (n,).
    frame: seconds per frame.

  Returns:
    The words in order.

  Raises:
    DamagedDataError: as `alignment.align`.
  """
  if not len(labels):
    return []
  path = alignment.align(log_probs, labels)
  own = np.take_along_axis(log_probs, path.path[:, None], axis=1)[:, 0]
  words = []
  for place in _split(units, labels):
    if text := units.decode(labels[place]):
      spans = zip(path.starts[place], path.stops[place])
      frames = np.concatenate([np.arange(*span) for span in spans])
      confidence = float(np.exp(np.mean(own[frames])))
      first, last = int(frames[0]), int(frames[-1]) + 1
      words.append(Word(text, first * frame, last * frame, confidence))
  return words


def _split(units: Units, labels: np.ndarray) -> list[np.ndarray]:
  """Splits labels into words; returns the indices of each word's labels."""
  ends = np.flatnonzero(units.breaks[labels])
  parts = np.split(np.arange(len(labels)), ends)
  # The break between characters is no part of the next word.
  silent = [not units.decode(labels[i : i + 1]) for i in range(len(labels))]
  return [part[~np.array(silent)[part]] for part in parts if len(part)]


def to_ctm(name: str, words: Iterable[Word]) -> str:
  """Formats words in the CTM format of NIST.

  Args:
    name: name of the recording; spaces become underscores.
    words: its words.

  Returns:
    One line per word: name, channel, start and duration in seconds, the word,
    and its confidence.

  Example:
    >>> print(to_ctm('a.wav', [Word('one', 0.5, 0.75, 0.9)]))
    a.wav 1 0.50 0.25 one 0.900
  """
  name = '_'.join(name.split())
  return '\n'.join(
    f'{name} 1 {w.start:.2f} {w.stop - w.start:.2f} {w.text} {w.confidence:.3f}'
    for w in words
  )
