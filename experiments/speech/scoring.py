"""Word and character error rates, with alignments by the package jiwer.

An error rate is the number of edits over all utterances, divided by the total
length of the references.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments import harness


class Errors(NamedTuple):
  """Errors per utterance, each int64 (utterances,).

  Attributes:
    substitutions: number of substitutions.
    deletions: number of deletions.
    insertions: number of insertions.
    lengths: number of words or characters of the references.
  """

  substitutions: np.ndarray
  deletions: np.ndarray
  insertions: np.ndarray
  lengths: np.ndarray

  @property
  def counts(self) -> np.ndarray:
    """Number of errors per utterance, int64 (utterances,)."""
    return self.substitutions + self.deletions + self.insertions

  @property
  def rate(self) -> float:
    """Total errors divided by the total length; insertions may exceed 1."""
    return float(self.counts.sum() / self.lengths.sum())


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Errors:
  """Counts errors in words.

  Args:
    references: true text of each utterance.
    hypotheses: recognised text of each utterance.

  Returns:
    `Errors`; its rate is the word error rate.

  Raises:
    SettingsError: if jiwer is not installed, the numbers of texts differ, or
      all references are empty.
  """
  return _errors(references, hypotheses, 'words')


def character_errors(
  references: Sequence[str], hypotheses: Sequence[str]
) -> Errors:
  """Counts errors in characters, including spaces; see `word_errors`."""
  return _errors(references, hypotheses, 'characters')


def _errors(references, hypotheses, unit):
  jiwer = harness.load_extra('jiwer', 'asr', 'counting errors')
  references = [' '.join(text.split()) for text in references]
  hypotheses = [' '.join(text.split()) for text in hypotheses]
  if len(references) != len(hypotheses):
    raise harness.SettingsError(
      f'{len(references)} references and {len(hypotheses)} hypotheses: give as '
      'many of both.'
    )
  if not any(references):
    raise harness.SettingsError(
      'all references are empty, so that the error rate is undefined.'
    )
  process = {
    'words': jiwer.process_words,
    'characters': jiwer.process_characters,
  }
  output = process[unit](references, hypotheses)
  rows = np.zeros((len(references), 4), np.int64)
  kinds = {'substitute': 0, 'delete': 1, 'insert': 2}
  for row, chunks in zip(rows, output.alignments):
    for chunk in chunks:
      if chunk.type != 'equal':
        row[kinds[chunk.type]] += max(
          chunk.ref_end_idx - chunk.ref_start_idx,
          chunk.hyp_end_idx - chunk.hyp_start_idx,
        )
  split = str.split if unit == 'words' else list
  rows[:, 3] = [len(split(text)) for text in references]
  return Errors(*rows.T)
