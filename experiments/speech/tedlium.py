"""TED-LIUM, release 2, and other speech in its layout: talks.

    TEDLIUM_release2/<part>/sph/<talk>.sph
    TEDLIUM_release2/<part>/stm/<talk>.stm

A line of a transcript is `talk channel speaker start stop <labels> text`, with
times in seconds. A talk is one audio file; its segments are parts of it.

| in a text | becomes |
|---|---|
| `ignore_time_segment_in_scoring` | skips the segment, counted |
| `<unk>`, `[noise]`, `{BREATH}` and the like | removed, counted |
| `word(2)`, a pronunciation variant | `word` |
| `it 's` | `it's` |
"""

import re

from experiments import harness
from experiments.harness.data import reading
from experiments.harness.store import files
from experiments.speech import audio, utterances

RATE = 16_000
FOLDERS = tuple(
  f'{outer}{inner}'
  for outer in ('', 'speech/')
  for inner in ('', 'TEDLIUM_release2', 'TEDLIUM_release-2', 'tedlium')
)
ADVICE = (
  'get TED-LIUM release 2 from https://www.openslr.org/19, unpack it, and give '
  'the folder that has TEDLIUM_release2 by --data_dir'
)
# Number of talks of each published part.
SIZES = {'train': 1_495, 'dev': 8, 'test': 11}
# Largest time in a talk, eleven days.
_LAST_SECOND = 10**6
IGNORED = 'ignore_time_segment_in_scoring'
_LABEL = re.compile(r'<[^<>\s]*>|\[[^\[\]]*\]|\{[^{}]*\}')
_CONDITION = re.compile(r'^<[^<>,]*,[^<>]*>')
_VARIANT = re.compile(r'\(\d+\)')
_APOSTROPHE = re.compile(r" +(?='\w)")


def read(
  data_dir: files.Path | None,
  *,
  train: str = 'train',
  validation: str = 'dev',
  test: str = 'test',
  rate: int = RATE,
) -> utterances.Corpus:
  """Reads parts of TED-LIUM.

  Args:
    data_dir: folder of data sets.
    train: training part.
    validation: validation part.
    test: test part.
    rate: sampling rate to resample to, hertz.

  Returns:
    The corpus with lower-case texts.

  Raises:
    MissingDataError: if a part is missing; says where to get it.
    DamagedDataError: if a line of a transcript is invalid, or a set is empty.
  """
  skips = utterances.Skips()
  parts, talks, labels = {}, {}, 0
  for name in dict.fromkeys((train, validation, test)):
    parts[name], talks[name], count = _read_part(data_dir, name, rate, skips)
    labels += count
  description = f'{", ".join(parts)} of TED-LIUM in {data_dir}'
  if labels:
    description += f', without {labels:,} labels of noise and unknown words'
  is_published = talks == SIZES
  corpus = utterances.Corpus(
    train=parts[train],
    validation=parts[validation],
    test=parts[test],
    rate=rate,
    frame_rate=None,
    numbers=None,
    skipped=skips.by_reason(),
    source=utterances.source(
      description,
      list(parts.values()),
      otherwise='TED-LIUM'
      if is_published
      else 'speech in the layout of TED-LIUM',
    ),
  )
  return utterances.check_sets(corpus, where=data_dir)


def clean(text: str) -> tuple[str, int]:
  """Removes labels and pronunciation variants from a transcript.

  Args:
    text: the text in a file.

  Returns:
    Lower-case words separated by single spaces, and the number of removed
    labels.
  """
  text, labels = _LABEL.subn(' ', text)
  text = ' '.join(_VARIANT.sub('', text).lower().split())
  return _APOSTROPHE.sub('', text), labels


def _read_part(data_dir, name, rate, skips):
  folder = harness.find(
    data_dir,
    [f'{name}/stm'],
    folders=FOLDERS,
    advice=ADVICE,
    is_folder=True,
  )
  items, talks, labels = [], set(), 0
  for path in sorted(folder.glob('*.stm')):
    reading.check_inside(path, folder)
    for number, line in enumerate(reading.read_lines(path, 'transcript'), 1):
      if not line.strip() or line.startswith(';;'):
        continue
      talk, speaker, start, stop, text = _parse_segment(path, number, line)
      talks.add(talk)
      sound = folder.parent / 'sph' / f'{talk}.sph'
      reading.check_inside(sound, folder.parent, f'{path}, line {number}')
      # Kaldi's names, with times in hundredths of a second.
      utterance = f'{talk}-{round(100 * start):07d}-{round(100 * stop):07d}'
      if text.strip().lower() == IGNORED or speaker == 'inter_segment_gap':
        skips.add('not to be scored', utterance)
        continue
      text, count = clean(text)
      try:
        items.append(
          utterances.from_audio(
            utterance,
            text,
            speaker,
            sound,
            rate=rate,
            start=start,
            stop=stop,
          )
        )
        labels += count
      except audio.AudioError as error:
        skips.add(error.reason, utterance)
  return tuple(items), len(talks), labels


def _parse_segment(path, number, line):
  where = f'{path}, line {number}'
  words = line.split(maxsplit=5)
  if len(words) < 5:
    raise reading.damaged(
      where,
      f'it has {len(words)} words; a segment has at least 5: talk, channel, '
      'speaker, start, stop',
      reading.CORRECT,
    )
  talk, _, speaker = words[:3]
  times = []
  for word in words[3:5]:
    try:
      times.append(float(word if '_' not in word else 'nan'))
    except ValueError:
      raise reading.damaged(
        where,
        f'{reading.shorten(word)!r} is not a time in seconds',
        reading.CORRECT,
      ) from None
  start, stop = times
  if not 0 <= start < stop <= _LAST_SECOND:
    raise reading.damaged(
      where,
      f'a segment needs 0 <= start < stop <= {_LAST_SECOND:,}, got '
      f'{reading.shorten(words[3])} and {reading.shorten(words[4])}',
      reading.CORRECT,
    )
  text = words[5] if len(words) > 5 else ''
  # Removes condition labels, such as <o,f0,male>, before the text.
  return talk, speaker, start, stop, _CONDITION.sub('', text)
