"""A user's own speech: any folder of audio, and a file of what is said.

A line of the file is the path of a piece of audio, below the folder, a tab, and
its text. Audio below the folder that has no line is used without a text.
"""

import os
import pathlib

from experiments import harness
from experiments.harness.data import sources
from experiments.harness.store import files
from experiments.speech import audio, utterances

RATE = 16_000
TABLE = 'texts.tsv'
ENDS = ('.wav', '.flac', '.sph', '.ogg', '.opus', '.mp3', '.aiff', '.aif')
ADVICE = (
  f'a folder of speech has audio and a file {TABLE} with lines of a path, a '
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
    table: the file of texts, below the folder.
    validation: the share of the utterances with a text that is for choosing,
      drawn by the seed; or a file of their own, as `table`.
    test: likewise, for what is reported.
    seed: of what is drawn. An utterance's place depends on its path alone, so
      that most stay where they are when there is more audio.
    rate: samples a second, resampled to.
    lower: whether texts are put into small letters.

  Returns:
    The corpus. The speaker is the folder of the audio.

  Raises:
    MissingDataError: if a file of texts is not there.
    DamagedDataError: if a line has no tab, or a path has two; names it. If
      nothing is left for train, validation or test.
    SettingsError: if the shares leave nothing for training.
  """
  shares = [x for x in (validation, test) if not isinstance(x, str)]
  if not all(0 < share < 1 for share in shares) or sum(shares) >= 1:
    raise harness.SettingsError(
      'the shares for validation and test are above 0 and leave something for '
      f'training, got {validation} and {test}.'
    )
  skips = utterances.Skips()
  seen: dict[str, str] = {}
  make = lambda name: _read_table(data_dir, name, seen, rate, lower, skips)
  labelled = make(table)
  sets = {
    name: make(given) if isinstance(given, str) else None
    for name, given in (('validation', validation), ('test', test))
  }
  ordered = sorted(labelled, key=lambda u: utterances.order(u.name, seed))
  count = len(ordered)
  for name, given in (('validation', validation), ('test', test)):
    if not isinstance(given, str):
      size = max(1, round(given * count))
      sets[name], ordered = ordered[:size], ordered[size:]
  left = {u.name for u in ordered}
  train = [u for u in labelled if u.name in left]
  train += _without_text(data_dir, seen, rate, skips)
  corpus = utterances.Corpus(
    train=tuple(train),
    validation=_in_order(sets['validation']),
    test=_in_order(sets['test']),
    rate=rate,
    frame_rate=None,
    numbers=None,
    skipped=skips.found(),
    source=utterances.source(
      f'audio in {data_dir}',
      [[*train, *(sets['validation'] or ()), *(sets['test'] or ())]],
      otherwise="a folder of one's own",
    ),
  )
  return utterances.checked(corpus, where=data_dir)


def _in_order(found):
  return tuple(sorted(found, key=lambda u: u.name))


def _utterance(data_dir, name, text, rate):
  speaker = pathlib.PurePath(name).parent.name
  path = pathlib.Path(data_dir) / name
  return utterances.from_audio(name, text, speaker, path, rate=rate)


def _read_table(data_dir, table, seen, rate, lower, skips):
  path = harness.find(data_dir, [table], advice=ADVICE)
  found = []
  for number, line in enumerate(sources.read_lines(path, 'file of texts'), 1):
    line = line.rstrip('\r\n')
    if not line.strip():
      continue
    where = f'{path}, line {number}'
    name, tab, text = line.partition('\t')
    if not tab or not name.strip():
      raise harness.DamagedDataError(
        f'{where}: a line is a path, a tab, and a text, got {line[:40]!r}.'
      )
    name = pathlib.PurePath(os.path.normpath(name.strip())).as_posix()
    if name in seen:
      raise harness.DamagedDataError(
        f'{where}: {name} has a text already, in {seen[name]}: keep one of '
        'the lines.'
      )
    seen[name] = where
    text = ' '.join(text.split())
    try:
      found.append(
        _utterance(data_dir, name, text.lower() if lower else text, rate)
      )
    except audio.AudioError as error:
      skips.add(error.reason, f'{name} ({where})')
  return found


def _without_text(data_dir, seen, rate, skips):
  found = []
  for place, inner, names in os.walk(data_dir):
    inner.sort()
    for file in sorted(names):
      path = pathlib.Path(place) / file
      name = path.relative_to(data_dir).as_posix()
      if path.suffix.lower() not in ENDS or name in seen:
        continue
      try:
        found.append(_utterance(data_dir, name, None, rate))
      except audio.AudioError as error:
        skips.add(error.reason, name)
  return found
