"""Speech corpora by name, and training examples from their utterances."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np

from experiments import harness
from experiments.speech import (
  an4,
  feed,
  folder,
  fsdd,
  librispeech,
  made_up,
  tedlium,
  units,
  utterances,
)

# A corpus below this many bytes is kept in memory; others are read as needed.
_MAX_IN_MEMORY = 2**30
# Data sets whose parts are selected by name.
PARTS = {
  'librispeech': ('train', 'unlabelled', 'validation', 'test'),
  'tedlium': ('train', 'validation', 'test'),
}


@dataclasses.dataclass(frozen=True)
class Data:
  """Settings of the data.

  Attributes:
    dataset: name of the data set.
    sampling: sampling rate to resample to, hertz; 0 is the data set's default.
    train_part: training parts of LibriSpeech or TED-LIUM, joined by commas; ''
      is the data set's default, also for the other parts.
    unlabelled_part: LibriSpeech parts to train on without their transcripts.
    validation_part: parts for validation.
    test_part: parts for the test.
    strings: training strings of digits or tones.
    test_strings: test strings of digits or tones.
    held_speaker: digits speaker who is excluded from training and reported
      separately; '' for no speaker.
    labelled: fraction of the training utterances with a text; several values
      give several runs.
    data_seed: seed of the strings and of the choice of texts.
  """

  dataset: Literal[
    'fsdd', 'made_up', 'an4', 'librispeech', 'tedlium', 'folder'
  ] = 'fsdd'
  sampling: Annotated[int, harness.Allowed(0)] = 0
  train_part: str = ''
  unlabelled_part: str = ''
  validation_part: str = ''
  test_part: str = ''
  strings: int = 1_000
  test_strings: int = 300
  held_speaker: str = ''
  labelled: Annotated[tuple[float, ...], harness.Allowed(0, 1)] = (0.25,)
  data_seed: Annotated[int, harness.Allowed(0)] = 0

  def parts(self) -> dict[str, str]:
    """Returns the parts that are set, by name."""
    parts = {
      name: getattr(self, f'{name}_part') for name in PARTS['librispeech']
    }
    return {name: part for name, part in parts.items() if part}

  def check(self) -> None:
    """Raises SettingsError for incompatible settings."""
    if len(set(self.labelled)) < len(self.labelled):
      fractions = ','.join(f'{fraction:g}' for fraction in self.labelled)
      raise harness.SettingsError(f'labelled={fractions} has a duplicate.')
    if self.sampling and self.dataset in ('an4', 'made_up'):
      raise harness.SettingsError(
        f'sampling={self.sampling}: {self.dataset} has no audio to resample; '
        'remove the flag.'
      )
    known = PARTS.get(self.dataset, ())
    if unknown := [name for name in self.parts() if name not in known]:
      raise harness.SettingsError(
        f'{self.dataset} has no part to select by --{unknown[0]}_part: remove '
        'the flag.'
      )

  def read(self, data_dir: str | None, labelled: float) -> utterances.Corpus:
    """Reads the corpus and keeps a fraction of its training texts."""
    seed = self.data_seed
    rate = {'rate': self.sampling} if self.sampling else {}
    sizes = {
      'train': self.strings,
      'test': self.test_strings,
      'labelled': labelled,
      'seed': seed,
    }
    if self.dataset == 'made_up':
      return made_up.read(**sizes)
    if self.dataset == 'fsdd':
      return fsdd.read(
        data_dir, held_speaker=self.held_speaker, **sizes, **rate
      )
    parts = self.parts()
    corpus = {
      'an4': functools.partial(an4.read, seed=seed),
      'librispeech': functools.partial(librispeech.read, **rate, **parts),
      'tedlium': functools.partial(tedlium.read, **rate, **parts),
      'folder': functools.partial(folder.read, seed=seed, **rate),
    }[self.dataset](data_dir)
    return utterances.hide_texts(corpus, labelled, seed=seed)


def make_examples(
  items: Sequence[utterances.Utterance],
  known: units.Units,
  *,
  prepare: Any,
  skips: utterances.Skips,
) -> feed.Examples:
  """Makes training examples from utterances.

  Args:
    items: the utterances.
    known: units of their texts.
    prepare: samples or frames -> inputs of the front end.
    skips: collects utterances with broken audio if the corpus fits into memory.
      Otherwise, `feed.Feed` replaces them when it reads them.

  Returns:
    Examples, with the audio in memory if the corpus is small.
  """
  if sum(u.length for u in items) * 4 < _MAX_IN_MEMORY:
    readable = list(utterances.load_readable(items, skips))
    items = [utterance for utterance, _ in readable]
    arrays = [prepare(np.asarray(x, np.float32)) for _, x in readable]
    load, parts = arrays.__getitem__, ()
  else:
    parts = [u.part for u in items if u.part is not None]
    parts = parts if len(parts) == len(items) else ()
    load = lambda row: prepare(np.asarray(items[row].load()[0], np.float32))
  nothing = np.zeros(0, np.int32)
  return feed.Examples(
    load=load,
    lengths=np.array([u.length for u in items], np.int64),
    labels=[nothing if u.text is None else known.encode(u.text) for u in items],
    names=[u.name for u in items],
    texts=[u.text for u in items],
    parts=parts,
  )
