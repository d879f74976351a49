"""Speech corpora by name, and their utterances as examples."""

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

# Audio below this many bytes is kept in memory; more is read as needed.
_KEPT = 2**30
# Data sets whose parts can be named.
PARTS = {
  'librispeech': ('train', 'unlabelled', 'validation', 'test'),
  'tedlium': ('train', 'validation', 'test'),
}


@dataclasses.dataclass(frozen=True)
class Data:
  """What is read.

  Attributes:
    dataset: which loader.
    sampling: samples a second, resampled to; 0 for the loader's own.
    train_part: of LibriSpeech or TED-LIUM, to learn from, several joined by a
      comma; '' for the loader's own, here and in the other parts.
    unlabelled_part: of LibriSpeech, to learn from without its transcripts.
    validation_part: to choose with.
    test_part: to report on.
    strings: of digits or tones, to learn from.
    test_strings: of digits or tones, to report on.
    held_speaker: of the digits, one who is reported apart; '' for none.
    labelled: share of the training utterances that have a text; several are
      runs of their own.
    data_seed: of strings and of what keeps its text.
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
    """The parts that are named."""
    parts = {
      name: getattr(self, f'{name}_part') for name in PARTS['librispeech']
    }
    return {name: part for name, part in parts.items() if part}

  def check(self) -> None:
    """Raises SettingsError for settings that do not go together."""
    if len(set(self.labelled)) < len(self.labelled):
      shares = ','.join(f'{share:g}' for share in self.labelled)
      raise harness.SettingsError(f'labelled={shares} has a share twice.')
    if self.sampling and self.dataset in ('an4', 'made_up'):
      raise harness.SettingsError(
        f'sampling={self.sampling}: {self.dataset} has no audio that could be '
        'resampled; leave it out.'
      )
    known = PARTS.get(self.dataset, ())
    if others := [name for name in self.parts() if name not in known]:
      raise harness.SettingsError(
        f'{self.dataset} has no such part to name: leave out '
        f'--{others[0]}_part.'
      )

  def read(self, data_dir: str | None, labelled: float) -> utterances.Corpus:
    """Reads the corpus, and leaves a share of its training texts."""
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
  """Utterances as examples.

  Args:
    items: the utterances.
    known: units of their texts.
    prepare: samples or frames -> what is trained on.
    skips: gets those whose audio is broken, where all are read at once; of
      more than that, they are left out of batches when they are met.

  Returns:
    Examples; audio is kept in memory if it is little.
  """
  if sum(u.length for u in items) * 4 < _KEPT:
    both = list(utterances.loaded(items, skips))
    items = [utterance for utterance, _ in both]
    arrays = [prepare(np.asarray(x, np.float32)) for _, x in both]
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
