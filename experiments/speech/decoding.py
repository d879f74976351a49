"""What a network's output says: label by label, or searched with prefixes.

The output is the logarithm of a probability for each frame and label, label 0
is the blank. A path is a label a frame; it says what is left when labels that
repeat are one, and blanks are gone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import numpy as np

from experiments import harness
from experiments.speech import fusion
from experiments.speech.units import BLANK

_NEVER = -np.inf


class Said(NamedTuple):
  """One text that an output may say.

  Attributes:
    labels: int32 (n,).
    log_prob: of all paths that were followed, given the audio.
    score: by which texts are ordered: with the model of language and the bonus.
  """

  labels: np.ndarray
  log_prob: float
  score: float


def collapse(path: chex.Array) -> np.ndarray:
  """What a path says.

  Args:
    path: labels, int (frames,).

  Returns:
    int32 (n,).
  """
  path = np.asarray(path, np.int32)
  new = np.ones(len(path), bool)
  new[1:] = path[1:] != path[:-1]
  return path[new & (path != BLANK)]


def greedy(
  log_probs: chex.Array, lengths: chex.Array | None = None
) -> list[np.ndarray]:
  """The likeliest path of each output, and what it says.

  Args:
    log_probs: logits do as well, (batch, frames, labels).
    lengths: frames of each that count, int (batch,); None for all.

  Returns:
    Of each, int32 (n,).
  """
  best = np.argmax(np.asarray(log_probs), axis=-1)
  lengths = np.full(len(best), best.shape[1]) if lengths is None else lengths
  return [collapse(path[:n]) for path, n in zip(best, np.asarray(lengths))]


def prefix_beam(
  log_probs: chex.Array,
  *,
  width: int = 16,
  model: fusion.LabelModel | None = None,
  weight: float = 0.5,
  bonus: float = 0.0,
  most: int = 1,
) -> list[Said]:
  r"""Searches the texts with the highest score.

  .. math:: \log p(y | x) + \text{weight} \log p(y) + \text{bonus}\, |y|

  A beginning of a text has two probabilities, of paths that end in a blank and
  of those that do not; what extends it adds to both, in double precision. With
  a width that holds every beginning, the result is exact.

  Args:
    log_probs: of one output, (frames, labels), sums of probabilities are 1.
    width: beginnings that are kept after each frame.
    model: of language; None leaves it out.
    weight: of the model.
    bonus: for each label: a model of language makes texts short.
    most: texts that are given back.

  Returns:
    At most so many texts, the best first.

  Raises:
    ValueError: if a number of the output is NaN.
    SettingsError: if the width is below 1.
  """
  if width < 1:
    raise harness.SettingsError(
      f'a beam has a width of 1 or more, got {width}.'
    )
  outputs = np.asarray(log_probs, np.float64)
  if np.isnan(outputs).any():
    raise ValueError('the output of the network has a number that is NaN.')
  size = outputs.shape[1]
  prefixes: list[tuple[int, ...]] = [()]
  # Log-probabilities of paths that end in a blank, and in the last label; what
  # the model and the bonus add; states of the model.
  blank, label = np.zeros(1), np.full(1, _NEVER)
  extra = np.zeros(1)
  states = [model.start if model is not None else None]
  for frame in outputs:
    last = np.array([p[-1] if p else BLANK for p in prefixes])
    some = np.array([bool(p) for p in prefixes])
    both = np.logaddexp(blank, label)
    stay_blank = both + frame[BLANK]
    stay_label = np.where(some, label + frame[last], _NEVER)
    grown = both[:, None] + frame
    rows = np.flatnonzero(some)
    # A label that repeats is a new one only after a blank.
    grown[rows, last[rows]] = blank[rows] + frame[last[rows]]
    grown[:, BLANK] = _NEVER
    place = {prefix: i for i, prefix in enumerate(prefixes)}
    for j in rows:
      i = place.get(prefixes[j][:-1])
      if i is not None:
        stay_label[j] = np.logaddexp(stay_label[j], grown[i, last[j]])
        grown[i, last[j]] = _NEVER
    added = np.full((len(prefixes), size), float(bonus))
    if model is not None and weight:
      added += weight * np.stack([model.log_probs(s) for s in states])
    added += extra[:, None]
    stay = np.logaddexp(stay_blank, stay_label)
    scores = np.concatenate([stay + extra, (grown + added).ravel()])
    order = _best(scores, width)
    chosen = order[scores[order] > _NEVER]
    if not len(chosen):
      return []
    count = len(prefixes)
    new = [divmod(k - count, size) if k >= count else (k, -1) for k in chosen]
    blank, label, extra, prefixes, states = (
      np.array([stay_blank[i] if c < 0 else _NEVER for i, c in new]),
      np.array([stay_label[i] if c < 0 else grown[i, c] for i, c in new]),
      np.array([extra[i] if c < 0 else added[i, c] for i, c in new]),
      [prefixes[i] if c < 0 else (*prefixes[i], c) for i, c in new],
      [
        model.follow(states[i], c)
        if model is not None and c >= 0
        else states[i]
        for i, c in new
      ],
    )
  both = np.logaddexp(blank, label)
  scores = both + extra
  if model is not None and weight:
    scores = scores + weight * np.array([model.end(s) for s in states])
  order = np.argsort(-scores, kind='stable')[:most]
  return [
    Said(np.array(prefixes[i], np.int32), float(both[i]), float(scores[i]))
    for i in order
  ]


def _best(scores, width):
  """Places of the highest, in order; of equals, the first."""
  if len(scores) > 4 * width:
    # A partition is faster than a sort; equals at its edge are in it as well.
    edge = -np.partition(-scores, width)[width]
    places = np.flatnonzero(scores >= edge)
  else:
    places = np.arange(len(scores))
  return places[np.argsort(-scores[places], kind='stable')[:width]]


def decode(
  log_probs: chex.Array | Sequence[chex.Array],
  lengths: chex.Array | None = None,
  **search: Any,
) -> list[np.ndarray]:
  """The best text of each output by `prefix_beam`.

  Args:
    log_probs: (batch, frames, labels), or a sequence of (frames, labels).
    lengths: frames of each that count, int (batch,); None for all.
    **search: settings of `prefix_beam`.

  Returns:
    Of each, int32 (n,); empty where nothing is possible.
  """
  outputs = [np.asarray(one) for one in log_probs]
  if lengths is not None:
    outputs = [one[:n] for one, n in zip(outputs, np.asarray(lengths))]
  found = [prefix_beam(one, **search) for one in outputs]
  nothing = np.zeros(0, np.int32)
  return [said[0].labels if said else nothing for said in found]
