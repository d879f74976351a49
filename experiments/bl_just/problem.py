"""What is trained: a corpus as examples, units, a network, and its measures."""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np

from experiments import harness
from experiments.bl_just import (
  an4,
  decoding,
  feed,
  folder,
  fsdd,
  librispeech,
  made_up,
  recogniser,
  scoring,
  tedlium,
  units,
  utterances,
)

# Bytes of audio that are kept in memory rather than read again and again.
_KEPT = 2**30
# What the published numbers are of.
PUBLISHED = ('LibriSpeech',)


# Of which data sets parts can be named.
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
    """The corpus, of which a share has a text; see `prepare`."""
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


class Problem(NamedTuple):
  """What all methods share.

  Attributes:
    corpus: what was read, without what cannot be learnt from.
    units: of the texts.
    network: the recogniser.
    training: its losses' settings.
    examples: by part: train, validation, test and more.
    edges: of the length buckets.
    labelled: training rows with a text.
  """

  corpus: utterances.Corpus
  units: units.Units
  network: recogniser.Recogniser
  training: recogniser.Training
  examples: dict[str, feed.Examples]
  edges: tuple[int, ...]
  labelled: np.ndarray


def examples_of(
  found: Sequence[utterances.Utterance],
  known: units.Units,
  *,
  prepare: Any,
  skips: utterances.Skips,
) -> feed.Examples:
  """Utterances as examples.

  Args:
    found: the utterances.
    known: units of their texts.
    prepare: samples or frames -> what is trained on.
    skips: gets those whose audio is broken, where all are read at once; of
      more than that, they are left out of batches when they are met.

  Returns:
    Examples; audio is kept in memory if it is little.
  """
  if sum(u.length for u in found) * 4 < _KEPT:
    both = list(utterances.loaded(found, skips))
    found = [utterance for utterance, _ in both]
    arrays = [prepare(np.asarray(x, np.float32)) for _, x in both]
    load, parts = arrays.__getitem__, ()
  else:
    parts = [u.part for u in found if u.part is not None]
    parts = parts if len(parts) == len(found) else ()
    load = lambda row: prepare(np.asarray(found[row].load()[0], np.float32))
  nothing = np.zeros(0, np.int32)
  return feed.Examples(
    load=load,
    lengths=np.array([u.length for u in found], np.int64),
    labels=[nothing if u.text is None else known.encode(u.text) for u in found],
    names=[u.name for u in found],
    texts=[u.text for u in found],
    parts=parts,
  )


def with_deltas(features: np.ndarray) -> np.ndarray:
  """Given features with their slopes and the slopes of these, 3 n numbers."""
  slope = lambda x: np.gradient(x, axis=0) if len(x) > 1 else np.zeros_like(x)
  first = slope(features)
  parts = [features, first, slope(first)]
  return np.concatenate(parts, axis=1).astype(np.float32)


def prepare(
  settings: Any, data_dir: str | None, workdir: Any, labelled: float
) -> Problem:
  """Reads the data and makes the network.

  Args:
    settings: see `presets.Settings`.
    data_dir: folder of data sets.
    workdir: where units are kept.
    labelled: share of the training utterances that have a text.

  Returns:
    The problem.

  Raises:
    MissingDataError, DamagedDataError, SettingsError: see the loaders.
  """
  corpus, sizes = settings.data.read(data_dir, labelled), settings.network
  if not utterances.texts(corpus.train):
    raise harness.SettingsError(
      f'labelled={labelled:g} leaves no utterance with a text: give more.'
    )
  known = units.kept(
    workdir / 'units.json',
    sizes.units,
    utterances.texts(corpus.train),
    size=sizes.vocab_size,
  )
  given = corpus.rate is None
  ready = with_deltas if given else (lambda samples: samples)
  front = recogniser.front_end.FrontEnd(
    rate=corpus.rate,
    numbers=3 * corpus.numbers if given else sizes.mels,
    hop=1 / corpus.frame_rate if given else 0.01,
  )
  network = recogniser.Recogniser(
    recogniser.Shape(
      kind=sizes.encoder,
      width=sizes.width,
      depth=sizes.depth,
      strides=sizes.strides,
      size=sizes.kernel,
      heads=sizes.heads,
      causal=settings.ssl.ssl_loss == 'cpc',
      units=known.size,
      front=front,
    )
  )
  corpus = utterances.usable(corpus, known, network.shape.frames_out)
  parts = {
    'train': corpus.train,
    'validation': corpus.validation,
    'test': corpus.test,
    **corpus.more,
  }
  skips = utterances.Skips(corpus.skipped)
  examples = {
    name: examples_of(part, known, prepare=ready, skips=skips)
    for name, part in parts.items()
  }
  corpus = corpus._replace(skipped=skips.found())
  train = examples['train']
  multiple = 1 if given else front.samples[1]
  edges = feed.edges_of(train.lengths, settings.training.buckets, multiple)
  labelled = np.flatnonzero([text is not None for text in train.texts])
  training = recogniser.Training(
    settings.ssl.task(), settings.masks.augmentation(), sizes.dropout
  )
  return Problem(corpus, known, network, training, examples, edges, labelled)


def understood(
  problem: Problem, weights: Any, part: str, rows: Sequence[int]
) -> list[str]:
  """What a network makes of utterances, greedily; a text a row."""
  found = {}
  for row, log_probs in recogniser.log_probabilities(
    problem.network,
    weights,
    problem.examples[part],
    rows,
    edges=problem.edges,
  ):
    found[row] = problem.units.decode(
      decoding.collapse(np.argmax(log_probs, axis=-1))
    )
  return [found[int(row)] for row in rows]


def errors(
  problem: Problem, params: Any, part: str, rows: Sequence[int] | None = None
) -> dict[str, list[scoring.Errors]]:
  """Errors in words and in characters of all members.

  Args:
    problem: the problem.
    params: weights with a leading axis of members.
    part: of the corpus.
    rows: of it; by default all.

  Returns:
    By 'words' and 'characters', `scoring.Errors` of each member.
  """
  texts = problem.examples[part].texts
  rows = np.arange(len(texts)) if rows is None else np.asarray(rows)
  said = [texts[row] for row in rows]
  found: dict[str, list[scoring.Errors]] = {'words': [], 'characters': []}
  for member in range(len(jax.tree.leaves(params)[0])):
    weights = jax.tree.map(operator.itemgetter(member), params)
    texts_found = understood(problem, weights, part, rows)
    found['words'].append(scoring.word_errors(said, texts_found))
    found['characters'].append(scoring.character_errors(said, texts_found))
  return found
