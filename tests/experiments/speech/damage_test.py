"""Damaged files: a valid result or one line that names the file, always."""

import contextlib

import numpy as np
import pytest

from experiments import harness
from experiments.speech import (
  an4,
  audio,
  folder,
  librispeech,
  ngram,
  tedlium,
  units,
  utterances,
)
from tests.experiments.speech import loaders_test, ngram_test, speech

pytest.importorskip('soundfile')


def damaged(content, rng):
  """Cut short, or with other bytes, most of them at the beginning."""
  changed = bytearray(content)
  if rng.random() < 0.3:
    changed = changed[: rng.integers(len(changed))]
  for _ in range(rng.integers(1, 6) if changed else 0):
    changed[int(len(changed) * rng.random() ** 3)] = rng.integers(256)
  return bytes(changed)


def audio_of(path):
  samples_read = audio.read(audio.probe(path, rate=8_000))
  assert np.isfinite(samples_read).all()


def all_of(corpus):
  skips = utterances.Skips()
  readable = list(utterances.load_readable(corpus.train, skips))
  assert len(readable) + sum(map(len, skips.by_reason().values())) == len(
    corpus.train
  )


@pytest.mark.parametrize(
  ('make', 'name', 'read'),
  [
    (loaders_test.an4_folder, 'an4/feat/an4train/a/an0-a-b.mfc', an4.read),
    (loaders_test.an4_folder, 'an4/etc/an4_train.transcription', an4.read),
    (loaders_test.an4_folder, 'an4/etc/an4_test.fileids', an4.read),
    (
      loaders_test.libri_folder,
      'LibriSpeech/dev-clean/21/198/21-198.trans.txt',
      librispeech.read,
    ),
    (
      loaders_test.ted_folder,
      'TEDLIUM_release2/train/stm/Speaker_train.stm',
      tedlium.read,
    ),
    (
      loaders_test.ted_folder,
      'TEDLIUM_release2/train/sph/Speaker_train.sph',
      tedlium.read,
    ),
    (loaders_test.own_folder, folder.TABLE, folder.read),
  ],
)
def test_loaders(tmp_path, make, name, read):
  make(tmp_path)
  how = {'validation_speakers': 1} if read is an4.read else {}
  path = tmp_path / name
  content = path.read_bytes()
  rng = np.random.default_rng(0)
  for _ in range(12):
    path.write_bytes(damaged(content, rng))
    with contextlib.suppress(harness.UserError):
      all_of(read(tmp_path, **how))


def test_files(tmp_path):
  rng = np.random.default_rng(0)
  samples = 0.1 * rng.normal(size=2_000)
  for end in ('wav', 'flac', 'sph'):
    speech.write(tmp_path / f'a.{end}', samples)
  (tmp_path / 'a.arpa').write_text(ngram_test.ARPA)
  units.characters(['abc']).save(tmp_path / 'a.json')
  for name, read, trials in (
    ('a.wav', audio_of, 60),
    ('a.flac', audio_of, 60),
    ('a.sph', audio_of, 60),
    ('a.arpa', ngram.read_arpa, 60),
    ('a.json', units.load, 20),
  ):
    path = tmp_path / name
    content = path.read_bytes()
    wrong = 0
    for _ in range(trials):
      path.write_bytes(damaged(content, rng))
      try:
        read(path)
      except harness.UserError as error:
        wrong += 1
        assert name in str(error)
    assert wrong > trials / 10, name
