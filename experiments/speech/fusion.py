"""Models of language as a beam search asks them: label by label.

A search keeps a state with each beginning of a text. `log_probs` of a state has
what each label adds to the logarithm of the text's probability, `follow` is the
state after a label, and `end` what the end of the text adds.
"""

import math
from typing import Any, NamedTuple, Protocol

import numpy as np

from experiments.speech import ngram
from experiments.speech import units as units_lib


class LabelModel(Protocol):
  """A model of language, label by label.

  Attributes:
    start: the state before the first label.
  """

  start: Any

  def log_probs(self, state: Any) -> np.ndarray:
    """Of each label after a state, float64 (labels,); 0 for the blank."""

  def follow(self, state: Any, label: int) -> Any:
    """The state after a label."""

  def end(self, state: Any) -> float:
    """Of the end of the text."""


class _Spelling(NamedTuple):
  """Words that are done, and labels of the one that is not."""

  words: tuple[str, ...]
  labels: tuple[int, ...]


class OfWords:
  """A model whose tokens are words that units spell.

  A word is asked for when a label ends it, and the last one at the end, so that
  a text has the probability of its words, in whichever units. A word that the
  model does not know has the probability of an unknown one, and of its labels
  among all there are: else whatever has no space would be the likeliest.
  """

  def __init__(
    self, model: ngram.Model, units: units_lib.Units, *, bonus: float = 0.0
  ):
    """Makes it.

    Args:
      model: with words for tokens.
      units: of the text.
      bonus: that each word adds to the model's logarithm.
    """
    self._model, self._units, self._bonus = model, units, bonus
    self._known: dict[_Spelling, tuple[float, _Spelling]] = {}
    self.start = _Spelling((ngram.START,), ())

  def _word(self, state: _Spelling) -> tuple[float, _Spelling]:
    """What the word adds that is spelt so far, and the state after it."""
    if state not in self._known:
      self._known[state] = self._spell(state)
    return self._known[state]

  def _spell(self, state: _Spelling) -> tuple[float, _Spelling]:
    word = self._units.decode(state.labels)
    if not word:
      return 0.0, state._replace(labels=())
    found = self._model.log_prob(state.words, word) + self._bonus
    if not self._model.knows(word):
      found -= len(state.labels) * math.log(self._units.size)
    words = (*state.words, word)
    keep = self._model.order - 1
    return found, _Spelling(words[max(0, len(words) - keep) :], ())

  def log_probs(self, state: _Spelling) -> np.ndarray:
    """Of each label after a state: 0 for those that go on with a word."""
    added, _ = self._word(state)
    return np.where(self._units.breaks, added, 0.0)

  def follow(self, state: _Spelling, label: int) -> _Spelling:
    """The state after a label."""
    if self._units.breaks[label]:
      _, state = self._word(state)
    return state._replace(labels=(*state.labels, int(label)))

  def end(self, state: _Spelling) -> float:
    """Of the last word, and of the end of the text."""
    added, after = self._word(state)
    return added + self._model.log_prob(after.words, ngram.END)
