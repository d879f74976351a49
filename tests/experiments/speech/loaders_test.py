"""Tests loaders on small folders in the layouts of data sets, and on AN4."""

import pickle
import struct
import tarfile

import numpy as np
import pytest

from experiments import harness
from experiments.speech import (
  an4,
  folder,
  librispeech,
  tedlium,
  units,
  utterances,
)
from tests.experiments.speech import speech

pytest.importorskip('soundfile')


# AN4


def mfc(frames, *, numbers=13, announced=None):
  values = np.arange(frames * numbers, dtype='>f4')
  count = len(values) if announced is None else announced
  return struct.pack('>i', count) + values.tobytes()


def an4_folder(path):
  """Five speakers of two utterances for training, one of two for the test."""
  for part, people in (('train', 'abcde'), ('test', 'z')):
    lists, texts = [], []
    for person in people:
      for i in range(2):
        name = f'an{i}-{person}-b'
        place = f'an4{part}/{person}/{name}'
        speech.put(path / f'an4/feat/{place}.mfc', mfc(20 + i))
        lists.append(place)
        marks = ('<s> ', ' </s>') if i else ('', '')
        texts.append(f'{marks[0]}YES  GO{marks[1]} ({name})')
    speech.put(path / f'an4/etc/an4_{part}.fileids', '\n'.join(lists) + '\n')
    speech.put(
      path / f'an4/etc/an4_{part}.transcription', '\n'.join(texts) + '\n'
    )
  return path


def test_an4_holds_speakers_out(tmp_path):
  corpus = an4.read(an4_folder(tmp_path), validation_speakers=2)
  assert [len(p) for p in corpus[:3]] == [6, 4, 2]
  assert not {u.speaker for u in corpus.train} & {
    u.speaker for u in corpus.validation
  }
  assert {u.text for p in corpus[:3] for u in p} == {'yes go'}
  assert (corpus.rate, corpus.frame_rate, corpus.numbers) == (None, 100, 13)
  speech.check_loads(corpus.train)
  features, rate = corpus.train[0].load()
  assert rate is None
  np.testing.assert_array_equal(features, np.arange(260).reshape(20, 13))
  assert not corpus.skipped
  assert corpus.source.name == 'speech in the layout of AN4'
  # Straight from the archive it is the same.
  (tmp_path / 'other').mkdir()
  with tarfile.open(tmp_path / 'other/an4_mfcc.tar.gz', 'w:gz') as archive:
    archive.add(tmp_path / 'an4', 'an4')
  packed = an4.read(tmp_path / 'other', validation_speakers=2)
  assert packed.source.digest == corpus.source.digest
  assert [u.name for u in packed.validation] == [
    u.name for u in corpus.validation
  ]
  assert len(repr(packed.train[0])) < 200
  again = pickle.loads(pickle.dumps(packed.train[0]))  # noqa: S301
  np.testing.assert_array_equal(again.load()[0], features)


def test_an4_counts_what_is_broken(tmp_path):
  an4_folder(tmp_path)
  feat = tmp_path / 'an4/feat'
  speech.put(feat / 'an4train/a/an0-a-b.mfc', mfc(20)[:-3])
  speech.put(feat / 'an4train/b/an0-b-b.mfc', mfc(5, numbers=12))
  speech.put(feat / 'an4train/c/an0-c-b.mfc', mfc(0))
  (feat / 'an4train/d/an0-d-b.mfc').unlink()
  nan = struct.pack('>i', 13) + np.full(13, np.nan, '>f4').tobytes()
  speech.put(feat / 'an4train/e/an0-e-b.mfc', nan)
  speech.put(tmp_path / 'an4/etc/an4_test.transcription', 'A (an1-z-b)\n')
  corpus = an4.read(tmp_path, validation_speakers=1)
  assert corpus.skipped == {
    'cut short': ('an0-a-b',),
    'damaged audio': ('an0-b-b',),
    'empty audio': ('an0-c-b',),
    'no such file': ('an0-d-b',),
    'no transcript': ('an0-z-b',),
  }
  # That a number is not finite is seen when it is read.
  skips = utterances.Skips()
  everything = [*corpus.train, *corpus.validation]
  readable = list(utterances.load_readable(everything, skips))
  assert skips.by_reason() == {'non-finite samples': ('an0-e-b',)}
  assert len(readable) == len(everything) - 1
  assert '1 cut short' in utterances.describe(corpus)


def test_an4_says_what_is_wrong(tmp_path):
  with pytest.raises(
    harness.MissingDataError, match=r'an4_mfcc.tar.gz, from h'
  ):
    an4.read(tmp_path)
  with pytest.raises(harness.MissingDataError, match='no --data_dir'):
    an4.read(None)
  an4_folder(tmp_path)
  with pytest.raises(harness.SettingsError, match='5 speakers cannot be held'):
    an4.read(tmp_path, validation_speakers=5)
  path = tmp_path / 'an4/etc/an4_train.transcription'
  speech.put(path, 'YES (an0-a-b)\n\nNO\n')
  with pytest.raises(harness.DamagedDataError, match=r"n, line 3: .* got 'NO'"):
    an4.read(tmp_path)
  path.unlink()
  with pytest.raises(
    harness.MissingDataError, match=r'an4_train.transcription'
  ):
    an4.read(tmp_path)
  archive = speech.put(
    tmp_path / 'x/an4_mfcc.tar.gz', b'\x1f\x8b\x08 no archive'
  )
  with pytest.raises(harness.DamagedDataError, match=str(archive)):
    an4.read(tmp_path / 'x')


# LibriSpeech


TEXTS = ('HE SAID NO', "IT'S TRUE", 'GO ON')


def libri_folder(path):
  for part, speaker in (
    ('train-clean-100', 19),
    ('train-clean-360', 20),
    ('dev-clean', 21),
    ('test-clean', 22),
  ):
    chapter = path / 'LibriSpeech' / part / str(speaker) / '198'
    lines = []
    for i, text in enumerate(TEXTS):
      name = f'{speaker}-198-{i:04d}'
      samples, rate = speech.say(text.lower())
      speech.write(chapter / f'{name}.flac', samples, rate)
      lines.append(f'{name} {text}\n')
    speech.put(chapter / f'{speaker}-198.trans.txt', ''.join(lines))
  return path


def test_librispeech(tmp_path):
  corpus = librispeech.read(libri_folder(tmp_path))
  assert [len(p) for p in corpus[:3]] == [3, 3, 3]
  assert [u.text for u in corpus.test] == [t.lower() for t in TEXTS]
  assert {u.speaker for u in corpus.train} == {'19'}
  assert corpus.train[0].name == '19-198-0000'
  samples, rate = speech.say(TEXTS[0].lower())
  read, read_rate = corpus.train[0].load()
  assert read_rate == 16_000
  if rate == 16_000:
    np.testing.assert_allclose(read, samples, atol=2**-15)
  speech.check_loads(corpus.train)
  # It is not the whole of it, so that results say so.
  assert corpus.source.name == 'speech in the layout of LibriSpeech'
  more = librispeech.read(tmp_path, unlabelled='train-clean-360', rate=8_000)
  assert [u.text for u in more.train[3:]] == [None] * 3
  speech.check_loads(more.train[3:4])
  both = librispeech.read(tmp_path, train='train-clean-100, train-clean-360')
  assert len(utterances.texts(both.train)) == 6


def test_librispeech_counts_and_names_what_is_broken(tmp_path):
  libri_folder(tmp_path)
  train = tmp_path / 'LibriSpeech/train-clean-100/19/198'
  test = tmp_path / 'LibriSpeech/test-clean/22/198'
  speech.put(train / '19-198-0001.flac', b'')
  (train / '19-198-0002.flac').unlink()
  speech.put(test / '22-198.trans.txt', '22-198-0000 ONE\n22-198-0001\n')
  corpus = librispeech.read(tmp_path)
  assert corpus.skipped == {
    'empty audio': ('19-198-0001',),
    'no such file': ('19-198-0002',),
    'no transcript': ('22-198-0002',),
  }
  assert [u.text for u in corpus.test] == ['one', '']
  # Without its transcript, audio of training is used without a text.
  (train / '19-198.trans.txt').unlink()
  assert [u.text for u in librispeech.read(tmp_path).train] == [None]
  for lines, says in (
    ('22-198-0000 ONE\nTWO\n', 'trans.txt, line 2: .* got .TWO.'),
    ('22-198-0000 ONE\n22-198-0000 ONE\n', 'line 2: 22-198-0000 has a second'),
  ):
    speech.put(test / '22-198.trans.txt', lines)
    with pytest.raises(harness.DamagedDataError, match=says):
      librispeech.read(tmp_path)
  speech.put(test / '22-198.trans.txt', '')
  with pytest.raises(harness.DamagedDataError, match='for test: skipped'):
    librispeech.read(tmp_path)
  with pytest.raises(harness.SettingsError, match='dev-clean is used twice'):
    librispeech.read(tmp_path, test='dev-clean')
  with pytest.raises(harness.MissingDataError, match=r'openslr.org/12'):
    librispeech.read(tmp_path, test='test-other')


def test_a_whole_part_is_known_by_its_size(tmp_path, monkeypatch):
  libri_folder(tmp_path)
  names = ('train-clean-100', 'dev-clean', 'test-clean')
  monkeypatch.setattr(librispeech, 'SIZES', dict.fromkeys(names, 3))
  assert librispeech.read(tmp_path).source.name == 'LibriSpeech'


# TED-LIUM


def ted_folder(path):
  for part in ('train', 'dev', 'test'):
    talk = f'Speaker_{part}'
    samples, rate = speech.say('this is a talk of several words')
    speech.write(
      path / f'TEDLIUM_release2/{part}/sph/{talk}.sph', samples, rate
    )
    speech.put(
      path / f'TEDLIUM_release2/{part}/stm/{talk}.stm',
      ';; a comment\n'
      f"{talk} 1 {talk} 0.00 0.31 <o,f0,male> it 's <unk> [noise] a THE(2)\n"
      f'{talk} 1 {talk} 0.31 0.40 <o,f0,male> '
      'ignore_time_segment_in_scoring\n'
      f'{talk} 1 {talk} 0.40 0.80 <o,f0,male> several {{SMACK}} words\n',
    )
  return path


def test_tedlium(tmp_path):
  corpus = tedlium.read(ted_folder(tmp_path))
  assert [[u.text for u in part] for part in corpus[:3]] == [
    ["it's a the", 'several words']
  ] * 3
  speech.check_loads(corpus.train)
  full, rate = speech.say('this is a talk of several words')
  if rate == 16_000:
    np.testing.assert_allclose(
      corpus.train[1].load()[0], full[6_400:12_800], atol=2**-15
    )
  assert corpus.train[1].name == 'Speaker_train-0000040-0000080'
  assert corpus.skipped['not to be scored'] == tuple(
    f'Speaker_{part}-0000031-0000040' for part in ('train', 'dev', 'test')
  )
  assert '9 labels of noise and unknown words' in corpus.source.words
  assert corpus.source.name == 'speech in the layout of TED-LIUM'


def test_tedlium_counts_and_names_what_is_broken(tmp_path):
  ted_folder(tmp_path)
  train = tmp_path / 'TEDLIUM_release2/train'
  line = 'Speaker_train 1 me {} {} <o,f0,male> words\n'
  shorten = 'Shorten 1 me 0 0.2 <o,f0,male> words\n'
  lost = 'Lost 1 me 0 0.2 <o,f0,male> words\n'
  speech.compressed_sphere(train / 'sph/Shorten.sph')
  stm = train / 'stm/Speaker_train.stm'
  speech.put(
    stm, line.format(0.1, 0.3) + line.format(0.2, 900) + shorten + lost
  )
  corpus = tedlium.read(tmp_path)
  assert len(corpus.train) == 1
  del corpus.skipped['not to be scored']
  assert corpus.skipped == {
    'beyond the end of its audio': ('Speaker_train-0000020-0090000',),
    'compressed SPH': ('Shorten-0000000-0000020',),
    'no such file': ('Lost-0000000-0000020',),
  }
  for bad, says in (
    ('Speaker_train 1 me 0.1\n', 'stm, line 2: it has 4 words'),
    (line.format('soon', 2), "stm, line 2: 'soon' is not a time in seconds"),
    (line.format(2, 1), 'stm, line 2: a segment needs 0 <= start < stop'),
    (line.format(0, 'inf'), 'stm, line 2: a segment needs 0 <= start < stop'),
  ):
    speech.put(stm, line.format(0.1, 0.3) + bad)
    with pytest.raises(harness.DamagedDataError, match=says):
      tedlium.read(tmp_path)
  with pytest.raises(harness.MissingDataError, match=r'openslr.org/19'):
    tedlium.read(tmp_path / 'TEDLIUM_release2/train')


# A folder of one's own


def own_folder(path):
  lines = []
  for i in range(10):
    name = f'me/{i}.{("wav", "flac", "sph")[i % 3]}'
    speech.write(path / name, speech.tones('abc'))
    lines.append(f'{name}\tWord {i}\r\n')
  speech.write(path / 'more/no text.flac', speech.tones('ab'), 16_000)
  speech.put(path / folder.TABLE, ''.join(lines))
  return path


def test_a_folder_of_ones_own(tmp_path):
  corpus = folder.read(
    own_folder(tmp_path), validation=0.2, test=0.3, rate=8000
  )
  assert [len(p) for p in corpus[:3]] == [6, 2, 3]
  names = [u.name for p in corpus[:3] for u in p]
  assert len(set(names)) == 11
  for u in (*corpus.validation, *corpus.test, *corpus.train[:-1]):
    assert u.text == f'word {u.name[3]}' and u.speaker == 'me'
  assert corpus.train[-1].name == 'more/no text.flac'
  assert corpus.train[-1].text is None
  speech.check_loads(corpus.train)
  assert corpus.train[0].length == 1_200
  # Files of their own, and texts as they are.
  speech.put(tmp_path / 'test.tsv', 'more/no text.flac\tYes\n')
  own = folder.read(tmp_path, test='test.tsv', lower=False)
  assert [(u.name, u.text) for u in own.test] == [('more/no text.flac', 'Yes')]
  assert [len(p) for p in own[:3]] == [9, 1, 1]


def test_a_folder_of_ones_own_says_what_is_wrong(tmp_path):
  with pytest.raises(harness.MissingDataError, match='a tab, and a text'):
    folder.read(tmp_path)
  own_folder(tmp_path)
  table = tmp_path / folder.TABLE
  before = table.read_text()
  speech.put(tmp_path / 'me/broken.wav', b'RIFF')
  speech.put(table, before + 'me/gone.wav\tgone\nme/broken.wav\tbroken\n')
  corpus = folder.read(tmp_path)
  assert corpus.skipped == {
    'no such file': (f'me/gone.wav ({table}, line 11)',),
    'damaged audio': (f'me/broken.wav ({table}, line 12)',),
  }
  for line, says in (
    ('me/0.wav a text', "line 11: a line has to be .* 'me/0.wav a"),
    ('\ttext', 'line 11: a line has to be a path'),
    ('me/../me/0.wav\tagain', 'line 11: me/0.wav already .* line 1: remove'),
  ):
    speech.put(table, f'{before}{line}\n')
    with pytest.raises(harness.DamagedDataError, match=says):
      folder.read(tmp_path)
  speech.put(table, before.encode() + b'me/1.flac\t\xff\n')
  with pytest.raises(harness.DamagedDataError, match='line 11: not UTF-8'):
    folder.read(tmp_path)
  with pytest.raises(harness.SettingsError, match='leave something for train'):
    folder.read(tmp_path, validation=0.6, test=0.4)


# The data sets themselves


def test_an4_itself():
  corpus = an4.read(speech.data_folder())
  assert len(corpus.train) + len(corpus.validation) == 948
  assert len(corpus.test) == 130
  assert len({u.speaker for u in (*corpus.train, *corpus.validation)}) == 74
  assert len({u.speaker for u in corpus.test}) == 10
  assert not corpus.skipped
  assert corpus.source.name == 'AN4'
  minutes = sum(u.seconds for u in corpus.test) / 60
  assert minutes == pytest.approx(5.9, abs=0.05)
  words = units.words(utterances.texts((*corpus.train, *corpus.validation)))
  assert words.size - units.FIRST == 99
  speech.check_loads((*corpus.train, *corpus.validation, *corpus.test))
