"""How much of what is said was understood wrongly: words, and characters.

The package jiwer aligns texts; an error rate is the errors of all utterances
over all that they should have: the edits that turn one text into the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments import harness


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
  jiwer = harness.load_extra('jiwer', 'asr', 'counting errors')
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
