"""Audio of each format is read exactly; what is broken is named, with why."""

import numpy as np
import pytest

from experiments import harness
from experiments.speech import audio
from tests.experiments.speech import speech

soundfile = pytest.importorskip('soundfile')


def noise(count, seed=0):
  """What 16 bits hold exactly."""
  expected = np.random.default_rng(seed).integers(-9_000, 9_000, count)
  return (expected / 2**15).astype(np.float32)


@pytest.mark.parametrize('end', ['wav', 'flac', 'sph'])
def test_what_is_written_is_read(tmp_path, end):
  samples = noise(4_000)
  path = speech.write(tmp_path / f'a.{end}', samples)
  part = audio.probe(path)
  assert (part.length, part.rate, part.from_rate) == (4_000, 16_000, 16_000)
  np.testing.assert_array_equal(audio.read(part), samples)
  # A part, by its times; a stop a little behind the end is the end.
  part = audio.probe(path, start=0.1, stop=0.5)
  np.testing.assert_array_equal(audio.read(part), samples[1_600:])
  # From bytes in place of a file.
  part = audio.probe(path.read_bytes(), name='a', start=0.01, stop=0.02)
  np.testing.assert_array_equal(audio.read(part), samples[160:320])


def test_channels_are_averaged_and_rates_changed(tmp_path):
  time = np.arange(3_001) / 44_100
  wave = np.sin(2 * np.pi * 300 * time)
  both = np.stack([wave, 0.5 * wave], axis=1)
  path = speech.write(tmp_path / 'a.wav', both, 44_100, subtype='FLOAT')
  np.testing.assert_allclose(
    audio.read(audio.probe(path)), 0.75 * wave, atol=1e-6
  )
  for rate in (8_000, 16_000, 48_000, 11_025):
    part = audio.probe(path, rate=rate)
    samples_read = audio.read(part)
    assert samples_read.dtype == np.float32
    assert len(samples_read) == part.length == -(-3_001 * rate // 44_100)
    # The tone itself, away from the ends that a filter sees zeros behind.
    expected = 0.75 * np.sin(
      2 * np.pi * 300 * np.arange(len(samples_read)) / rate
    )
    inner = slice(len(samples_read) // 5, -(len(samples_read) // 5))
    np.testing.assert_allclose(samples_read[inner], expected[inner], atol=0.01)


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  return path


@pytest.mark.parametrize(
  ('make', 'reason', 'says'),
  [
    (lambda p: p / 'a.wav', 'no such file', 'a.wav does not exist: correct'),
    (
      lambda p: speech.compressed_sphere(p / 'a.sph'),
      'compressed SPH',
      'a.sph is SPH compressed as pcm,embedded-shorten-v2.00: decompress it',
    ),
    (
      lambda p: cut(speech.write(p / 'a.sph', noise(4_000))),
      'cut short',
      'a.sph is truncated: its header announces 9,024 bytes, but it has 4,512',
    ),
    (
      lambda p: cut(speech.write(p / 'a.wav', noise(4_000))),
      'cut short',
      'a.wav is truncated: its header announces 8,036 bytes, but it has 4,022',
    ),
    (
      lambda p: cut(speech.write(p / 'a.flac', noise(90_000))),
      'damaged audio',
      'a.flac is damaged, truncated or not supp.* get it again, or convert',
    ),
    (
      lambda p: speech.write(p / 'a.wav', noise(0)),
      'empty audio',
      'a.wav has no audio from second 0.0 to its end',
    ),
    (lambda p: written(p / 'a.sph', b''), 'empty audio', 'a.sph is an empty'),
    (
      lambda p: written(p / 'a.flac', b'fLaC and no more'),
      'damaged audio',
      'a.flac is damaged',
    ),
    (
      lambda p: written(p / 'a.sph', b'NIST_1A\nmany\nsample_count -i x\n'),
      'damaged audio',
      'a.sph: a size in its header is no number',
    ),
    (
      lambda p: speech.write(
        p / 'a.wav', np.array([0, 0.5, np.nan, 0]), subtype='FLOAT'
      ),
      'non-finite samples',
      'a.wav, sample 3, is not finite: make the file again',
    ),
  ],
)
def test_what_is_broken_is_named(tmp_path, make, reason, says):
  path = make(tmp_path)
  with pytest.raises(audio.AudioError, match=says) as raised:
    audio.read(audio.probe(path))
  assert raised.value.reason == reason
  assert isinstance(raised.value, harness.UserError)


def test_mp3_may_have_less_than_its_estimated_length(tmp_path):
  if 'MP3' not in soundfile.available_formats():
    pytest.skip('libsndfile without MP3')
  path = speech.write(tmp_path / 'a.mp3', noise(20_000))
  expected = audio.read(audio.probe(path))
  part = audio.probe(path)
  for lacks, fine in ((100, True), (2_304, True), (2_305, False)):
    longer = part._replace(samples=part.samples + lacks)
    if fine:
      samples_read = audio.read(longer)
      assert len(samples_read) == longer.length
      np.testing.assert_array_equal(samples_read[: len(expected)], expected)
      assert not samples_read[len(expected) :].any()
    else:
      with pytest.raises(audio.AudioError, match=r'truncated.*convert it'):
        audio.read(longer)
  wave = audio.probe(speech.write(tmp_path / 'a.wav', noise(4_000)))
  with pytest.raises(audio.AudioError, match='truncated'):
    audio.read(wave._replace(samples=wave.samples + 100))


def test_a_folder_is_no_audio(tmp_path):
  with pytest.raises(audio.AudioError, match='is a folder: name the files'):
    audio.probe(tmp_path)


def written(path, content):
  path.write_bytes(content)
  return path


@pytest.mark.parametrize(
  ('start', 'stop', 'reason'),
  [
    (0.1, 0.9, 'beyond the end of its audio'),
    (0.3, 0.4, 'empty audio'),
    (0.2, 0.1, 'empty audio'),
    (-0.1, 0.1, 'empty audio'),
  ],
)
def test_a_part_is_within_its_file(tmp_path, start, stop, reason):
  path = speech.write(tmp_path / 'a.flac', noise(4_000))
  with pytest.raises(audio.AudioError) as raised:
    audio.probe(path, start=start, stop=stop)
  assert raised.value.reason == reason


def test_a_header_that_announces_too_much(tmp_path, monkeypatch):
  path = speech.write(tmp_path / 'a.flac', noise(4_000))
  monkeypatch.setattr(audio, 'MAX_SAMPLES', 3_999)
  with pytest.raises(audio.AudioError, match='announces 4,000 samples of 1'):
    audio.probe(path)
  with pytest.raises(audio.AudioError, match='at 16,000 Hz: split it if'):
    audio.probe(path, stop=0.2, rate=48_000)
  path = speech.write(tmp_path / 'a.wav', noise(100), 10)
  with pytest.raises(audio.AudioError, match='at 10 Hz') as raised:
    audio.probe(path)
  assert raised.value.reason == 'damaged audio'
