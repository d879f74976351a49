"""Transcribes files of audio of any length.

    python -m experiments.speech.transcribe --checkpoint=WORKDIR a.wav b.flac

The checkpoint is the workdir of `train`, or a file recogniser.npz. One line a
file: its name, a tab, the text. Files of any sampling rate are resampled; for a
checkpoint that was trained on given features, files are in Sphinx's format
.mfc. Audio longer than most training utterances is cut in its longest pauses
into segments that are recognised one by one. A segment above 32 seconds is read
in windows that overlap by 4 seconds. Where channels cancel each other out, one
of them is used, with a notice. `--beam` above 1 searches, with a language model
by `--language=FILE.arpa`. `--picture=FILE.png` draws the first segment of the
first file, at most 32 seconds, and what was understood where. A file that
cannot be read, or is shorter than a frame, is named, the others go on, and the
exit status is 1.
"""

import argparse
import functools
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.harness.app import thunks
from experiments.harness.store import files
from experiments.speech import (
  an4,
  audio,
  decoding,
  feed,
  front_end,
  fusion,
  ngram,
  pauses,
  picture,
  recogniser,
  units,
  windows,
)

# Lengths to which audio is filled up, in seconds: a program is compiled for
# each that occurs. The last one is that of a window of longer audio.
_SECONDS = (2.0, 4.0, 8.0, 16.0, 32.0)
# Seconds that windows overlap by, and of a pause in which they are joined.
_OVERLAP, _PAUSE = 4.0, 0.4
# Samples of a file, over all channels, at most; only a window is in memory.
_MOST = 2**36


class Heard(NamedTuple):
  """What a network makes of audio.

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


class Transcript(NamedTuple):
  """What is said in a file.

  Attributes:
    text: of the whole file.
    start: its first segment, at most 32 seconds, to be drawn.
  """

  text: str
  start: Heard


class Transcriber:
  """A trained recogniser, ready to be asked.

  Args:
    checkpoint: workdir of `train`, or a file of it.
    beam: beginnings that a search keeps; 1 takes the likeliest path.
    language: file of a model of language in ARPA's format, or None.
    weight: of that model.
    bonus: for each unit.
    notice: gets lines about files, such as channels that cancel out.

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
    notice: Callable[[str], None] = print,
  ):
    if beam < 1:
      raise harness.SettingsError(f'--beam={beam}: beam is at least 1.')
    if language is not None and beam < 2:
      raise harness.SettingsError(
        'a model of language is used by a search: give --beam=16 with '
        '--language.'
      )
    saved = recogniser.load(checkpoint)
    self.network, self._weights = saved.network, saved.weights
    self._segment = min(saved.utterance_seconds or _SECONDS[-1], _SECONDS[-1])
    with harness.parsing(checkpoint, 'recogniser'):
      self.units = units.parse(saved.units.encode())
    self._notice = notice
    self._beam, self._search = beam, {'weight': weight, 'bonus': bonus}
    if language is not None:
      self._search['model'] = fusion.OfWords(
        ngram.read_arpa(language), self.units
      )

  def transcribe(self, path: files.Path) -> Transcript:
    """Transcribes a file of audio or features.

    Args:
      path: of the file.

    Returns:
      The transcript.

    Raises:
      AudioError: if the file cannot be read, or is shorter than a frame.
    """
    front = self.network.shape.front
    content: Any
    if front.rate is None:
      content = front_end.with_deltas(an4.features(path))
    else:
      part = audio.part_of(path, rate=front.rate, max_samples=_MOST)
      content = _File(part, self._notice)
    if self.network.shape.frames_out(len(content)) < 1:
      raise audio.AudioError(
        f'{path} is shorter than a frame of {front.window:g} seconds: no word '
        'fits into it; leave it out.',
        'shorter than a frame',
      )
    start, texts = None, []
    for segment in self._segments(content):
      labels = []
      for piece in self._pieces(content, *segment):
        start = start or piece
        labels.append(piece.labels)
      texts.append(self.units.decode(np.concatenate(labels)))
    assert start is not None
    # A pause ends a word.
    return Transcript(' '.join(filter(None, texts)), start)

  def _segments(self, content: Any) -> list[tuple[int, int]]:
    """Cuts a file in pauses; returns the start and stop of each segment."""
    front = self.network.shape.front
    length = len(content)
    if front.rate is None or length <= self._segment * front.rate:
      return [(0, length)]
    hop = front.samples[1]
    block = round(_SECONDS[-1] * front.rate) // hop * hop
    levels = [
      pauses.compute_levels(content[first : min(first + block, length)], hop)
      for first in range(0, length, block)
    ]
    segments = pauses.segments(
      np.concatenate(levels), front.rate / hop, self._segment
    )
    return [(first * hop, last * hop) for first, last in segments]

  def hear(self, content: np.ndarray) -> Heard:
    """Recognises one utterance of samples, or of features.

    Args:
      content: (samples,) or (frames, numbers), of any length; it is not cut in
        pauses.

    Returns:
      What was understood.
    """
    pieces = list(self._pieces(content, 0, len(content)))
    labels = np.concatenate([piece.labels for piece in pieces])
    return Heard(
      self.units.decode(labels),
      np.concatenate([piece.spectrum for piece in pieces]),
      np.concatenate([piece.log_probs for piece in pieces]),
      labels,
    )

  def _pieces(self, content: Any, first: int, last: int) -> Iterator[Heard]:
    """Hears a segment window by window, and cuts what several windows have.

    Args:
      content: gives arrays of slices.
      first: sample or frame of the segment.
      last: sample or frame after the segment.

    Yields:
      What follows upon each other; together, each frame once.
    """
    shape = self.network.shape
    a_second = shape.front.rate or round(1 / shape.front.hop)
    stride = shape.shrink * (shape.front.samples[1] if shape.front.rate else 1)
    spans = [
      (first + start, first + stop)
      for start, stop in windows.spans(
        last - first,
        round(_SECONDS[-1] * a_second),
        round(_OVERLAP * a_second),
        stride,
      )
    ]
    begin, last_label = 0, units.BLANK
    spectrum, log_probs = self._outputs(content[slice(*spans[0])])
    for (start, _), span in itertools.pairwise(spans):
      later = self._outputs(content[slice(*span)])
      # From here on, both windows have frames.
      shared = (span[0] - start) // stride
      before = log_probs[shared:, units.BLANK]
      after = later[1][: len(before), units.BLANK]
      seam = windows.seam(before, after, round(_PAUSE / shape.frame))
      stop = shared + seam
      yield self._decode(spectrum, log_probs, begin, stop, last_label)
      begin, last_label = seam, int(np.argmax(log_probs[stop - 1]))
      spectrum, log_probs = later
    yield self._decode(spectrum, log_probs, begin, len(log_probs), last_label)

  def _outputs(self, content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and log-probabilities of one window."""
    front = self.network.shape.front
    a_second = front.rate or round(1 / front.hop)
    sizes = [round(s * a_second) for s in _SECONDS]
    size = next(s for s in sizes if s >= len(content))
    features, found, out = self.network.outputs(
      self._weights, *feed.side_by_side([content], size)
    )
    frames = int(front_end.frames_of(front, len(content)))
    log_probs = np.asarray(found[0], np.float64)[: int(out[0])]
    return np.asarray(features[0])[:frames], log_probs

  def _decode(
    self,
    spectrum: np.ndarray,
    log_probs: np.ndarray,
    first: int,
    stop: int,
    last_label: int,
  ) -> Heard:
    """Decodes frames of a window, after a frame with the label `last_label`."""
    log_probs = log_probs[first:stop]
    shrink = self.network.shape.shrink
    labels = np.zeros(0, np.int32)
    if len(log_probs) and self._beam > 1:
      (labels,) = decoding.decode([log_probs], width=self._beam, **self._search)
    elif len(log_probs):
      labels = decoding.collapse(np.argmax(log_probs, axis=-1))
    if len(labels) and np.argmax(log_probs[0]) == labels[0] == last_label:
      labels = labels[1:]  # It goes on from the window before.
    text = self.units.decode(labels)
    return Heard(
      text, spectrum[first * shrink : stop * shrink], log_probs, labels
    )

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


class _File:
  """The samples of a file; reads only the slices that are asked for."""

  def __init__(self, part: audio.Part, notice: Callable[[str], None]):
    self._part = part
    # A notice is the same for all slices.
    self._notice = functools.cache(notice)

  def __len__(self) -> int:
    return self._part.length

  def __getitem__(self, place: slice) -> np.ndarray:
    part = audio.span(self._part, place.start, place.stop)
    return audio.read(part, self._notice)[: place.stop - place.start]


def transcribe(
  transcriber: Transcriber, paths: Sequence[files.Path]
) -> Iterator[tuple[files.Path, Transcript | harness.UserError]]:
  """Transcribes files in order; yields an error for a file that has one."""
  for path in paths:
    try:
      yield path, transcriber.transcribe(path)
    except harness.UserError as error:
      yield path, error


def _tell(message: Any) -> None:
  print(f'transcribe: {" ".join(str(message).split())}', file=sys.stderr)


def main(arguments: Sequence[str]) -> int:
  """Transcribes what the command line says; returns the exit status."""
  thunks.one_by_one()
  parser = argparse.ArgumentParser(
    prog='python -m experiments.speech.transcribe',
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
  add(
    '--picture',
    help='file .png to draw the first segment of the first file into',
  )
  flags = parser.parse_args(arguments)
  status, drawn = 0, None
  try:
    transcriber = Transcriber(
      flags.checkpoint,
      beam=flags.beam,
      language=flags.language,
      weight=flags.weight,
      bonus=flags.bonus,
      notice=_tell,
    )
    for path, result in transcribe(transcriber, flags.files):
      if isinstance(result, harness.UserError):
        _tell(result)
        status = 1
        continue
      print(f'{path}\t{result.text}', flush=True)
      drawn = drawn or (path, result.start)
    if flags.picture and drawn:
      path, start = drawn
      if len(start.labels):
        title = f'{pathlib.Path(path).name}: {start.text}'
        transcriber.draw(flags.picture, start, title)
      else:
        _tell(f'nothing to draw in {path}.')
  except harness.UserError as error:
    _tell(error)
    return 1
  return status


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
