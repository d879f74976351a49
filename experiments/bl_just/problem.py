"""What is trained: a corpus as examples, units, a network, and its measures."""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

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


def parts_of(settings: Any) -> dict[str, str]:
  """The parts that the settings name."""
  found = {
    name: getattr(settings, f'{name}_part') for name in PARTS['librispeech']
  }
  return {name: part for name, part in found.items() if part}


def read(
  settings: Any, data_dir: str | None, labelled: float
) -> utterances.Corpus:
  """The corpus of the settings, of which a share has a text; see `prepare`."""
  seed = settings.data_seed
  rate = {'rate': settings.sampling} if settings.sampling else {}
  parts = parts_of(settings)
  if settings.dataset == 'made_up':
    return made_up.read(
      train=settings.strings,
      test=settings.test_strings,
      labelled=labelled,
      seed=seed,
    )
  if settings.dataset == 'fsdd':
    return fsdd.read(
      data_dir,
      train=settings.strings,
      test=settings.test_strings,
      labelled=labelled,
      held_speaker=settings.held_speaker,
      seed=seed,
      **rate,
    )
  corpus = {
    'an4': functools.partial(an4.read, seed=seed),
    'librispeech': functools.partial(librispeech.read, **rate, **parts),
    'tedlium': functools.partial(tedlium.read, **rate, **parts),
    'folder': functools.partial(folder.read, seed=seed, **rate),
  }[settings.dataset](data_dir)
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
    settings: see `train.Settings`.
    data_dir: folder of data sets.
    workdir: where units are kept.
    labelled: share of the training utterances that have a text.

  Returns:
    The problem.

  Raises:
    MissingDataError, DamagedDataError, SettingsError: see the loaders.
  """
  corpus = read(settings, data_dir, labelled)
  if not utterances.texts(corpus.train):
    raise harness.SettingsError(
      f'labelled={labelled:g} leaves no utterance with a text: give more.'
    )
  known = units.kept(
    workdir / 'units.json',
    settings.units,
    utterances.texts(corpus.train),
    size=settings.pieces,
  )
  given = corpus.rate is None
  ready = with_deltas if given else (lambda samples: samples)
  front = recogniser.front_end.FrontEnd(
    rate=corpus.rate,
    numbers=3 * corpus.numbers if given else settings.mels,
    hop=1 / corpus.frame_rate if given else 0.01,
  )
  network = recogniser.Recogniser(
    recogniser.Shape(
      kind=settings.encoder,
      width=settings.width,
      depth=settings.depth,
      strides=settings.strides,
      size=settings.kernel,
      heads=settings.heads,
      causal=settings.task == 'cpc',
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
  edges = feed.edges_of(train.lengths, settings.buckets, multiple)
  labelled = np.flatnonzero([text is not None for text in train.texts])
  task = recogniser.objectives.Task(
    settings.task,
    probability=settings.hidden,
    span=settings.span,
    negatives=settings.negatives,
    ahead=settings.ahead,
    codes=settings.codes,
  )
  training = recogniser.Training(
    task,
    recogniser.front_end.Augmentation(
      settings.time_stripes,
      settings.longest_stripe,
      settings.band_stripes,
      settings.widest_stripe,
    ),
    settings.dropout,
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
