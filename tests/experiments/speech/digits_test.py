"""Tests strings of digits, from artificial and real recordings."""

import io
import tarfile

import numpy as np
import pytest

from experiments import harness
from experiments.speech import archive, fsdd
from tests.experiments.speech import speech

pytest.importorskip('soundfile')


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
  speech.check_loads([*corpus.train[:5], *held_out[:2]])
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
  speech.put(recordings / '3_ann_1.wav', b'RIFF')
  speech.put(recordings / 'three.wav', b'RIFF')
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


def test_recordings_of_digits_themselves():
  corpus = fsdd.read(
    speech.data_folder(), train=60, held_speaker='theo', labelled=0.25
  )
  assert '3,000 digits' in corpus.source.words and not corpus.skipped
  assert corpus.source.name == 'FSDD'
  assert {u.speaker for u in corpus.test} == {
    *('george', 'jackson', 'lucas', 'nicolas', 'yweweler')
  }
  speech.check_loads((*corpus.train, *corpus.more['held_speaker'][:20]))


def test_an_archive_has_bounds(tmp_path, monkeypatch):
  with tarfile.open(tmp_path / 'fsdd.tar.gz', 'w:gz') as packed:
    member = tarfile.TarInfo('recordings/0_a_0.wav')
    member.size = 2_000
    packed.addfile(member, io.BytesIO(bytes(2_000)))
  monkeypatch.setattr(archive, 'MAX_BYTES', 1_000)
  with pytest.raises(harness.DamagedDataError, match='more than 1,000'):
    fsdd.read(tmp_path)
