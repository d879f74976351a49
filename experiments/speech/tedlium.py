"""TED-LIUM, release 2, and whatever is laid out as it: talks.

    TEDLIUM_release2/<part>/sph/<talk>.sph
    TEDLIUM_release2/<part>/stm/<talk>.stm

A line of a transcript is `talk channel speaker start stop <labels> text`, times
in seconds; a talk is one file and its segments are parts of it.

| in a text | then |
|---|---|
| `ignore_time_segment_in_scoring` | the segment is left out, counted |
| `<unk>`, `[noise]`, `{BREATH}` and the like | left out of the text, counted |
| `word(2)`, a way to pronounce it | `word` |
| `it 's` | `it's` |
"""

import re

from experiments import harness
from experiments.harness.data import sources
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
# Talks of each part as it was published.
SIZES = {'train': 1_495, 'dev': 8, 'test': 11}
IGNORED = 'ignore_time_segment_in_scoring'
_LABEL = re.compile(r'<[^<>\s]*>|\[[^\[\]]*\]|\{[^{}]*\}')
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
    train: part to learn from.
    validation: part to choose with.
    test: part to report on.
    rate: samples a second, resampled to.

  Returns:
    The corpus, texts in small letters.

  Raises:
    MissingDataError: if a part is not there; says where to get it.
    DamagedDataError: if a line of a transcript is none, or nothing is left of
      train, validation or test.
  """
  skips = utterances.Skips()
  found, talks, labels = {}, {}, 0
  for name in dict.fromkeys((train, validation, test)):
    found[name], talks[name], more = _part(data_dir, name, rate, skips)
    labels += more
  whole = talks == SIZES
  words = f'{", ".join(found)} of TED-LIUM in {data_dir}'
  if labels:
    words += f', {labels:,} labels of noise and unknown words left out of texts'
  corpus = utterances.Corpus(
    train=found[train],
    validation=found[validation],
    test=found[test],
    rate=rate,
    frame_rate=None,
    numbers=None,
    skipped=skips.found(),
    source=utterances.source(
      words,
      list(found.values()),
      otherwise='TED-LIUM' if whole else 'speech in the layout of TED-LIUM',
    ),
  )
  return utterances.checked(corpus, where=data_dir)


def clean(text: str) -> tuple[str, int]:
  """The words of a transcript.

  Args:
    text: as it is in a file.

  Returns:
    Words with a space between, in small letters, and how many labels were left
    out.
  """
  text, labels = _LABEL.subn(' ', text)
  text = ' '.join(_VARIANT.sub('', text).lower().split())
  return _APOSTROPHE.sub('', text), labels


def _part(data_dir, name, rate, skips):
  folder = harness.find(
    data_dir,
    [f'{name}/stm'],
    folders=FOLDERS,
    advice=ADVICE,
    is_folder=True,
  )
  found, talks, labels = [], set(), 0
  for path in sorted(folder.glob('*.stm')):
    for number, line in enumerate(sources.read_lines(path, 'transcript'), 1):
      if not line.strip() or line.startswith(';;'):
        continue
      talk, speaker, start, stop, text = _segment(path, number, line)
      talks.add(talk)
      # As Kaldi names them: times in hundredths of a second, in order.
      utterance = f'{talk}-{round(100 * start):07d}-{round(100 * stop):07d}'
      if text.strip().lower() == IGNORED or speaker == 'inter_segment_gap':
        skips.add('not to be scored', utterance)
        continue
      text, more = clean(text)
      try:
        found.append(
          utterances.from_audio(
            utterance,
            text,
            speaker,
            folder.parent / 'sph' / f'{talk}.sph',
            rate=rate,
            start=start,
            stop=stop,
          )
        )
        labels += more
      except audio.AudioError as error:
        skips.add(error.reason, utterance)
  return tuple(found), len(talks), labels


def _segment(path, number, line):
  where = f'{path}, line {number}'
  words = line.split(maxsplit=5)
  if len(words) < 5:
    raise harness.DamagedDataError(
      f'{where} has {len(words)} words; a segment has at least 5: talk, '
      'channel, speaker, start, stop.'
    )
  talk, _, speaker = words[:3]
  times = []
  for word in words[3:5]:
    try:
      times.append(float(word))
    except ValueError:
      raise harness.DamagedDataError(
        f'{where}: {word!r} is no time in seconds.'
      ) from None
  start, stop = times
  if not 0 <= start < stop < float('inf'):
    raise harness.DamagedDataError(
      f'{where}: a segment starts at 0 or later and stops after that, got '
      f'{words[3]} and {words[4]}.'
    )
  text = words[5] if len(words) > 5 else ''
  # The labels of conditions, <o,f0,male>, are before the text.
  return talk, speaker, start, stop, re.sub(r'^<[^<>]*,[^<>]*>', '', text)
