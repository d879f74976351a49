"""Strings of digits from recordings of the Free Spoken Digit Dataset.

A recording is `{digit}_{speaker}_{index}.wav`, one digit at 8 kHz; indices 0 to
4 of each digit and speaker are the official test set. A string joins recordings
of one speaker by short pauses. A pause has the noise level of the quietest
moments next to it: digital silence would mark the ends of words.

| set | indices of its recordings |
|---|---|
| test | 0 to 4 |
| validation | 5 to 9 |
| train | 10 and above |
| `held_speaker` | all, of a speaker who is in no other set |
"""

import re
from typing import NamedTuple

import numpy as np

from experiments import harness
from experiments.harness.store import files
from experiments.speech import archive, audio, utterances

RATE = 8_000
DIGITS = (3, 6)  # Smallest and largest number of digits of a string.
PAUSE = (0.05, 0.25)  # Shortest and longest pause between digits, seconds.
WORDS = (
  *('zero', 'one', 'two', 'three', 'four'),
  *('five', 'six', 'seven', 'eight', 'nine'),
)
FOLDERS = (
  *('', 'speech', 'fsdd', 'free-spoken-digit-dataset'),
  *('speech/fsdd', 'speech/free-spoken-digit-dataset'),
)
ADVICE = (
  'get the Free Spoken Digit Dataset, a folder recordings or its archive '
  'fsdd.tar.gz, from https://github.com/Jakobovski/free-spoken-digit-dataset'
)
_NAME = re.compile(r'^([0-9])_([^_/]+)_([0-9]{1,9})\.wav$')
# Recordings below the first index are for the test, then for validation.
_TEST_END, _VALIDATION_END = 5, 10
# Samples of a moment whose noise is measured.
_MOMENT = 80


class _Recording(NamedTuple):
  digit: int
  speaker: str
  take: int
  part: audio.Part


def read(
  data_dir: files.Path | None,
  *,
  train: int = 1_000,
  validation: int = 150,
  test: int = 300,
  labelled: float = 1.0,
  held_speaker: str = '',
  seed: int = 0,
  rate: int = RATE,
) -> utterances.Corpus:
  """Makes strings of digits.

  Args:
    data_dir: folder of data sets.
    train: number of training strings.
    validation: number of validation strings.
    test: number of test strings, and of strings of the held-out speaker.
    labelled: fraction of the training strings with a text. They use this
      fraction of the training recordings; strings without a text use the other
      recordings, so that their audio is new.
    held_speaker: speaker of the set of this name, excluded from all others; ''
      for no such set.
    seed: seed of the strings.
    rate: sampling rate to resample to, hertz.

  Returns:
    The corpus, with texts such as 'three one four'.

  Raises:
    MissingDataError: if the recordings are missing; says where to get them.
    DamagedDataError: if a set has no recording.
    SettingsError: if the speaker is unknown, or a size or fraction is invalid.
  """
  _check(train, validation, test, labelled)
  path, contents = archive.read(
    data_dir,
    folder='recordings',
    archive='fsdd.tar.gz',
    wanted=lambda name: name.endswith('.wav'),
    folders=FOLDERS,
    advice=ADVICE,
  )
  skips = utterances.Skips()
  recordings = list(_recordings(contents, rate, skips))
  speakers = sorted({r.speaker for r in recordings})
  if held_speaker and held_speaker not in speakers:
    raise harness.SettingsError(
      f'held_speaker={held_speaker!r} is unknown; known: {", ".join(speakers)}.'
    )
  others = [r for r in recordings if r.speaker != held_speaker]
  takes = sorted({r.take for r in others if r.take >= _VALIDATION_END})
  count = round(labelled * len(takes))
  if 0 < labelled < 1:
    count = min(max(count, 1), len(takes) - 1)
  labelled_takes, other_takes = set(takes[:count]), set(takes[count:])
  texts = round(labelled * train)

  def make(index, name, count, recordings):
    rng = np.random.default_rng([seed, index])
    return _strings(path, name, list(recordings), count, rng=rng, rate=rate)

  with_text = make(
    0, 'train', texts, (r for r in others if r.take in labelled_takes)
  )
  without = make(
    1, 'unlabelled', train - texts, (r for r in others if r.take in other_takes)
  )
  more = {}
  if held_speaker:
    held_out = (r for r in recordings if r.speaker == held_speaker)
    more['held_speaker'] = make(4, 'held_speaker', test, held_out)
  corpus = utterances.Corpus(
    train=(*with_text, *(u._replace(text=None) for u in without)),
    validation=make(
      2,
      'validation',
      validation,
      (r for r in others if _TEST_END <= r.take < _VALIDATION_END),
    ),
    test=make(3, 'test', test, (r for r in others if r.take < _TEST_END)),
    rate=rate,
    frame_rate=None,
    numbers=None,
    skipped=skips.by_reason(),
    source=harness.identify_source(
      f'strings of the {len(recordings):,} digits in {path}',
      [np.frombuffer(contents[name], np.uint8) for name in sorted(contents)],
      otherwise='recordings of digits',
    ),
    more=more,
  )
  return utterances.check_sets(corpus, where=path)


def _check(train, validation, test, labelled):
  for name, number in (
    ('train', train),
    ('validation', validation),
    ('test', test),
  ):
    if number < 1:
      raise harness.SettingsError(
        f'{name} has to be at least 1 string, got {number}.'
      )
  if not 0 <= labelled <= 1:
    raise harness.SettingsError(
      f'labelled has to be within 0 and 1, got {labelled}.'
    )


def _recordings(contents, rate, skips):
  for name in sorted(contents):
    match = _NAME.match(name)
    if match is None:
      skips.add('not the name of a digit recording', name)
      continue
    digit, speaker, index = match.groups()
    try:
      part = audio.probe(contents[name], rate=rate, name=name)
    except audio.AudioError as error:
      skips.add(error.reason, name)
    else:
      yield _Recording(int(digit), speaker, int(index), part)


def _strings(path, name, recordings, count, *, rng, rate):
  """Makes random strings; each has recordings of one speaker."""
  if not count:
    return ()
  if not recordings:
    raise harness.DamagedDataError(
      f'{path} has no recording for {name}: {ADVICE}.'
    )
  by_speaker: dict[str, dict[int, list[_Recording]]] = {}
  for one in recordings:
    spoken = by_speaker.setdefault(one.speaker, {})
    spoken.setdefault(one.digit, []).append(one)
  strings = []
  for i in range(count):
    speaker = sorted(by_speaker)[rng.integers(len(by_speaker))]
    spoken = by_speaker[speaker]
    known = sorted(spoken)
    chosen = []
    for _ in range(rng.integers(DIGITS[0], DIGITS[1] + 1)):
      takes = spoken[known[rng.integers(len(known))]]
      chosen.append(takes[rng.integers(len(takes))])
    gaps = np.round(rng.uniform(*PAUSE, len(chosen) - 1) * rate).astype(int)
    length = sum(one.part.length for one in chosen) + int(gaps.sum())
    digits = ''.join(str(one.digit) for one in chosen)
    strings.append(
      utterances.Utterance(
        name=f'{name}-{i:05d}-{speaker}-{digits}',
        text=' '.join(WORDS[one.digit] for one in chosen),
        speaker=speaker,
        length=length,
        seconds=length / rate,
        load=utterances.LazyCall(
          _load,
          [one.part for one in chosen],
          gaps,
          int(rng.integers(2**31)),
          rate,
        ),
      )
    )
  return tuple(strings)


def _load(parts, gaps, seed, rate):
  rng = np.random.default_rng(seed)
  spoken = [audio.read(part) for part in parts]
  quiet = [_quietest(samples) for samples in spoken]
  pieces = [spoken[0]]
  for i, gap in enumerate(gaps):
    level = min(quiet[i], quiet[i + 1])
    pieces += [rng.normal(0, level, gap).astype(np.float32), spoken[i + 1]]
  return np.concatenate(pieces), rate


def _quietest(samples):
  """The smallest root mean square of a moment."""
  count = max(1, len(samples) // _MOMENT)
  moments = np.array_split(samples.astype(np.float64), count)
  return float(np.sqrt(min(np.mean(one**2) for one in moments)))
