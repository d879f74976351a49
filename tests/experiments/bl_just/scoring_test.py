"""Error rates against edit distances by hand, and intervals that cover."""

import functools

import numpy as np
import pytest

from experiments import harness
from experiments.bl_just import picture, scoring, units

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
  found = ['', 'c d a', *(draw() for _ in range(40))]
  words = scoring.word_errors(references, found)
  pairs = list(zip(references, found))
  expected = [distance(r.split(), f.split()) for r, f in pairs]
  assert words.counts.tolist() == expected
  assert words.lengths.tolist() == [len(r.split()) for r in references]
  assert words.rate == sum(expected) / sum(len(r.split()) for r in references)
  assert words.deletions[0] == 2 and words.insertions[1] == 3
  assert words.lengths[1] == 0
  letters = scoring.character_errors(references, found)
  assert letters.counts.tolist() == [distance(r, f) for r, f in pairs]
  assert letters.lengths.tolist() == [len(r) for r in references]


def test_errors_say_what_is_wrong():
  with pytest.raises(harness.SettingsError, match=r'2 texts .* and 1 that'):
    scoring.word_errors(['a', 'b'], ['a'])
  with pytest.raises(harness.SettingsError, match='nothing is said'):
    scoring.word_errors(['', ' '], ['a', 'b'])
  for shapes in (((2, 3), (2, 4), 3), ((2, 3), (2, 3), 4)):
    with pytest.raises(harness.SettingsError, match=r'of .seeds, utterances.'):
      scoring.paired_bootstrap(
        np.ones(shapes[0]), np.ones(shapes[1]), np.ones(shapes[2])
      )


def test_an_interval_of_no_spread_is_a_point():
  lengths = np.array([4, 4, 4])
  found = scoring.paired_bootstrap(
    np.full((2, 3), 1), np.full((2, 3), 2), lengths, draws=50
  )
  assert found == scoring.Difference(-0.25, -0.25, -0.25, 1.0)
  one = scoring.paired_bootstrap([1, 2, 3], [1, 2, 3], lengths, draws=50)
  assert one[:3] == (0, 0, 0)


def test_an_interval_has_the_spread_of_utterances_and_of_seeds():
  rng = np.random.default_rng(1)
  seeds, count = 12, 150
  lengths = np.full(count, 10)
  others = rng.poisson(3, (seeds, count))
  # The spread of a mean over utterances, from their variance.
  errors = others + rng.normal(0, 2, count)
  found = scoring.paired_bootstrap(errors, others, lengths, draws=2_000)
  spread = np.std((errors - others)[0]) / np.sqrt(count) / 10
  assert found.low < found.mean < found.high
  assert (found.high - found.low) / (2 * 1.96) == pytest.approx(spread, rel=0.1)
  # And of one over seeds.
  shifts = rng.normal(0, 2, (seeds, 1))
  found = scoring.paired_bootstrap(
    others + shifts, others, lengths, draws=2_000
  )
  spread = np.std(shifts) / np.sqrt(seeds) / 10
  assert (found.high - found.low) / (2 * 1.96) == pytest.approx(spread, rel=0.1)
  again = scoring.paired_bootstrap(
    others + shifts, others, lengths, draws=2_000
  )
  assert again == found


def test_a_draw_without_words_is_drawn_again():
  lengths = np.array([0, 5])
  found = scoring.paired_bootstrap([1, 2], [0, 0], lengths, draws=200)
  assert np.isfinite(found).all() and found.mean == pytest.approx(3 / 5)


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
