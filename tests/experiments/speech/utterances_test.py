"""Tests corpora: skipped utterances, hidden texts, frames of a path."""

import pathlib

import numpy as np
import pytest

from experiments import harness
from experiments.bl_just import train
from experiments.speech import folder, units, utterances


def make_corpus(texts, length=10):
  """A corpus of these training texts."""
  make = lambda name, text: utterances.Utterance(
    name, text, '', length, length / 100, lambda: (np.zeros((length, 1)), None)
  )
  train = tuple(make(f'u{i}', text) for i, text in enumerate(texts))
  rest = (make('other', 'a long text of many labels'),)
  source = utterances.source('made up', [train], otherwise='made up')
  return utterances.Corpus(train, rest, rest, None, 100.0, 1, {}, source)


def test_documents_name_the_file_that_is_read():
  readme = pathlib.Path(train.__file__).with_name('README.md').read_text()
  for text in (readme, train.__doc__):
    assert f'a file `{folder.TABLE}`' in ' '.join(text.split())


def test_skipped_utterances_are_listed():
  skipped = {'cut short': ('a', 'b'), 'empty text': tuple('cdefg')}
  corpus = make_corpus(['abc'])
  assert utterances.describe_skipped(corpus) == []
  assert utterances.describe_skipped(corpus._replace(skipped=skipped)) == [
    'cut short: a, b',
    'empty text: c, d, e and 2 more',
  ]


def test_unusable_utterances_are_dropped():
  known = units.characters(['abc de'])
  corpus = make_corpus(['abc', 'aabb', 'abcde', 'aab', '', None, 'abx', ' '])
  corpus = corpus._replace(
    validation=corpus.train[:1], skipped={'cut short': ('u9',)}
  )
  # Ten input frames give five frames: aabb needs two blanks.
  usable = utterances.drop_unusable(corpus, known, lambda length: length // 2)
  assert [u.name for u in usable.train] == ['u0', 'u2', 'u3', 'u5']
  assert usable.skipped == {
    'cut short': ('u9',),
    'more labels than frames': ('u1',),
    'empty text': ('u4', 'u7'),
    'symbols outside the units': ('u6',),
  }
  # The test set stays complete, so that its errors are counted.
  assert usable.test == corpus.test
  with pytest.raises(
    harness.DamagedDataError, match=r'part train .* 8 shorter than a frame'
  ):
    utterances.drop_unusable(corpus, known, lambda length: 0, parts=('train',))


def test_frames_needed_is_what_the_loss_needs():
  import jax.numpy as jnp
  import optax

  labels = np.array([[1, 1, 2, 2]], np.int32)
  assert utterances.frames_needed(labels[0]) == 6
  for frames, fine in ((6, True), (5, False)):
    loss = optax.losses.ctc_loss(
      jnp.zeros((1, frames, 3)),
      jnp.zeros((1, frames)),
      jnp.array(labels),
      jnp.zeros((1, 4)),
    )
    assert (float(loss[0]) < 1e3) == fine


def test_texts_of_a_fraction_are_among_those_of_a_larger_one():
  corpus = make_corpus([f'word {i}' for i in range(30)])
  labelled = []
  for fraction in (0.0, 0.1, 0.5, 1.0):
    train = utterances.hide_texts(corpus, fraction, seed=3).train
    assert [u.name for u in train] == [u.name for u in corpus.train]
    labelled.append({u.name for u in train if u.text is not None})
  assert [len(names) for names in labelled] == [0, 3, 15, 30]
  assert labelled[1] < labelled[2]
  other = utterances.hide_texts(corpus, 0.5, seed=4).train
  assert {u.name for u in other if u.text is not None} != labelled[2]
  with pytest.raises(harness.SettingsError, match='within 0 and 1, got 2'):
    utterances.hide_texts(corpus, 2, seed=0)
