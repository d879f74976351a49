"""Decodes CTC outputs, greedily or by prefix beam search.

An output has a log-probability for each frame and label; label 0 is the blank.
A path has one label per frame; its text results from merging repeated labels
and then removing blanks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import numpy as np

from experiments import harness
from experiments.speech import fusion
from experiments.speech.units import BLANK

_NEVER = -np.inf


class Hypothesis(NamedTuple):
  """A candidate text.

  Attributes:
    labels: int32 (n,).
    log_prob: log-probability of its paths within the beam, given the audio.
    score: `log_prob` with the language model and the bonus; sorts candidates.
  """

  labels: np.ndarray
  log_prob: float
  score: float


def collapse(path: chex.Array) -> np.ndarray:
  """Merges repeated labels and removes blanks.

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
  """Decodes each output by its likeliest path.

  Args:
    log_probs: log-probabilities or logits, (batch, frames, labels).
    lengths: number of valid frames, int (batch,); None if all are valid.

  Returns:
    Labels of each output, int32 (n,).
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
  max_texts: int = 1,
) -> list[Hypothesis]:
  r"""Searches the texts with the highest score.

  .. math:: \log p(y | x) + \text{weight} \log p(y) + \text{bonus}\, |y|

  Each prefix has two probabilities, of paths that end in a blank and of paths
  that end in its last label. The result is exact if the beam is wide enough for
  all prefixes.

  Args:
    log_probs: normalised output for one utterance, (frames, labels).
    width: number of prefixes to keep after each frame.
    model: language model, or None.
    weight: weight of the language model.
    bonus: score per label; compensates the language model's preference for
      short texts.
    max_texts: largest number of texts to return.

  Returns:
    At most `max_texts` texts, the best first.

  Raises:
    ValueError: if the output has a NaN.
    SettingsError: if the width is below 1.
  """
  if width < 1:
    raise harness.SettingsError(f'the beam width is at least 1, got {width}.')
  outputs = np.asarray(log_probs, np.float64)
  if np.isnan(outputs).any():
    raise ValueError('the output of the network has a NaN.')
  size = outputs.shape[1]
  prefixes: list[tuple[int, ...]] = [()]
  # Log-probabilities of paths that end in a blank and in the last label, scores
  # of the language model and the bonus, states of the language model.
  blank, label = np.zeros(1), np.full(1, _NEVER)
  extra = np.zeros(1)
  states = [model.start if model is not None else None]
  for frame in outputs:
    last = np.array([p[-1] if p else BLANK for p in prefixes])
    nonempty = np.array([bool(p) for p in prefixes])
    both = np.logaddexp(blank, label)
    stay_blank = both + frame[BLANK]
    stay_label = np.where(nonempty, label + frame[last], _NEVER)
    extended = both[:, None] + frame
    rows = np.flatnonzero(nonempty)
    # A repeated label is a new label only after a blank.
    extended[rows, last[rows]] = blank[rows] + frame[last[rows]]
    extended[:, BLANK] = _NEVER
    place = {prefix: i for i, prefix in enumerate(prefixes)}
    for j in rows:
      i = place.get(prefixes[j][:-1])
      if i is not None:
        stay_label[j] = np.logaddexp(stay_label[j], extended[i, last[j]])
        extended[i, last[j]] = _NEVER
    extended_extra = np.full((len(prefixes), size), float(bonus))
    if model is not None and weight:
      extended_extra += weight * np.stack([model.log_probs(s) for s in states])
    extended_extra += extra[:, None]
    stay = np.logaddexp(stay_blank, stay_label)
    scores = np.concatenate([stay + extra, (extended + extended_extra).ravel()])
    order = _best(scores, width)
    chosen = order[scores[order] > _NEVER]
    if not len(chosen):
      return []
    count = len(prefixes)
    new = [divmod(k - count, size) if k >= count else (k, -1) for k in chosen]
    blank, label, extra, prefixes, states = (
      np.array([stay_blank[i] if c < 0 else _NEVER for i, c in new]),
      np.array([stay_label[i] if c < 0 else extended[i, c] for i, c in new]),
      np.array([extra[i] if c < 0 else extended_extra[i, c] for i, c in new]),
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
  order = np.argsort(-scores, kind='stable')[:max_texts]
  return [
    Hypothesis(
      np.array(prefixes[i], np.int32), float(both[i]), float(scores[i])
    )
    for i in order
  ]


def _best(scores, width):
  """Indices of the highest scores, sorted; ties keep their order."""
  if len(scores) > 4 * width:
    # A partition is faster than a sort. It keeps all ties at the edge.
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
  """Decodes each output by `prefix_beam`.

  Args:
    log_probs: (batch, frames, labels), or a sequence of (frames, labels).
    lengths: number of valid frames, int (batch,); None if all are valid.
    **search: settings of `prefix_beam`.

  Returns:
    Labels of each output, int32 (n,); empty if no text is possible.
  """
  outputs = [np.asarray(one) for one in log_probs]
  if lengths is not None:
    outputs = [one[:n] for one, n in zip(outputs, np.asarray(lengths))]
  texts = [prefix_beam(one, **search) for one in outputs]
  empty = np.zeros(0, np.int32)
  return [hypotheses[0].labels if hypotheses else empty for hypotheses in texts]
