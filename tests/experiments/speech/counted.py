"""Models of language that count tokens of texts, to ask searches with."""

import collections
import math
from typing import NamedTuple

import numpy as np

from experiments.speech import ngram, units


class Counted(NamedTuple):
  """Interpolated counts with the weights of Witten and Bell."""

  order: int
  counts: dict
  vocabulary: frozenset

  def log_prob(self, history, token):
    history = tuple(history[-(self.order - 1) :]) if self.order > 1 else ()
    probability = 1.0 / (len(self.vocabulary) + 1)
    for length in range(len(history) + 1):
      followed = self.counts.get(history[len(history) - length :])
      if followed is None:
        break  # Longer ones were not seen either.
      kinds, total = len(followed), followed.total()
      probability = (followed[token] + kinds * probability) / (total + kinds)
    return math.log(probability)

  def knows(self, token):
    return token in self.vocabulary or token == ngram.END


def learn(texts, *, order, vocabulary):
  counts, known = {}, set(vocabulary)
  for text in texts:
    line = (ngram.START, *text, ngram.END)
    known.update(text)
    for i in range(1, len(line)):
      for length in range(min(order, i + 1)):
        history = line[i - length : i]
        counts.setdefault(history, collections.Counter())[line[i]] += 1
  return Counted(order, counts, frozenset(known))


class OfLabels:
  """A `fusion.LabelModel` whose tokens are units, learnt from texts."""

  def __init__(self, texts, known, *, order):
    self._model = learn(
      ([known.symbols[i] for i in known.encode(text)] for text in texts),
      order=order,
      vocabulary=known.symbols[units.UNKNOWN :],
    )
    self._symbols, self.start = known.symbols, (ngram.START,)

  def log_probs(self, state):
    probability = [self._model.log_prob(state, s) for s in self._symbols]
    probability[units.BLANK] = 0.0
    return np.array(probability)

  def follow(self, state, label):
    return (*state, self._symbols[label])

  def end(self, state):
    return self._model.log_prob(state, ngram.END)
