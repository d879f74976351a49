"""LibriSpeech, and other speech in its layout: read books.

    LibriSpeech/<part>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac
    LibriSpeech/<part>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt

A line of a transcript has the name of an utterance and its text.
"""

import os
import pathlib
import re

from experiments import harness
from experiments.harness.data import reading
from experiments.harness.store import files
from experiments.speech import audio, utterances

RATE = 16_000
FOLDERS = ('', 'LibriSpeech', 'speech/LibriSpeech', 'librispeech/LibriSpeech')
ADVICE = (
  'get the parts of LibriSpeech (train-clean-100.tar.gz and others) from '
  'https://www.openslr.org/12, unpack them, and give the folder that has '
  'LibriSpeech by --data_dir'
)
# Name of an utterance, which is that of a file without a folder.
_NAME = re.compile(r'[^/\s\0-]+(-[^/\s\0-]+){2,}')
_LONGEST_NAME = 200
# Number of utterances of each published part.
SIZES = {
  'train-clean-100': 28_539,
  'train-clean-360': 104_014,
  'train-other-500': 148_688,
  'dev-clean': 2_703,
  'dev-other': 2_864,
  'test-clean': 2_620,
  'test-other': 2_939,
}


def read(
  data_dir: files.Path | None,
  *,
  train: str = 'train-clean-100',
  unlabelled: str = '',
  validation: str = 'dev-clean',
  test: str = 'test-clean',
  rate: int = RATE,
) -> utterances.Corpus:
  """Reads parts of LibriSpeech.

  Args:
    data_dir: folder of data sets.
    train: training parts, joined by commas.
    unlabelled: further training parts, whose transcripts are ignored.
    validation: validation parts.
    test: test parts.
    rate: sampling rate to resample to, hertz.

  Returns:
    The corpus with lower-case texts. Training audio without a transcript has no
    text.

  Raises:
    MissingDataError: if a part is missing; says where to get it.
    DamagedDataError: if a line of a transcript is invalid, or a set is empty.
    SettingsError: if a part is in two sets.
  """
  wanted = {
    'train': _names(train),
    'unlabelled': _names(unlabelled),
    'validation': _names(validation),
    'test': _names(test),
  }
  everything = [name for names in wanted.values() for name in names]
  if repeated := sorted({n for n in everything if everything.count(n) > 1}):
    raise harness.SettingsError(
      f'{", ".join(repeated)} is used twice: training, validation and test '
      'need different parts.'
    )
  skips = utterances.Skips()
  parts = {
    name: _read_part(
      data_dir, name, rate, skips, set_name in ('train', 'unlabelled')
    )
    for set_name, names in wanted.items()
    for name in names
  }
  sets = {
    set_name: tuple(u for name in names for u in parts[name])
    for set_name, names in wanted.items()
  }
  without = tuple(u._replace(text=None) for u in sets['unlabelled'])
  is_published = all(
    SIZES.get(name) == len(items) for name, items in parts.items()
  )
  corpus = utterances.Corpus(
    train=(*sets['train'], *without),
    validation=sets['validation'],
    test=sets['test'],
    rate=rate,
    frame_rate=None,
    numbers=None,
    skipped=skips.by_reason(),
    source=utterances.source(
      f'{", ".join(everything)} in {data_dir}',
      list(parts.values()),
      otherwise='LibriSpeech'
      if is_published
      else 'speech in the layout of LibriSpeech',
    ),
  )
  return utterances.check_sets(corpus, where=data_dir)


def _names(parts):
  return [name.strip() for name in parts.split(',') if name.strip()]


def _read_part(data_dir, name, rate, skips, text_optional):
  folder = harness.find(
    data_dir, [name], folders=FOLDERS, advice=ADVICE, is_folder=True
  )
  items = []
  for place, inner, names in os.walk(folder):
    inner.sort()
    texts: dict[str, str] = {}
    for file in sorted(n for n in names if n.endswith('.trans.txt')):
      path = reading.check_inside(pathlib.Path(place) / file, folder)
      _read_texts(path, texts)
    recorded = {n[: -len('.flac')] for n in names if n.endswith('.flac')}
    for utterance in sorted(recorded | set(texts)):
      text = texts.get(utterance)
      if text is None and not text_optional:
        skips.add('no transcript', utterance)
        continue
      path = pathlib.Path(place) / f'{utterance}.flac'
      reading.check_inside(path, folder)
      try:
        items.append(
          utterances.from_audio(
            utterance, text, utterance.partition('-')[0], path, rate=rate
          )
        )
      except audio.AudioError as error:
        skips.add(error.reason, utterance)
  return tuple(items)


def _read_texts(path, texts):
  for number, line in enumerate(reading.read_lines(path, 'transcript'), 1):
    if not line.strip():
      continue
    name, _, text = line.strip().partition(' ')
    where = f'{path}, line {number}'
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
      raise reading.damaged(
        where,
        'a line has to start with the name of an utterance, '
        f'speaker-chapter-number, got {name[:40]!r}',
        reading.CORRECT,
      )
    if name in texts:
      raise reading.damaged(
        where, f'{name} has a second text', 'remove one of them'
      )
    texts[name] = ' '.join(text.lower().split())
