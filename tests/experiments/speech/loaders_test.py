"""Loaders on small folders in the layouts of data sets, and on real ones."""

import io
import pathlib
import pickle
import struct
import tarfile

import numpy as np
import pytest

from experiments import harness
from experiments.bl_just import train
from experiments.speech import (
  an4,
  folder,
  fsdd,
  librispeech,
  tedlium,
  units,
  utterances,
)
from tests.experiments.speech import speech

pytest.importorskip('soundfile')


def put(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(text, bytes):
    path.write_bytes(text)
  else:
    path.write_text(text)
  return path


def check_loads(items):
  """What is loaded is as long as the header said, and finite."""
  for u in items:
    content, rate = u.load()
    assert content.dtype == np.float32 and len(content) == u.length
    assert u.seconds == pytest.approx(u.length / (rate or 100))


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
        put(path / f'an4/feat/{place}.mfc', mfc(20 + i))
        lists.append(place)
        marks = ('<s> ', ' </s>') if i else ('', '')
        texts.append(f'{marks[0]}YES  GO{marks[1]} ({name})')
    put(path / f'an4/etc/an4_{part}.fileids', '\n'.join(lists) + '\n')
    put(path / f'an4/etc/an4_{part}.transcription', '\n'.join(texts) + '\n')
  return path


def test_an4_holds_speakers_out(tmp_path):
  corpus = an4.read(an4_folder(tmp_path), validation_speakers=2)
  assert [len(p) for p in corpus[:3]] == [6, 4, 2]
  assert not {u.speaker for u in corpus.train} & {
    u.speaker for u in corpus.validation
  }
  assert {u.text for p in corpus[:3] for u in p} == {'yes go'}
  assert (corpus.rate, corpus.frame_rate, corpus.numbers) == (None, 100, 13)
  check_loads(corpus.train)
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
  put(feat / 'an4train/a/an0-a-b.mfc', mfc(20)[:-3])
  put(feat / 'an4train/b/an0-b-b.mfc', mfc(5, numbers=12))
  put(feat / 'an4train/c/an0-c-b.mfc', mfc(0))
  (feat / 'an4train/d/an0-d-b.mfc').unlink()
  nan = struct.pack('>i', 13) + np.full(13, np.nan, '>f4').tobytes()
  put(feat / 'an4train/e/an0-e-b.mfc', nan)
  put(tmp_path / 'an4/etc/an4_test.transcription', 'A (an1-z-b)\n')
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
  put(path, 'YES (an0-a-b)\n\nNO\n')
  with pytest.raises(harness.DamagedDataError, match=r"n, line 3: .* got 'NO'"):
    an4.read(tmp_path)
  path.unlink()
  with pytest.raises(
    harness.MissingDataError, match=r'an4_train.transcription'
  ):
    an4.read(tmp_path)
  archive = put(tmp_path / 'x/an4_mfcc.tar.gz', b'\x1f\x8b\x08 no archive')
  with pytest.raises(harness.DamagedDataError, match=str(archive)):
    an4.read(tmp_path / 'x')


# Strings of digits


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
  """Recordings of two speakers, of which each sample is its index."""
  path = tmp_path_factory.mktemp('digits')
  for digit in range(10):
    for speaker in ('ann', 'bob'):
      for index in range(14):
        length = 400 + 10 * digit + index
        samples = np.full(length, (index + 1) / 64, np.float32)
        name = f'{digit}_{speaker}_{index}.wav'
        speech.write(path / 'recordings' / name, samples, 8_000)
  return path


def indices(items):
  """Of the recordings in strings: pauses are noise, which is not constant."""
  values_seen = set()
  for u in items:
    samples, _ = u.load()
    values, counts = np.unique(samples, return_counts=True)
    values_seen |= set(
      (values[counts >= 400] * 64 - 1).round().astype(int).tolist()
    )
  return values_seen


def test_strings_of_sets_have_no_recording_in_common(digits):
  corpus = fsdd.read(
    digits, train=60, validation=30, test=30, labelled=0.5, held_speaker='bob'
  )
  held_out = corpus.more['held_speaker']
  assert [len(p) for p in (*corpus[:3], held_out)] == [60, 30, 30, 30]
  check_loads([*corpus.train[:5], *held_out[:2]])
  labelled = [u for u in corpus.train if u.text is not None]
  without = [u for u in corpus.train if u.text is None]
  assert len(labelled) == len(without) == 30
  assert indices(labelled) == {10, 11} and indices(without) == {12, 13}
  assert indices(corpus.validation) == {5, 6, 7, 8, 9}
  assert indices(corpus.test) == {0, 1, 2, 3, 4}
  assert {u.speaker for p in corpus[:3] for u in p} == {'ann'}
  assert {u.speaker for u in held_out} == {'bob'}
  for u in corpus.test:
    words = u.text.split()
    assert 3 <= len(words) <= 6
    digits_said = u.name.rpartition('-')[2]
    assert ''.join(str(fsdd.WORDS.index(w)) for w in words) == digits_said
    pauses = u.length - sum(400 + 10 * int(d) for d in digits_said)
    assert 0.05 * 8_000 * (len(words) - 1) <= pauses
    assert pauses <= (0.25 * 8_000 + 4) * len(words)
  # The same seed makes the same strings, another one others.
  again = fsdd.read(digits, train=60, validation=30, test=30)
  other = fsdd.read(digits, train=60, validation=30, test=30, seed=1)
  one = fsdd.read(digits, train=60, validation=30, test=30)
  names = lambda corpus: [u.name for u in corpus.train]
  assert names(one) == names(again) != names(other)
  np.testing.assert_array_equal(
    one.train[0].load()[0], again.train[0].load()[0]
  )


def test_strings_say_what_is_wrong(digits, tmp_path):
  with pytest.raises(harness.MissingDataError, match=r'fsdd.tar.gz, from http'):
    fsdd.read(tmp_path)
  for how, says in (
    ({'held_speaker': 'eve'}, "held_speaker='eve' is unknown; known: ann, bob"),
    ({'labelled': 1.5}, 'labelled has to be within 0 and 1'),
    ({'train': 0}, 'train has to be at least 1 string'),
  ):
    with pytest.raises(harness.SettingsError, match=says):
      fsdd.read(digits, **how)
  recordings = tmp_path / 'recordings'
  speech.write(recordings / '3_ann_0.wav', np.zeros(500), 8_000)
  put(recordings / '3_ann_1.wav', b'RIFF')
  put(recordings / 'three.wav', b'RIFF')
  with pytest.raises(harness.DamagedDataError, match='no recording for train'):
    fsdd.read(tmp_path)
  speech.write(recordings / '3_ann_5.wav', np.zeros(500), 8_000)
  speech.write(recordings / '4_ann_12.wav', np.zeros(500), 8_000)
  corpus = fsdd.read(tmp_path, train=2, validation=2, test=2)
  assert set(corpus.train[0].text.split()) == {'four'}
  assert corpus.skipped == {
    'damaged audio': ('3_ann_1.wav',),
    'not the name of a digit recording': ('three.wav',),
  }


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
    put(chapter / f'{speaker}-198.trans.txt', ''.join(lines))
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
  check_loads(corpus.train)
  # It is not the whole of it, so that results say so.
  assert corpus.source.name == 'speech in the layout of LibriSpeech'
  more = librispeech.read(tmp_path, unlabelled='train-clean-360', rate=8_000)
  assert [u.text for u in more.train[3:]] == [None] * 3
  check_loads(more.train[3:4])
  both = librispeech.read(tmp_path, train='train-clean-100, train-clean-360')
  assert len(utterances.texts(both.train)) == 6


def test_librispeech_counts_and_names_what_is_broken(tmp_path):
  libri_folder(tmp_path)
  train = tmp_path / 'LibriSpeech/train-clean-100/19/198'
  test = tmp_path / 'LibriSpeech/test-clean/22/198'
  put(train / '19-198-0001.flac', b'')
  (train / '19-198-0002.flac').unlink()
  put(test / '22-198.trans.txt', '22-198-0000 ONE\n22-198-0001\n')
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
    put(test / '22-198.trans.txt', lines)
    with pytest.raises(harness.DamagedDataError, match=says):
      librispeech.read(tmp_path)
  put(test / '22-198.trans.txt', '')
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
    put(
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
  check_loads(corpus.train)
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
  put(stm, line.format(0.1, 0.3) + line.format(0.2, 900) + shorten + lost)
  corpus = tedlium.read(tmp_path)
  assert len(corpus.train) == 1
  del corpus.skipped['not to be scored']
  assert corpus.skipped == {
    'beyond the end of its audio': ('Speaker_train-0000020-0090000',),
    'compressed SPH': ('Shorten-0000000-0000020',),
    'no such file': ('Lost-0000000-0000020',),
  }
  for bad, says in (
    ('Speaker_train 1 me 0.1\n', 'stm, line 2 has 4 words'),
    (line.format('soon', 2), "stm, line 2: 'soon' is not a time in seconds"),
    (line.format(2, 1), 'stm, line 2: a segment needs 0 <= start < stop'),
    (line.format(0, 'inf'), 'stm, line 2: a segment needs 0 <= start < stop'),
  ):
    put(stm, line.format(0.1, 0.3) + bad)
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
  put(path / folder.TABLE, ''.join(lines))
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
  check_loads(corpus.train)
  assert corpus.train[0].length == 1_200
  # Files of their own, and texts as they are.
  put(tmp_path / 'test.tsv', 'more/no text.flac\tYes\n')
  own = folder.read(tmp_path, test='test.tsv', lower=False)
  assert [(u.name, u.text) for u in own.test] == [('more/no text.flac', 'Yes')]
  assert [len(p) for p in own[:3]] == [9, 1, 1]


def test_a_folder_of_ones_own_says_what_is_wrong(tmp_path):
  with pytest.raises(harness.MissingDataError, match='a tab, and a text'):
    folder.read(tmp_path)
  own_folder(tmp_path)
  table = tmp_path / folder.TABLE
  before = table.read_text()
  put(tmp_path / 'me/broken.wav', b'RIFF')
  put(table, before + 'me/gone.wav\tgone\nme/broken.wav\tbroken\n')
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
    put(table, f'{before}{line}\n')
    with pytest.raises(harness.DamagedDataError, match=says):
      folder.read(tmp_path)
  put(table, before.encode() + b'me/1.flac\t\xff\n')
  with pytest.raises(harness.DamagedDataError, match='line 11: not UTF-8'):
    folder.read(tmp_path)
  with pytest.raises(harness.SettingsError, match='leave something for train'):
    folder.read(tmp_path, validation=0.6, test=0.4)


# What is common


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
  check_loads((*corpus.train, *corpus.validation, *corpus.test))


def test_recordings_of_digits_themselves():
  corpus = fsdd.read(
    speech.data_folder(), train=60, held_speaker='theo', labelled=0.25
  )
  assert '3,000 digits' in corpus.source.words and not corpus.skipped
  assert corpus.source.name == 'FSDD'
  assert {u.speaker for u in corpus.test} == {
    *('george', 'jackson', 'lucas', 'nicolas', 'yweweler')
  }
  check_loads((*corpus.train, *corpus.more['held_speaker'][:20]))


def test_an_archive_has_bounds(tmp_path, monkeypatch):
  from experiments.speech import archive

  with tarfile.open(tmp_path / 'fsdd.tar.gz', 'w:gz') as packed:
    member = tarfile.TarInfo('recordings/0_a_0.wav')
    member.size = 2_000
    packed.addfile(member, io.BytesIO(bytes(2_000)))
  monkeypatch.setattr(archive, 'MAX_BYTES', 1_000)
  with pytest.raises(harness.DamagedDataError, match='more than 1,000'):
    fsdd.read(tmp_path)
