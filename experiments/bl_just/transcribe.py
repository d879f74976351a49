"""Writes down what is said in files of audio.

    python -m experiments.bl_just.transcribe --checkpoint=WORKDIR a.wav b.flac

The checkpoint is the workdir of `train`, or a file recogniser.npz. One line a
file: its name, a tab, the text. Files of any sampling rate are resampled; of a
checkpoint that was trained on given features, files are in Sphinx's format
.mfc. `--beam` above 1 searches, with `--language=FILE.arpa` beside a model of
language. `--picture=FILE.png` draws the first file, and what was understood
where. A file that cannot be read is named, the others go on, and the exit
status is 1.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.bl_just import (
  an4,
  audio,
  decoding,
  feed,
  fusion,
  ngram,
  picture,
  problem,
  recogniser,
  units,
)
from experiments.harness import files

# Lengths to which audio is filled up, in seconds: a program is compiled for
# each that occurs.
_SECONDS = (2.0, 4.0, 8.0, 16.0, 32.0)


class Heard(NamedTuple):
  """What a network makes of one file.

  Attributes:
    text: what was understood.
    spectrum: features (frames, numbers).
    log_probs: of the units, (out frames, units).
    labels: of the text.
  """

  text: str
  spectrum: np.ndarray
  log_probs: np.ndarray
  labels: np.ndarray


class Transcriber:
  """A trained recogniser, ready to be asked.

  Args:
    checkpoint: workdir of `train`, or a file of it.
    beam: beginnings that a search keeps; 1 takes the likeliest path.
    language: file of a model of language in ARPA's format, or None.
    weight: of that model.
    bonus: for each unit.

  Raises:
    UserError: for files that are missing or damaged.
  """

  def __init__(
    self,
    checkpoint: files.Path,
    *,
    beam: int = 1,
    language: files.Path | None = None,
    weight: float = 0.5,
    bonus: float = 0.0,
  ):
    if beam < 1:
      raise harness.SettingsError(f'--beam={beam}: beam is at least 1.')
    if language is not None and beam < 2:
      raise harness.SettingsError(
        'a model of language is used by a search: give --beam=16 with '
        '--language.'
      )
    self.network, self._weights, kept = recogniser.load(checkpoint)
    with harness.parsing(checkpoint, 'recogniser'):
      self.units = units.parse(kept.encode())
    self._beam, self._search = beam, {'weight': weight, 'bonus': bonus}
    if language is not None:
      self._search['model'] = fusion.OfWords(
        ngram.read_arpa(language), self.units
      )

  def read(self, path: files.Path) -> np.ndarray:
    """Samples at the network's rate, or given features."""
    front = self.network.shape.front
    if front.rate is not None:
      return audio.read(audio.part_of(path, rate=front.rate))
    return problem.with_deltas(an4.features(path))

  def hear(self, content: np.ndarray) -> Heard:
    """What is said in samples, or in features.

    Args:
      content: (samples,) or (frames, numbers).

    Returns:
      What was understood.
    """
    front = self.network.shape.front
    a_second = front.rate or round(1 / front.hop)
    sizes = [round(s * a_second) for s in _SECONDS]
    size = next((s for s in sizes if s >= len(content)), len(content))
    features, found, out = self.network.outputs(
      self._weights, *feed.side_by_side([content], size)
    )
    log_probs = np.asarray(found[0], np.float64)[: int(out[0])]
    labels = np.zeros(0, np.int32)
    if len(log_probs) and self._beam > 1:
      (labels,) = decoding.decode([log_probs], width=self._beam, **self._search)
    elif len(log_probs):
      labels = decoding.collapse(np.argmax(log_probs, axis=-1))
    frames = int(recogniser.front_end.frames_of(front, len(content)))
    spectrum = np.asarray(features[0])[:frames]
    return Heard(self.units.decode(labels), spectrum, log_probs, labels)

  def draw(self, path: files.Path, heard: Heard, title: str = '') -> None:
    """Draws spectrum and units of what was heard; needs a text."""
    picture.draw(
      path,
      heard.spectrum,
      heard.log_probs,
      heard.labels,
      self.units.symbols,
      seconds=len(heard.log_probs) * self.network.shape.frame,
      title=title or heard.text,
    )


def transcribe(
  transcriber: Transcriber, paths: Sequence[files.Path]
) -> Iterator[tuple[files.Path, Heard | harness.UserError]]:
  """Texts of files, one after the other; an error in place of one."""
  for path in paths:
    try:
      yield path, transcriber.hear(transcriber.read(path))
    except harness.UserError as error:
      yield path, error


def main(arguments: Sequence[str]) -> int:
  """Transcribes what the command line says; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.bl_just.transcribe',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('files', nargs='+', help='audio')
  add = functools.partial(parser.add_argument, metavar='X')
  add('--checkpoint', required=True, help='workdir of train, or its file .npz')
  add(
    '--beam',
    type=int,
    default=1,
    help='beginnings that a search keeps; 1: none',
  )
  add('--language', help='file .arpa of a model of language, with --beam')
  add('--weight', type=float, default=0.5, help='of that model (%(default)s)')
  add(
    '--bonus',
    type=float,
    default=0.0,
    help='added in a search for each unit: above 0, texts are longer '
    '(%(default)s)',
  )
  add('--picture', help='file .png to draw the first file into')
  flags = parser.parse_args(arguments)
  told: Any = []
  status = 0
  try:
    transcriber = Transcriber(
      flags.checkpoint,
      beam=flags.beam,
      language=flags.language,
      weight=flags.weight,
      bonus=flags.bonus,
    )
    for path, heard in transcribe(transcriber, flags.files):
      if isinstance(heard, harness.UserError):
        print(f'transcribe: {" ".join(str(heard).split())}', file=sys.stderr)
        status = 1
        continue
      print(f'{path}\t{heard.text}', flush=True)
      told.append((path, heard))
    if flags.picture and told:
      path, heard = told[0]
      if len(heard.labels):
        name = pathlib.Path(path).name
        transcriber.draw(flags.picture, heard, f'{name}: {heard.text}')
      else:
        print(f'transcribe: nothing to draw in {path}.', file=sys.stderr)
  except harness.UserError as error:
    print(f'transcribe: {" ".join(str(error).split())}', file=sys.stderr)
    return 1
  return status


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
