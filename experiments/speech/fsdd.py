"""Strings of digits, made of the recordings of the Free Spoken Digit Dataset.

A recording is `{digit}_{speaker}_{index}.wav`, one digit at 8 kHz; index 0 to 4
of each digit and speaker is the official test. A string is recordings of one
speaker with short pauses between, whose noise is that of the quietest moments
beside them: digital silence would tell a network where a word ends.

| set | index of its recordings |
|---|---|
| test | 0 to 4 |
| validation | 5 to 9 |
| train | 10 and above |
| `held_speaker` | any, of a speaker who is in no other set |
"""

import functools
import re
from typing import NamedTuple

import numpy as np

from experiments import harness
from experiments.harness.store import files
from experiments.speech import archive, audio, utterances

RATE = 8_000
DIGITS = (3, 6)  # Of a string, the fewest and the most.
PAUSE = (0.05, 0.25)  # Between two digits, the shortest and the longest, s.
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
_NAME = re.compile(r'^(\d)_([^_/]+)_(\d+)\.wav$')
# Indices of recordings from, and below.
_TEST, _VALIDATION = 5, 10
# Samples of the moments whose noise is measured.
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
    train: strings to learn from.
    validation: strings to choose with.
    test: strings to report on, and as many of the speaker held out.
    labelled: share of the training strings that have a text. They are made of
      this share of the training recordings and the others of the rest, so that
      what has no text is new. `utterances.hide_texts` takes texts from strings
      of the same recordings.
    held_speaker: one who is only in the set of this name; '' for none.
    seed: of the strings.
    rate: samples a second, resampled to.

  Returns:
    The corpus; a text is as 'three one four'.

  Raises:
    MissingDataError: if the recordings are not there; says where to get them.
    DamagedDataError: if a set has no recording.
    SettingsError: if there is no such speaker, or the numbers are no sizes or
      shares.
  """
  _check(train, validation, test, labelled)
  path, found = archive.read(
    data_dir,
    folder='recordings',
    archive='fsdd.tar.gz',
    wanted=lambda name: name.endswith('.wav'),
    folders=FOLDERS,
    advice=ADVICE,
  )
  skips = utterances.Skips()
  recordings = list(_recordings(found, rate, skips))
  speakers = sorted({r.speaker for r in recordings})
  if held_speaker and held_speaker not in speakers:
    raise harness.SettingsError(
      f'held_speaker is {held_speaker!r}; there are {", ".join(speakers)}.'
    )
  mine = [r for r in recordings if r.speaker == held_speaker]
  others = [r for r in recordings if r.speaker != held_speaker]
  learnt = sorted({r.take for r in others if r.take >= _VALIDATION})
  count = round(labelled * len(learnt))
  if 0 < labelled < 1:
    count = min(max(count, 1), len(learnt) - 1)
  told = set(learnt[:count])
  make = functools.partial(_strings, path, rate=rate)
  texts = round(labelled * train)
  with_text = make(
    'train',
    [r for r in others if r.take in told],
    texts,
    rng=np.random.default_rng([seed, 0]),
  )
  without = make(
    'unlabelled',
    [r for r in others if r.take >= _VALIDATION and r.take not in told],
    train - texts,
    rng=np.random.default_rng([seed, 1]),
  )
  held = (
    make('held_speaker', mine, test, rng=np.random.default_rng([seed, 4]))
    if held_speaker
    else ()
  )
  corpus = utterances.Corpus(
    train=(*with_text, *(u._replace(text=None) for u in without)),
    validation=make(
      'validation',
      [r for r in others if _TEST <= r.take < _VALIDATION],
      validation,
      rng=np.random.default_rng([seed, 2]),
    ),
    test=make(
      'test',
      [r for r in others if r.take < _TEST],
      test,
      rng=np.random.default_rng([seed, 3]),
    ),
    rate=rate,
    frame_rate=None,
    numbers=None,
    skipped=skips.found(),
    source=harness.source_of(
      f'strings of the {len(recordings):,} digits in {path}',
      [np.frombuffer(found[name], np.uint8) for name in sorted(found)],
      otherwise='recordings of digits',
    ),
    more={'held_speaker': held} if held_speaker else {},
  )
  return utterances.checked(corpus, where=path)


def _check(train, validation, test, labelled):
  for name, number in (
    ('train', train),
    ('validation', validation),
    ('test', test),
  ):
    if number < 1:
      raise harness.SettingsError(
        f'{name} is at least one string of digits, got {number}.'
      )
  if not 0 <= labelled <= 1:
    raise harness.SettingsError(
      f'labelled is a share within 0 and 1, got {labelled}.'
    )


def _recordings(found, rate, skips):
  for name in sorted(found):
    match = _NAME.match(name)
    if match is None:
      skips.add('no name of a recording of a digit', name)
      continue
    digit, speaker, index = match.groups()
    try:
      part = audio.part_of(found[name], rate=rate, name=name)
    except audio.AudioError as error:
      skips.add(error.reason, name)
    else:
      yield _Recording(int(digit), speaker, int(index), part)


def _strings(path, name, recordings, count, *, rng, rate):
  """Strings of recordings, each of one speaker."""
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
  made = []
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
    said = ''.join(str(one.digit) for one in chosen)
    made.append(
      utterances.Utterance(
        name=f'{name}-{i:05d}-{speaker}-{said}',
        text=' '.join(WORDS[one.digit] for one in chosen),
        speaker=speaker,
        length=length,
        seconds=length / rate,
        load=utterances.Later(
          _load,
          [one.part for one in chosen],
          gaps,
          int(rng.integers(2**31)),
          rate,
        ),
      )
    )
  return tuple(made)


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
  """The least root mean square of a moment."""
  count = max(1, len(samples) // _MOMENT)
  moments = np.array_split(samples.astype(np.float64), count)
  return float(np.sqrt(min(np.mean(one**2) for one in moments)))
