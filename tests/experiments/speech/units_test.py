"""Units of text: there and back, what they do not know, and their files."""

import numpy as np
import pytest

from experiments import harness
from experiments.speech import units

TEXTS = [
  'the cat sat on the mat',
  'a cat and a hat',
  'the man ran to the cat',
  'that is what the cat said',
  'it is the hat of the man',
]


def make_units(kind, path):
  if kind == 'pieces':
    pytest.importorskip('sentencepiece')
  return units.load_or_make(path / 'units.json', kind, TEXTS, size=30)


@pytest.mark.parametrize('kind', units.KINDS)
def test_texts_become_labels_and_texts_again(tmp_path, kind):
  result = make_units(kind, tmp_path)
  assert result.size == len(result.symbols) == len(result.breaks)
  assert len(set(result.symbols)) == result.size
  for text in TEXTS:
    labels = result.encode(text)
    assert labels.dtype == np.int32
    assert labels.min() >= units.FIRST and labels.max() < result.size
    assert result.decode(labels) == text
    # A blank says nothing.
    assert result.decode([0, *labels, 0]) == text
    # Labels that end a word are as many as words, or spaces between them.
    ends = result.breaks[labels].sum()
    assert ends == len(text.split()) - (kind == 'characters')
  assert result.encode('').shape == (0,) and result.decode([]) == ''
  np.testing.assert_array_equal(
    result.encode('  the \n cat'), result.encode('the cat')
  )
  assert result.unknown(TEXTS) == {}
  # The file gives the same, and is what a second run takes.
  again = units.load(tmp_path / 'units.json')
  assert again.symbols == result.symbols and again.kind == kind
  loaded = units.load_or_make(tmp_path / 'units.json', kind, TEXTS[:1], size=99)
  assert loaded.symbols == result.symbols


def test_what_is_no_unit_is_named_and_counted(tmp_path):
  letters = make_units('characters', tmp_path)
  assert letters.unknown(['the z3z', 'z']) == {'z': 3, '3': 1}
  labels = letters.encode('zat')
  assert labels[0] == units.UNKNOWN and letters.decode(labels) == '⁇at'
  words = units.words(TEXTS)
  assert words.unknown(['the dog', 'dog cat']) == {'dog': 2}
  assert words.decode(words.encode('the dog sat')) == 'the ⁇ sat'
  pytest.importorskip('sentencepiece')
  pieces = units.pieces(TEXTS, size=30)
  assert pieces.unknown(['the z3z', 'cat']) == {'z': 2, '3': 1}
  labels = pieces.encode('the zat')
  assert units.UNKNOWN in labels and '⁇' in pieces.decode(labels)


def test_pieces_are_the_same_from_the_same_texts():
  pytest.importorskip('sentencepiece')
  one, two = (units.pieces(TEXTS, size=30) for _ in range(2))
  assert one.symbols == two.symbols
  assert one.size <= 30
  assert max(len(symbol) for symbol in one.symbols) > 2
  with pytest.raises(harness.SettingsError, match='5 units are fewer than'):
    units.pieces(TEXTS, size=5)


def test_files_of_units_say_what_is_wrong(tmp_path):
  path = tmp_path / 'units.json'
  with pytest.raises(harness.MissingDataError, match='does not exist'):
    units.load(path)
  make_units('words', tmp_path)
  with pytest.raises(harness.SettingsError, match='has words, not characters'):
    units.load_or_make(path, 'characters', TEXTS)
  with pytest.raises(harness.SettingsError, match="no units for 'zebra'"):
    units.load_or_make(path, 'words', [*TEXTS, 'the zebra'])
  with pytest.raises(harness.SettingsError, match="unknown units 'phones'"):
    units.load_or_make(path, 'phones', TEXTS)
  path.write_text(path.read_text().replace('cat', 'bat'))
  with pytest.raises(harness.DamagedDataError, match='digest'):
    units.load(path)
  # In the folder of a run they are made again.
  with pytest.warns(RuntimeWarning, match='made again'):
    again = units.load_or_make(path, 'words', TEXTS)
  assert again.symbols == make_units('words', tmp_path / 'other').symbols
  assert (tmp_path / 'damaged/units.json').exists()
