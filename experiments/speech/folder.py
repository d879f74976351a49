"""Speech of the user: a folder of audio files and a file of transcripts.

Each line of the file has the path of an audio file relative to the folder, a
tab, and the text. Audio files without a line have no text.
"""

import os
import pathlib

from experiments import harness
from experiments.harness.data import reading
from experiments.harness.store import files
from experiments.speech import audio, utterances

RATE = 16_000
TABLE = 'texts.tsv'
ENDS = ('.wav', '.flac', '.sph', '.ogg', '.opus', '.mp3', '.aiff', '.aif')
# Characters of an utterance; an hour of speech has about 50,000.
_MOST_TEXT = 20_000
ADVICE = (
  f'give a folder of audio with a file {TABLE}, whose lines have a path, a '
  'tab, and a text'
)


def read(
  data_dir: files.Path | None,
  *,
  table: str = TABLE,
  validation: float | str = 0.1,
  test: float | str = 0.1,
  seed: int = 0,
  rate: int = RATE,
  lower: bool = True,
) -> utterances.Corpus:
  """Reads a folder of audio with texts.

  Args:
    data_dir: the folder.
    table: the file of texts, relative to the folder.
    validation: fraction of the utterances with a text to draw for validation;
      or the file of a validation set, in the form of `table`.
    test: the same for the test set.
    seed: seed of the draw. It sorts utterances by their path alone, so that
      adding audio moves few of them to another set.
    rate: sampling rate to resample to, hertz.
    lower: whether texts are converted to lower case.

  Returns:
    The corpus. The speaker is the folder of the audio.

  Raises:
    MissingDataError: if a file of texts is missing.
    DamagedDataError: if a line is invalid, a path has two texts, or a set is
      empty.
    SettingsError: if the fractions leave nothing for training.
  """
  fractions = [x for x in (validation, test) if not isinstance(x, str)]
  if not all(0 < x < 1 for x in fractions) or sum(fractions) >= 1:
    raise harness.SettingsError(
      'the fractions for validation and test have to be above 0 and leave '
      f'something for training, got {validation} and {test}.'
    )
  skips = utterances.Skips()
  lines: dict[str, str] = {}
  read_table = lambda name: _read_table(
    data_dir, name, lines, rate, lower, skips
  )
  labelled = read_table(table)
  sets = {
    name: read_table(size) if isinstance(size, str) else None
    for name, size in (('validation', validation), ('test', test))
  }
  ordered = sorted(labelled, key=lambda u: utterances.order(u.name, seed))
  total = len(ordered)
  for name, size in (('validation', validation), ('test', test)):
    if not isinstance(size, str):
      count = max(1, round(size * total))
      sets[name], ordered = ordered[:count], ordered[count:]
  remaining = {u.name for u in ordered}
  train = [u for u in labelled if u.name in remaining]
  train += _read_without_text(data_dir, lines, rate, skips)
  corpus = utterances.Corpus(
    train=tuple(train),
    validation=_sorted(sets['validation']),
    test=_sorted(sets['test']),
    rate=rate,
    frame_rate=None,
    numbers=None,
    skipped=skips.by_reason(),
    source=utterances.source(
      f'audio in {data_dir}',
      [[*train, *(sets['validation'] or ()), *(sets['test'] or ())]],
      otherwise="a folder of one's own",
    ),
  )
  return utterances.check_sets(corpus, where=data_dir)


def _sorted(items):
  return tuple(sorted(items, key=lambda u: u.name))


def _utterance(data_dir, name, text, rate):
  speaker = pathlib.PurePath(name).parent.name
  path = pathlib.Path(data_dir) / name
  return utterances.from_audio(name, text, speaker, path, rate=rate)


def _read_table(data_dir, table, lines, rate, lower, skips):
  path = harness.find(data_dir, [table], advice=ADVICE)
  items = []
  for number, line in enumerate(reading.read_lines(path, 'file of texts'), 1):
    line = line.rstrip('\r\n')
    if not line.strip():
      continue
    where = f'{path}, line {number}'
    name, tab, text = line.partition('\t')
    if not tab or not name.strip():
      raise reading.damaged(
        where,
        f'a line has to be a path, a tab, and a text, got {line[:40]!r}',
        reading.CORRECT,
      )
    name = pathlib.PurePath(os.path.normpath(name.strip())).as_posix()
    reading.check_inside(pathlib.Path(data_dir) / name, data_dir, where)
    if name in lines:
      raise harness.DamagedDataError(
        f'{where}: {reading.shorten(name)} already has a text in '
        f'{lines[name]}: remove one of the lines.'
      )
    lines[name] = where
    text = ' '.join(text.split())
    if len(text) > _MOST_TEXT:
      raise reading.damaged(
        where,
        f'its text has {len(text):,} characters, more than {_MOST_TEXT:,}',
        'split the audio and its text',
      )
    try:
      items.append(
        _utterance(data_dir, name, text.lower() if lower else text, rate)
      )
    except audio.AudioError as error:
      skips.add(error.reason, f'{name} ({where})')
  return items


def _read_without_text(data_dir, lines, rate, skips):
  items = []
  for place, inner, names in os.walk(data_dir):
    inner.sort()
    for file in sorted(names):
      path = pathlib.Path(place) / file
      name = path.relative_to(data_dir).as_posix()
      if path.suffix.lower() not in ENDS or name in lines:
        continue
      reading.check_inside(path, data_dir)
      try:
        items.append(_utterance(data_dir, name, None, rate))
      except audio.AudioError as error:
        skips.add(error.reason, name)
  return items
