"""AN4 of Carnegie Mellon University: spelled words and numbers, as features.

The archive of the Sphinx recognisers has no waveforms. A `.mfc` file is a
big-endian int32, the count of the values, and then the values, float32: 13
cepstral coefficients per frame, 100 frames per second. The lists and
transcripts in `etc/` define the training set (948 utterances of 74 speakers)
and the test set (130 utterances of ten other speakers).
"""

import re

import numpy as np

from experiments import harness
from experiments.harness.data import reading
from experiments.harness.store import files
from experiments.speech import archive, audio, utterances

NUMBERS, FRAME_RATE = 13, 100.0
FOLDERS = ('', 'speech', 'an4_mfcc')
ADVICE = (
  'get the AN4 database of features, a folder an4 with etc and feat or its '
  'archive an4_mfcc.tar.gz, from http://www.speech.cs.cmu.edu/databases/an4'
)
_MOST_BYTES = 2**28
_MARKS = re.compile(r'</?s>|<sil>|\+\+\w+\+\+', re.IGNORECASE)


def read(
  data_dir: files.Path | None, *, validation_speakers: int = 8, seed: int = 0
) -> utterances.Corpus:
  """Reads AN4 from its folder or from its archive.

  Args:
    data_dir: folder of data sets.
    validation_speakers: training speakers that are held out for validation.
    seed: selects the validation speakers.

  Returns:
    The corpus with lower-case texts and the official test set.

  Raises:
    MissingDataError: if the data is missing; says where to get it.
    DamagedDataError: if a line of a list or a transcript is invalid, or a set
      is empty.
    SettingsError: if no speaker would be left for training.
  """
  path, contents = archive.read(
    data_dir,
    folder='an4',
    archive='an4_mfcc.tar.gz',
    wanted=_is_read,
    folders=FOLDERS,
    advice=ADVICE,
  )
  skips = utterances.Skips()
  train = _read_part(path, contents, 'train', skips)
  test = _read_part(path, contents, 'test', skips)
  if not train:
    raise reading.damaged(
      f'{path}, etc/an4_train.fileids', 'no utterance with features is listed'
    )
  names = sorted({u.speaker for u in train})
  if not 0 < validation_speakers < len(names):
    raise harness.SettingsError(
      f'{validation_speakers} speakers cannot be held out for validation: '
      f'there are {len(names)} training speakers, and some have to remain.'
    )
  names.sort(key=lambda name: utterances.order(name, seed))
  held_out = set(names[:validation_speakers])
  corpus = utterances.Corpus(
    train=tuple(u for u in train if u.speaker not in held_out),
    validation=tuple(u for u in train if u.speaker in held_out),
    test=test,
    rate=None,
    frame_rate=FRAME_RATE,
    numbers=NUMBERS,
    skipped=skips.by_reason(),
    source=utterances.source(
      f'AN4 in {path}, {len(train)} and {len(test)} utterances',
      [train, test],
      otherwise='speech in the layout of AN4',
    ),
  )
  return utterances.check_sets(corpus, where=path)


def _is_read(name):
  return name.endswith('.mfc') or (
    name.startswith('etc/') and name.endswith(('.fileids', '.transcription'))
  )


def _lines(path, contents, name):
  if name not in contents:
    raise harness.MissingDataError(f'{name} is missing in {path}: {ADVICE}.')
  return [
    reading.decode(line, f'{path}, {name}, line {number}', first=number == 1)
    for number, line in enumerate(contents[name].split(b'\n'), 1)
  ]


def _read_part(path, contents, part, skips):
  texts = {}
  name = f'etc/an4_{part}.transcription'
  for number, line in enumerate(_lines(path, contents, name), 1):
    if not line.strip():
      continue
    text, bracket, utterance = line.strip().removesuffix(')').rpartition('(')
    if not bracket or not line.strip().endswith(')') or not utterance.strip():
      raise reading.damaged(
        f'{path}, {name}, line {number}',
        'a transcript has to end with the name of its utterance in brackets, '
        f'got {line.strip()[-40:]!r}',
        reading.CORRECT,
      )
    if utterance in texts:
      raise reading.damaged(
        f'{path}, {name}, line {number}',
        f'{reading.shorten(utterance)} has a second text',
        'remove one of them',
      )
    texts[utterance] = ' '.join(_MARKS.sub(' ', text).lower().split())
  utterances_read = []
  for line in _lines(path, contents, f'etc/an4_{part}.fileids'):
    place = line.strip()
    if not place:
      continue
    name = place.rpartition('/')[2]
    speaker = place.split('/')[-2] if '/' in place else ''
    text = texts.get(name)
    if text is None and part == 'test':
      skips.add('no transcript', name)
      continue
    try:
      content = contents.get(f'feat/{place}.mfc')
      if content is None:
        raise audio.AudioError(f'{place}.mfc is not in {path}.', 'no such file')
      length = _count_frames(content, f'{path}, {place}.mfc')
    except audio.AudioError as error:
      skips.add(error.reason, name)
      continue
    load = utterances.LazyCall(_load, content, f'{path}, {place}.mfc')
    utterances_read.append(
      utterances.Utterance(
        name, text, speaker, length, length / FRAME_RATE, load
      )
    )
  return tuple(utterances_read)


def read_features(path: files.Path) -> np.ndarray:
  """Reads a .mfc file of features.

  Args:
    path: the file.

  Returns:
    float32 (frames, 13).

  Raises:
    AudioError: if the file is missing or invalid.
  """
  try:
    content = reading.read_small(path, 'file of features', _MOST_BYTES)
  except harness.UserError as error:
    raise audio.AudioError(str(error), 'no such file') from error
  _count_frames(content, str(path))
  return _load(content, str(path))[0]


def _count_frames(content, name):
  announced = int.from_bytes(content[:4], 'big')
  if len(content) < 4 or 4 + 4 * announced != len(content):
    raise audio.AudioError(
      f'{name} is truncated or not a Sphinx feature file: its header announces '
      f'{announced:,} numbers, but it has {max(0, len(content) // 4 - 1):,}: '
      'get it again.',
      'cut short',
    )
  if announced % NUMBERS or not announced:
    raise audio.AudioError(
      f'{name} has {announced:,} numbers, not a multiple of {NUMBERS} per '
      'frame: get it again.',
      'empty audio' if not announced else 'damaged audio',
    )
  return announced // NUMBERS


def _load(content, name):
  values = np.frombuffer(content, '>f4', offset=4).astype(np.float32)
  if not np.isfinite(values).all():
    raise audio.AudioError(
      f'{name} contains a non-finite number: get it again.',
      'non-finite samples',
    )
  return values.reshape(-1, NUMBERS), None
