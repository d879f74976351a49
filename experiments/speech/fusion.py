"""Language models for a beam search over labels (shallow fusion).

A search stores a state with each prefix. `log_probs` gives the log-probability
that each label adds to the text, `follow` the state after a label, and `end`
the log-probability of the end of the text.
"""

import math
from typing import Any, NamedTuple, Protocol

import numpy as np

from experiments.speech import ngram
from experiments.speech import units as units_lib


class LabelModel(Protocol):
  """A language model over labels.

  Attributes:
    start: the state before the first label.
  """

  start: Any

  def log_probs(self, state: Any) -> np.ndarray:
    """Log-probabilities of the next label, (labels,); 0 for the blank."""

  def follow(self, state: Any, label: int) -> Any:
    """Returns the state after a label."""

  def end(self, state: Any) -> float:
    """Log-probability of the end of the text."""


class _Spelling(NamedTuple):
  """Complete words, and labels of the incomplete last word."""

  words: tuple[str, ...]
  labels: tuple[int, ...]


class WordModel:
  """A language model over words, applied to labels that spell them.

  A word is scored when a label ends it, the last word at the end of the text.
  An unknown word has the probability of the unknown token times that of
  uniformly random labels; without this factor, long unknown words would be the
  likeliest texts.
  """

  def __init__(
    self, model: ngram.Model, units: units_lib.Units, *, bonus: float = 0.0
  ):
    """Wraps a word model.

    Args:
      model: model whose tokens are words.
      units: units of the labels.
      bonus: added to the log-probability of each word.
    """
    self._model, self._units, self._bonus = model, units, bonus
    self._cache: dict[_Spelling, tuple[float, _Spelling]] = {}
    self.start = _Spelling((ngram.START,), ())

  def _word(self, state: _Spelling) -> tuple[float, _Spelling]:
    """Score of the last word if it ends here, and the state after it."""
    if state not in self._cache:
      self._cache[state] = self._spell(state)
    return self._cache[state]

  def _spell(self, state: _Spelling) -> tuple[float, _Spelling]:
    word = self._units.decode(state.labels)
    if not word:
      return 0.0, state._replace(labels=())
    score = self._model.log_prob(state.words, word) + self._bonus
    if not self._model.knows(word):
      score -= len(state.labels) * math.log(self._units.size)
    words = (*state.words, word)
    keep = self._model.order - 1
    return score, _Spelling(words[max(0, len(words) - keep) :], ())

  def log_probs(self, state: _Spelling) -> np.ndarray:
    """Scores of the next label; 0 for labels that continue a word."""
    score, _ = self._word(state)
    return np.where(self._units.breaks, score, 0.0)

  def follow(self, state: _Spelling, label: int) -> _Spelling:
    """Returns the state after a label."""
    if self._units.breaks[label]:
      _, state = self._word(state)
    return state._replace(labels=(*state.labels, int(label)))

  def end(self, state: _Spelling) -> float:
    """Score of the last word and of the end of the text."""
    score, after = self._word(state)
    return score + self._model.log_prob(after.words, ngram.END)
