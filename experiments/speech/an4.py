"""AN4 of Carnegie Mellon University: spelled words and numbers, as features.

The archive that comes with the Sphinx recognisers has no waveforms: a file
`.mfc` is a big-endian int32, how many numbers follow, and as many float32, 13
cepstral coefficients a frame, 100 frames a second. The lists and transcripts in
`etc/` say what is for training (948 utterances of 74 speakers) and for the test
(130 of ten others).
"""

import pathlib
import re

import numpy as np

from experiments import harness
from experiments.harness.data import sources
from experiments.harness.store import files
from experiments.speech import archive, audio, utterances

NUMBERS, FRAME_RATE = 13, 100.0
FOLDERS = ('', 'speech', 'an4_mfcc')
ADVICE = (
  'get the AN4 database of features, a folder an4 with etc and feat or its '
  'archive an4_mfcc.tar.gz, from http://www.speech.cs.cmu.edu/databases/an4'
)
_LINE = re.compile(r'^(.*?)\s*\(([^()\s]+)\)\s*$')
_MARKS = re.compile(r'</?s>|<sil>|\+\+\w+\+\+', re.IGNORECASE)


def read(
  data_dir: files.Path | None, *, validation_speakers: int = 8, seed: int = 0
) -> utterances.Corpus:
  """Reads AN4 from its folder, or straight from its archive.

  Args:
    data_dir: folder of data sets.
    validation_speakers: training speakers that are held out for validation.
    seed: of which they are.

  Returns:
    The corpus, texts in small letters. Its test is the official one.

  Raises:
    MissingDataError: if it is not there; says where to get it.
    DamagedDataError: if a line of a list or a transcript is none, or nothing is
      left of a part.
    SettingsError: if no speaker would be left for training.
  """
  path, found = archive.read(
    data_dir,
    folder='an4',
    archive='an4_mfcc.tar.gz',
    wanted=_is_read,
    folders=FOLDERS,
    advice=ADVICE,
  )
  skips = utterances.Skips()
  train = _part(path, found, 'train', skips)
  test = _part(path, found, 'test', skips)
  names = sorted({u.speaker for u in train})
  if not 0 < validation_speakers < len(names):
    raise harness.SettingsError(
      f'{validation_speakers} speakers cannot be held out for validation, of '
      f'the {len(names)} that there are for training.'
    )
  names.sort(key=lambda name: utterances.order(name, seed))
  held = set(names[:validation_speakers])
  corpus = utterances.Corpus(
    train=tuple(u for u in train if u.speaker not in held),
    validation=tuple(u for u in train if u.speaker in held),
    test=test,
    rate=None,
    frame_rate=FRAME_RATE,
    numbers=NUMBERS,
    skipped=skips.found(),
    source=utterances.source(
      f'AN4 in {path}, {len(train)} and {len(test)} utterances',
      [train, test],
      otherwise='speech in the layout of AN4',
    ),
  )
  return utterances.checked(corpus, where=path)


def _is_read(name):
  return name.endswith('.mfc') or (
    name.startswith('etc/') and name.endswith(('.fileids', '.transcription'))
  )


def _lines(path, found, name):
  if name not in found:
    raise harness.MissingDataError(f'{name} is missing in {path}: {ADVICE}.')
  with sources.parsing(f'{path}, {name}', 'text in UTF-8'):
    return found[name].decode('utf-8').splitlines()


def _part(path, found, part, skips):
  texts = {}
  name = f'etc/an4_{part}.transcription'
  for number, line in enumerate(_lines(path, found, name), 1):
    if not line.strip():
      continue
    match = _LINE.match(line)
    if match is None:
      raise harness.DamagedDataError(
        f'{path}, {name}, line {number}: a transcript ends with the name of '
        f'its utterance in brackets, got {line.strip()[-40:]!r}.'
      )
    text, utterance = match.groups()
    texts[utterance] = ' '.join(_MARKS.sub(' ', text).lower().split())
  utterances_read = []
  for line in _lines(path, found, f'etc/an4_{part}.fileids'):
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
      content = found.get(f'feat/{place}.mfc')
      if content is None:
        raise audio.AudioError(f'{place}.mfc is not in {path}.', 'no such file')
      length = _frames(content, f'{path}, {place}.mfc')
    except audio.AudioError as error:
      skips.add(error.reason, name)
      continue
    load = utterances.Later(_load, content, f'{path}, {place}.mfc')
    utterances_read.append(
      utterances.Utterance(
        name, text, speaker, length, length / FRAME_RATE, load
      )
    )
  return tuple(utterances_read)


def features(path: files.Path) -> np.ndarray:
  """Reads one file of features.

  Args:
    path: of a file .mfc.

  Returns:
    float32 (frames, 13).

  Raises:
    AudioError: if there is no such file, or it holds something else.
  """
  try:
    content = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise audio.AudioError(
      f'{path} cannot be read ({error.strerror}).', 'no such file'
    ) from error
  _frames(content, str(path))
  return _load(content, str(path))[0]


def _frames(content, name):
  announced = int.from_bytes(content[:4], 'big')
  if len(content) < 4 or 4 + 4 * announced != len(content):
    raise audio.AudioError(
      f'{name} is cut short or no Sphinx feature file: it announces '
      f'{announced:,} numbers and has {max(0, len(content) // 4 - 1):,}; get '
      'it again.',
      'cut short',
    )
  if announced % NUMBERS or not announced:
    raise audio.AudioError(
      f'{name} has {announced:,} numbers, which are no frames of {NUMBERS}.',
      'empty audio' if not announced else 'damaged audio',
    )
  return announced // NUMBERS


def _load(content, name):
  values = np.frombuffer(content, '>f4', offset=4).astype(np.float32)
  if not np.isfinite(values).all():
    raise audio.AudioError(
      f'{name} has a number that is not finite: get it again.',
      'samples that are not finite',
    )
  return values.reshape(-1, NUMBERS), None
