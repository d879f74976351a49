"""Audio of each format is read exactly; what is broken is named, with why."""

import numpy as np
import pytest

from experiments import harness
from experiments.speech import audio
from tests.experiments.speech import speech

soundfile = pytest.importorskip('soundfile')


def noise(count, seed=0):
  """What 16 bits hold exactly."""
  whole = np.random.default_rng(seed).integers(-9_000, 9_000, count)
  return (whole / 2**15).astype(np.float32)


@pytest.mark.parametrize('end', ['wav', 'flac', 'sph'])
def test_what_is_written_is_read(tmp_path, end):
  samples = noise(4_000)
  path = speech.write(tmp_path / f'a.{end}', samples)
  part = audio.part_of(path)
  assert (part.length, part.rate, part.from_rate) == (4_000, 16_000, 16_000)
  np.testing.assert_array_equal(audio.read(part), samples)
  # A part, by its times; a stop a little behind the end is the end.
  part = audio.part_of(path, start=0.1, stop=0.5)
  np.testing.assert_array_equal(audio.read(part), samples[1_600:])
  # From bytes in place of a file.
  part = audio.part_of(path.read_bytes(), name='a', start=0.01, stop=0.02)
  np.testing.assert_array_equal(audio.read(part), samples[160:320])


def test_channels_are_averaged_and_rates_changed(tmp_path):
  time = np.arange(3_001) / 44_100
  wave = np.sin(2 * np.pi * 300 * time)
  both = np.stack([wave, 0.5 * wave], axis=1)
  path = speech.write(tmp_path / 'a.wav', both, 44_100, subtype='FLOAT')
  np.testing.assert_allclose(
    audio.read(audio.part_of(path)), 0.75 * wave, atol=1e-6
  )
  for rate in (8_000, 16_000, 48_000, 11_025):
    part = audio.part_of(path, rate=rate)
    found = audio.read(part)
    assert found.dtype == np.float32
    assert len(found) == part.length == -(-3_001 * rate // 44_100)
    # The tone itself, away from the ends that a filter sees zeros behind.
    expected = 0.75 * np.sin(2 * np.pi * 300 * np.arange(len(found)) / rate)
    inner = slice(len(found) // 5, -(len(found) // 5))
    np.testing.assert_allclose(found[inner], expected[inner], atol=0.01)


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
      'a.sph is cut short: it announces 9,024 bytes and has 4,512',
    ),
    (
      lambda p: cut(speech.write(p / 'a.wav', noise(4_000))),
      'cut short',
      'a.wav is cut short: it announces 8,036 bytes and has 4,022',
    ),
    (
      lambda p: cut(speech.write(p / 'a.flac', noise(90_000))),
      'damaged audio',
      'a.flac is damaged, cut short or no audio .* get it again, or convert',
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
      'a.sph is damaged',
    ),
    (
      lambda p: speech.write(
        p / 'a.wav', np.array([0, 0.5, np.nan, 0]), subtype='FLOAT'
      ),
      'samples that are not finite',
      'a.wav, sample 3, is not finite: write it again',
    ),
  ],
)
def test_what_is_broken_is_named(tmp_path, make, reason, says):
  path = make(tmp_path)
  with pytest.raises(audio.AudioError, match=says) as raised:
    audio.read(audio.part_of(path))
  assert raised.value.reason == reason
  assert isinstance(raised.value, harness.UserError)


def test_mp3_may_have_less_than_its_estimated_length(tmp_path):
  if 'MP3' not in soundfile.available_formats():
    pytest.skip('libsndfile without MP3')
  path = speech.write(tmp_path / 'a.mp3', noise(20_000))
  whole = audio.read(audio.part_of(path))
  part = audio.part_of(path)
  for lacks, fine in ((100, True), (2_304, True), (2_305, False)):
    longer = part._replace(samples=part.samples + lacks)
    if fine:
      found = audio.read(longer)
      assert len(found) == longer.length
      np.testing.assert_array_equal(found[: len(whole)], whole)
      assert not found[len(whole) :].any()
    else:
      with pytest.raises(audio.AudioError, match=r'cut short.*convert it'):
        audio.read(longer)
  wave = audio.part_of(speech.write(tmp_path / 'a.wav', noise(4_000)))
  with pytest.raises(audio.AudioError, match='cut short'):
    audio.read(wave._replace(samples=wave.samples + 100))


def test_a_folder_is_no_audio(tmp_path):
  with pytest.raises(audio.AudioError, match='is a folder: give the files'):
    audio.part_of(tmp_path)


def written(path, content):
  path.write_bytes(content)
  return path


@pytest.mark.parametrize(
  ('start', 'stop', 'reason'),
  [
    (0.1, 0.9, 'behind the end of its audio'),
    (0.3, 0.4, 'empty audio'),
    (0.2, 0.1, 'empty audio'),
    (-0.1, 0.1, 'empty audio'),
  ],
)
def test_a_part_is_within_its_file(tmp_path, start, stop, reason):
  path = speech.write(tmp_path / 'a.flac', noise(4_000))
  with pytest.raises(audio.AudioError) as raised:
    audio.part_of(path, start=start, stop=stop)
  assert raised.value.reason == reason


def test_a_header_that_announces_too_much(tmp_path, monkeypatch):
  path = speech.write(tmp_path / 'a.flac', noise(4_000))
  monkeypatch.setattr(audio, 'MOST', 3_999)
  with pytest.raises(audio.AudioError, match='announces 4,000 samples of 1'):
    audio.part_of(path)
  with pytest.raises(audio.AudioError, match='at 16,000 Hz: if that is so'):
    audio.part_of(path, stop=0.2, rate=48_000)
  path = speech.write(tmp_path / 'a.wav', noise(100), 10)
  with pytest.raises(audio.AudioError, match='at 10 Hz') as raised:
    audio.part_of(path)
  assert raised.value.reason == 'damaged audio'
