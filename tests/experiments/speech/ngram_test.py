"""Models of language: sums, closed forms, and files."""

import gzip
import math
import re

import pytest

from experiments import harness
from experiments.speech import archive, fusion, ngram, units
from tests.experiments.speech import counted, speech

ARPA = """A comment, with \\data\\ inside.

\\data\\
ngram 1=5
ngram 2=3
ngram 3=1

\\1-grams:
-99\t<s>\t-0.5
-0.6\t</s>
-1.2\t<unk>\t-0.1
-0.4\tGO\t-0.3
-0.9\tON\t-0.2

\\2-grams:
-0.2\t<s> GO\t-0.7
-0.3\tGO ON\t-0.05
-0.8\tON </s>

\\3-grams:
-0.11\t<s> GO ON

\\end\\
"""


def test_a_file_of_arpa_backs_off(tmp_path):
  path = tmp_path / 'model.arpa'
  path.write_text(ARPA)
  model = ngram.read_arpa(path)
  start, end = ngram.START, ngram.END
  for history, token, tens in (
    ((), 'go', -0.4),
    ((start,), 'go', -0.2),
    ((start, 'go'), 'on', -0.11),
    (('on', 'go'), 'on', -0.3),  # Nothing is left out: `on go` is not there.
    ((start, 'go'), 'go', -0.7 - 0.3 - 0.4),
    (('go', 'on'), 'go', -0.05 - 0.2 - 0.4),
    (('go', 'on'), end, -0.05 - 0.8),
    ((start,), 'stop', -0.5 - 1.2),
    (('stop',), 'go', -0.1 - 0.4),
    (('x', start, 'go'), 'on', -0.11),
  ):
    result = model.log_prob(history, token) / math.log(10)
    assert result == pytest.approx(tens, abs=1e-12), (history, token)
  assert model.log_prob((), start) == -math.inf
  packed = tmp_path / 'model.arpa.gz'
  packed.write_bytes(gzip.compress(ARPA.encode()))
  assert ngram.read_arpa(packed) == model
  as_is = ngram.read_arpa(path, lower=False)
  assert as_is.knows('GO') and not as_is.knows('go') and model.knows('go')
  # Without a token for unknown words, they get a ten-billionth.
  path.write_text(re.sub('-1.2\t<unk>.*\n', '', ARPA).replace('1=5', '1=4'))
  unknown = ngram.read_arpa(path).log_prob((start,), 'stop')
  assert unknown == pytest.approx(-10 * math.log(10))


@pytest.mark.parametrize(
  ('old', 'new', 'says'),
  [
    ('\\end\\', '', 'is truncated or not an ARPA file'),
    ('\\data\\\n', '\n', 'is truncated or not an ARPA file'),
    ('2=3', '2=4', 'announces 4 entries of 2 words, but has 3'),
    ('2=3', '2=x', "line 5: 'x' is not a whole number"),
    (
      '-0.3\tGO ON\t-0.05',
      '-0.3\tGO',
      'line 17: it has 2 parts; an entry of 2',
    ),
    ('-0.3\tGO', 'low\tGO', 'line 17: expected a number'),
    ('-0.3\tGO', 'nan\tGO', 'line 17: a logarithm is not finite'),
  ],
)
def test_a_file_of_arpa_says_what_is_wrong(tmp_path, old, new, says):
  path = tmp_path / 'model.arpa'
  path.write_text(ARPA.replace(old, new))
  with pytest.raises(harness.DamagedDataError, match=says):
    ngram.read_arpa(path)


def log_prob(model, labels):
  """Of a whole text, as a search asks a model."""
  state, total = model.start, 0.0
  for label in labels:
    total += model.log_probs(state)[label]
    state = model.follow(state, label)
  return total + model.end(state)


def test_a_text_has_one_probability_in_all_units(tmp_path):
  texts = ['go on', 'on', 'go', 'go on on']
  model = counted.learn(
    [t.split() for t in texts], order=2, vocabulary=['go', 'on']
  )
  kinds = [units.characters(texts), units.words(texts)]
  for text in ('go on on', 'on', 'go', ''):
    words = [ngram.START, *text.split(), ngram.END]
    expected = sum(
      model.log_prob(tuple(words[:i]), words[i]) for i in range(1, len(words))
    )
    for known in kinds:
      labels = known.encode(text)
      result = log_prob(fusion.WordModel(model, known), labels)
      assert result == pytest.approx(expected)
      more = log_prob(fusion.WordModel(model, known, bonus=0.5), labels)
      assert more - result == pytest.approx(0.5 * len(text.split()))


def test_a_word_that_is_not_known_pays_for_its_letters():
  known = units.characters(['go on'])
  model = counted.learn([['go', 'on']], order=2, vocabulary=[])
  word_model = fusion.WordModel(model, known)
  result = log_prob(word_model, known.encode('gonogo'))
  start = (ngram.START,)
  expected = model.log_prob(start, 'gonogo') - 6 * math.log(known.size)
  expected += model.log_prob(('gonogo',), ngram.END)
  assert result == pytest.approx(expected)
  assert result < log_prob(word_model, known.encode('go no go'))
  assert model.knows('go') and model.knows(ngram.END)
  assert not model.knows('gonogo')


def test_a_text_has_one_probability_in_pieces():
  pytest.importorskip('sentencepiece')
  texts = ['going on', 'gone on', 'on and on going']
  known = units.pieces(texts, size=14)
  model = counted.learn(
    [t.split() for t in texts], order=3, vocabulary=['going']
  )
  for text in texts:
    words = [ngram.START, *text.split(), ngram.END]
    expected = sum(
      model.log_prob(tuple(words[:i]), words[i]) for i in range(1, len(words))
    )
    result = log_prob(fusion.WordModel(model, known), known.encode(text))
    assert result == pytest.approx(expected)


def test_the_model_that_an4_ships(tmp_path):
  _, result = archive.read(
    speech.data_folder(),
    folder='an4',
    archive='an4_mfcc.tar.gz',
    wanted=lambda name: name == 'etc/an4.ug.lm',
    folders=('speech',),
    advice='none',
  )
  path = tmp_path / 'an4.ug.lm'
  path.write_bytes(result['etc/an4.ug.lm'])
  model = ngram.read_arpa(path)
  assert model.order == 2
  result = model.log_prob(('yes',), 'zero') / math.log(10)
  assert result == pytest.approx(-2.0253)
  words = [w for (w, *more) in model.table if not more and w[0] != '<']
  total = sum(math.exp(model.log_prob((), w)) for w in words)
  assert total == pytest.approx(1, abs=0.02)
