"""Error rates against edit distances by hand, and intervals that cover."""

import functools

import numpy as np
import pytest

from experiments import harness
from experiments.speech import picture, scoring, units

pytest.importorskip('jiwer')


def distance(one, two):
  """The least edits that turn a sequence into another."""

  @functools.cache
  def of(i, j):
    if not i or not j:
      return i + j
    same = one[i - 1] == two[j - 1]
    return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + 1 - same)

  return of(len(one), len(two))


def test_errors_are_edit_distances():
  rng = np.random.default_rng(0)
  draw = lambda: ' '.join(rng.choice(list('abcd'), rng.integers(0, 7)))
  references = ['a b', '', *(draw() for _ in range(40))]
  hypotheses = ['', 'c d a', *(draw() for _ in range(40))]
  words = scoring.word_errors(references, hypotheses)
  pairs = list(zip(references, hypotheses))
  expected = [distance(r.split(), f.split()) for r, f in pairs]
  assert words.counts.tolist() == expected
  assert words.lengths.tolist() == [len(r.split()) for r in references]
  assert words.rate == sum(expected) / sum(len(r.split()) for r in references)
  assert words.deletions[0] == 2 and words.insertions[1] == 3
  assert words.lengths[1] == 0
  letters = scoring.character_errors(references, hypotheses)
  assert letters.counts.tolist() == [distance(r, f) for r, f in pairs]
  assert letters.lengths.tolist() == [len(r) for r in references]


def test_errors_say_what_is_wrong():
  with pytest.raises(harness.SettingsError, match='2 references and 1 hyp'):
    scoring.word_errors(['a', 'b'], ['a'])
  with pytest.raises(harness.SettingsError, match='references are empty'):
    scoring.word_errors(['', ' '], ['a', 'b'])


def test_a_picture_is_drawn(tmp_path):
  import PIL.Image

  known = units.characters(['a b'])
  log_probs = np.log(np.full((20, known.size), 1 / known.size))
  spectrum = np.random.default_rng(0).normal(size=(80, 16))
  path = picture.draw(
    tmp_path / 'heard.png',
    spectrum,
    log_probs,
    known.encode('a ba'),
    known.symbols,
    seconds=0.8,
    title='a ba',
  )
  with PIL.Image.open(path) as image:
    image.load()
    assert image.format == 'PNG' and min(image.size) > 300
    assert len(image.convert('RGB').getcolors(2**20)) > 100
  with pytest.raises(harness.DamagedDataError, match='30 labels need'):
    picture.draw(path, spectrum, log_probs, [2] * 30, known.symbols, seconds=1)
