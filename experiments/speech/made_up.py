"""Artificial speech without data: each word is a tone."""

import functools

import numpy as np

from experiments.speech import utterances

RATE = 8_000
_WORDS = {'low': 300.0, 'middle': 800.0, 'high': 1_900.0, 'top': 3_100.0}


def read(
  *, train: int, test: int, labelled: float = 1.0, seed: int = 0
) -> utterances.Corpus:
  """Makes strings of two to four tones in noise.

  Args:
    train: number of training strings.
    test: number of validation strings, and of test strings.
    labelled: fraction of the training strings with a text.
    seed: seed of the strings.

  Returns:
    The corpus.
  """
  sizes = {'train': train, 'validation': test, 'test': test}
  parts = {
    name: tuple(_utterance(f'{name}-{i:04d}', seed) for i in range(size))
    for name, size in sizes.items()
  }
  corpus = utterances.Corpus(
    **parts,
    rate=RATE,
    frame_rate=None,
    numbers=None,
    skipped={},
    source=utterances.source(
      'made-up tones', list(parts.values()), otherwise='made-up tones'
    ),
  )
  return utterances.hide_texts(corpus, labelled, seed=seed)


def _utterance(name: str, seed: int) -> utterances.Utterance:
  seed = int(utterances.order(name, seed), 16)
  samples, text = _tones(seed)
  load = functools.partial(_load, seed)
  seconds = len(samples) / RATE
  return utterances.Utterance(name, text, '', len(samples), seconds, load)


def _load(seed):
  return _tones(seed)[0], RATE


def _tones(seed):
  rng = np.random.default_rng(seed)
  words = rng.choice(list(_WORDS), rng.integers(2, 5))
  pieces = []
  for word in words:
    count = int(rng.uniform(0.12, 0.25) * RATE)
    time = np.arange(count) / RATE
    tone = np.sin(2 * np.pi * _WORDS[word] * rng.uniform(0.95, 1.05) * time)
    pieces += [0.3 * tone * np.hanning(count), np.zeros(RATE // 25)]
  clean = np.concatenate(pieces)
  noisy = clean + 0.01 * rng.standard_normal(len(clean))
  return noisy.astype(np.float32), ' '.join(words)
