"""What is trained: a corpus as examples, units, a network, and its measures."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import harness
from experiments.speech import (
  corpora,
  decoding,
  feed,
  front_end,
  recogniser,
  scoring,
  units,
  utterances,
)

# What the published numbers are of.
PUBLISHED = ('LibriSpeech',)


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
  ready = front_end.with_deltas if given else (lambda samples: samples)
  front = front_end.FrontEnd(
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
    name: corpora.make_examples(part, known, prepare=ready, skips=skips)
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
