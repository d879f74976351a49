"""The speech problem: a corpus as examples, units, a network, error rates."""

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

# Data sets of the published numbers.
PUBLISHED = ('LibriSpeech',)


class Problem(NamedTuple):
  """Data and network of all methods.

  Attributes:
    corpus: the corpus, without unusable utterances.
    units: units of the texts.
    network: the recogniser.
    training: settings of its losses.
    examples: examples by set: train, validation, test and more.
    edges: edges of the length buckets.
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
    settings: settings of the run, `presets.Settings`.
    data_dir: folder of data sets.
    workdir: folder of the run, for the file of units.
    labelled: fraction of the training utterances with a text.

  Returns:
    The problem.

  Raises:
    MissingDataError, DamagedDataError, SettingsError: see the loaders.
  """
  corpus, sizes = settings.data.read(data_dir, labelled), settings.network
  if not utterances.texts(corpus.train):
    raise harness.SettingsError(
      f'labelled={labelled:g} leaves no utterance with a text: increase it.'
    )
  known = units.load_or_make(
    workdir / 'units.json',
    sizes.units,
    utterances.texts(corpus.train),
    size=sizes.vocab_size,
  )
  has_features = corpus.rate is None
  prepare_input = front_end.with_deltas if has_features else lambda x: x
  front = front_end.FrontEnd(
    rate=corpus.rate,
    numbers=3 * corpus.numbers if has_features else sizes.mels,
    hop=1 / corpus.frame_rate if has_features else 0.01,
  )
  network = recogniser.Recogniser(
    recogniser.Shape(
      kind=sizes.encoder,
      width=sizes.width,
      depth=sizes.depth,
      strides=sizes.strides,
      size=sizes.kernel,
      heads=sizes.heads,
      causal=settings.ssl.causal,
      units=known.size,
      front=front,
    )
  )
  corpus = utterances.drop_unusable(corpus, known, network.shape.frames_out)
  parts = {
    'train': corpus.train,
    'validation': corpus.validation,
    'test': corpus.test,
    **corpus.more,
  }
  skips = utterances.Skips(corpus.skipped)
  examples = {
    name: corpora.make_examples(part, known, prepare=prepare_input, skips=skips)
    for name, part in parts.items()
  }
  corpus = corpus._replace(skipped=skips.by_reason())
  train = examples['train']
  multiple = 1 if has_features else front.samples[1]
  edges = feed.bucket_edges(train.lengths, settings.training.buckets, multiple)
  labelled = np.flatnonzero([text is not None for text in train.texts])
  training = recogniser.Training(settings.ssl, settings.masks, sizes.dropout)
  return Problem(corpus, known, network, training, examples, edges, labelled)


def recognise(
  problem: Problem, weights: Any, part: str, rows: Sequence[int]
) -> list[str]:
  """Recognises the text of each row by greedy decoding."""
  texts = {}
  for row, log_probs in recogniser.log_probabilities(
    problem.network,
    weights,
    problem.examples[part],
    rows,
    edges=problem.edges,
  ):
    texts[row] = problem.units.decode(
      decoding.collapse(np.argmax(log_probs, axis=-1))
    )
  return [texts[int(row)] for row in rows]


def errors(
  problem: Problem, params: Any, part: str, rows: Sequence[int] | None = None
) -> dict[str, list[scoring.Errors]]:
  """Counts errors in words and in characters for all members.

  Args:
    problem: the problem.
    params: weights with a leading axis of members.
    part: name of the set.
    rows: rows of the set; by default all.

  Returns:
    `scoring.Errors` of each member, by 'words' and 'characters'.
  """
  texts = problem.examples[part].texts
  rows = np.arange(len(texts)) if rows is None else np.asarray(rows)
  references = [texts[row] for row in rows]
  result: dict[str, list[scoring.Errors]] = {'words': [], 'characters': []}
  for member in range(len(jax.tree.leaves(params)[0])):
    weights = jax.tree.map(operator.itemgetter(member), params)
    hypotheses = recognise(problem, weights, part, rows)
    result['words'].append(scoring.word_errors(references, hypotheses))
    result['characters'].append(
      scoring.character_errors(references, hypotheses)
    )
  return result
