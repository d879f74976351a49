"""How much of what is said was understood wrongly: words, and characters.

The package jiwer aligns texts; an error rate is the errors of all utterances
over all that they should have: the edits that turn one text into the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments import harness
from experiments.bl_just import extra


class Errors(NamedTuple):
  """Errors of each utterance.

  Attributes:
    substitutions: of one for another, int64 (utterances,).
    deletions: of what was said, likewise.
    insertions: of what was not, likewise.
    lengths: words or characters that were said, likewise.
  """

  substitutions: np.ndarray
  deletions: np.ndarray
  insertions: np.ndarray
  lengths: np.ndarray

  @property
  def counts(self) -> np.ndarray:
    """All errors of each utterance, int64 (utterances,)."""
    return self.substitutions + self.deletions + self.insertions

  @property
  def rate(self) -> float:
    """Errors of all over lengths of all; above 1 if there is too much."""
    return float(self.counts.sum() / self.lengths.sum())


def word_errors(references: Sequence[str], found: Sequence[str]) -> Errors:
  """Errors in words.

  Args:
    references: what was said, a text an utterance.
    found: what was understood, in the same order.

  Returns:
    `Errors`; its rate is the word error rate.

  Raises:
    SettingsError: if jiwer is not installed, there are other numbers of texts,
      or nothing was said at all.
  """
  return _errors(references, found, 'words')


def character_errors(references: Sequence[str], found: Sequence[str]) -> Errors:
  """Errors in characters, a space between words is one; see `word_errors`."""
  return _errors(references, found, 'characters')


def _errors(references, found, what):
  jiwer = extra.need('jiwer', 'counting errors')
  references = [' '.join(text.split()) for text in references]
  found = [' '.join(text.split()) for text in found]
  if len(references) != len(found):
    raise harness.SettingsError(
      f'there are {len(references)} texts that were said, and {len(found)} '
      'that were understood.'
    )
  if not any(references):
    raise harness.SettingsError(
      'nothing is said in any utterance, so that there is no rate of errors.'
    )
  process = {
    'words': jiwer.process_words,
    'characters': jiwer.process_characters,
  }
  output = process[what](references, found)
  rows = np.zeros((len(references), 4), np.int64)
  kinds = {'substitute': 0, 'delete': 1, 'insert': 2}
  for row, chunks in zip(rows, output.alignments):
    for chunk in chunks:
      if chunk.type != 'equal':
        row[kinds[chunk.type]] += max(
          chunk.ref_end_idx - chunk.ref_start_idx,
          chunk.hyp_end_idx - chunk.hyp_start_idx,
        )
  split = str.split if what == 'words' else list
  rows[:, 3] = [len(split(text)) for text in references]
  return Errors(*rows.T)


class Difference(NamedTuple):
  """How much higher one error rate is than another.

  Attributes:
    mean: of the two as they are.
    low: end of the 95 % interval.
    high: likewise.
    below: share of draws in which the first is lower.
  """

  mean: float
  low: float
  high: float
  below: float


def paired_bootstrap(
  errors: np.ndarray,
  others: np.ndarray,
  lengths: np.ndarray,
  *,
  seed: int = 0,
  draws: int = 10_000,
) -> Difference:
  """The interval of a difference of error rates, over utterances and seeds.

  Each draw takes as many utterances as there are, and as many seeds, with
  putting back, both the same for either method. Of two or three seeds a draw
  knows little: what is between seeds is understated by a factor of about
  (1 - 1 / seeds) in its variance.

  Args:
    errors: of a method, int (seeds, utterances); or (utterances,) for one seed.
    others: of the method that it is compared with, the same utterances; seeds
      are pairs.
    lengths: of what was said, int (utterances,).
    seed: of the draws.
    draws: how many.

  Returns:
    The difference of the rates, `errors` less `others`.

  Raises:
    SettingsError: if the shapes do not fit, or nothing was said.
  """
  errors, others = (np.atleast_2d(np.asarray(x)) for x in (errors, others))
  lengths = np.asarray(lengths)
  if errors.shape != others.shape or errors.shape[1:] != lengths.shape:
    raise harness.SettingsError(
      f'errors are of (seeds, utterances), got {errors.shape} and '
      f'{others.shape}, with lengths of {lengths.shape}.'
    )
  if not lengths.sum() > 0:
    raise harness.SettingsError('nothing is said in any utterance.')
  seeds, utterances = errors.shape
  excess = (errors - others).astype(np.float64)
  rng = np.random.default_rng(seed)
  found = np.empty(draws)
  for i in range(draws):
    rows = rng.integers(seeds, size=seeds)
    columns = rng.integers(utterances, size=utterances)
    said = lengths[columns].sum()
    # A draw of silent utterances alone has no rate.
    while not said:
      columns = rng.integers(utterances, size=utterances)
      said = lengths[columns].sum()
    found[i] = excess[rows].mean(axis=0)[columns].sum() / said
  low, high = np.percentile(found, [2.5, 97.5])
  mean = excess.mean(axis=0).sum() / lengths.sum()
  return Difference(
    float(mean), float(low), float(high), float(np.mean(found < 0))
  )
