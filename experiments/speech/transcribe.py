"""Transcribes audio files of any length.

    python -m experiments.speech.transcribe --checkpoint=WORKDIR a.wav b.flac

The checkpoint is the workdir of `python -m experiments.bl_just.train`, or a
file recogniser.npz. Prints one line per file: its name, a tab, and the text.
Audio is resampled to the rate of the checkpoint. A checkpoint trained on
features needs Sphinx .mfc files.

Audio longer than most training utterances is cut in its longest pauses into
segments, which are recognised separately. A segment above 32 seconds is read in
windows that overlap by 4 seconds. If channels cancel each other out, one of
them is used, with a notice.

`--format=ctm` prints one line per word: file, channel, start and duration in
seconds, the word and its confidence, the CTM format of NIST. A word lasts as
long as the frames of its labels, which may be fewer than it sounds.

`--beam` above 1 searches, optionally with a language model by
`--language=FILE.arpa`. `--picture=FILE.png` draws the first segment of the
first file, at most 32 seconds, with the recognised text.

A file that is unreadable or shorter than a frame is reported; the other files
are transcribed, and the exit status is 1.
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
  word_times,
)

# Lengths to which audio is padded, in seconds. Each length in use compiles one
# program; the last one is the size of a window.
_SECONDS = (2.0, 4.0, 8.0, 16.0, 32.0)
# Overlap of windows, and the pause at which they are joined, in seconds.
_OVERLAP, _PAUSE = 4.0, 0.4
# Largest number of samples of a file; only one window is in memory.
_MAX_SAMPLES = 2**36


class Recognition(NamedTuple):
  """Output of the network for some audio.

  Attributes:
    text: the recognised text.
    spectrum: features (frames, numbers).
    log_probs: log-probabilities (out frames, units).
    labels: labels of the text, int32 (n,).
  """

  text: str
  spectrum: np.ndarray
  log_probs: np.ndarray
  labels: np.ndarray


class Transcript(NamedTuple):
  """Transcript of a file.

  Attributes:
    text: text of the file.
    start: first segment, at most 32 seconds.
    words: words with their times, if they were asked for.
  """

  text: str
  start: Recognition
  words: tuple[word_times.Word, ...] = ()


class Transcriber:
  """Transcribes files by a trained recogniser.

  Args:
    checkpoint: workdir of `train`, or its file recogniser.npz.
    beam: width of the beam search; 1 decodes greedily.
    language: file of a language model in the ARPA format, or None.
    weight: weight of the language model.
    bonus: score per unit.
    notice: called with notices, such as of channels that cancel out.

  Raises:
    UserError: if a file is missing or damaged.
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
      raise harness.SettingsError(f'--beam={beam}: the beam is at least 1.')
    if language is not None and beam < 2:
      raise harness.SettingsError(
        'a language model needs a search: give --beam=16 with --language.'
      )
    loaded = recogniser.load(checkpoint)
    self.network, self._weights = loaded.network, loaded.weights
    self._segment = min(loaded.utterance_seconds or _SECONDS[-1], _SECONDS[-1])
    with harness.parsing(checkpoint, 'recogniser'):
      self.units = units.parse(loaded.units.encode())
    self._notice = notice
    self._beam, self._search = beam, {'weight': weight, 'bonus': bonus}
    if language is not None:
      self._search['model'] = fusion.WordModel(
        ngram.read_arpa(language), self.units
      )

  def transcribe(self, path: files.Path, *, times: bool = False) -> Transcript:
    """Transcribes a file of audio or features.

    Args:
      path: the file.
      times: whether to find the times of the words.

    Returns:
      The transcript.

    Raises:
      AudioError: if the file is unreadable or shorter than a frame.
    """
    front = self.network.shape.front
    content: Any
    if front.rate is None:
      content = front_end.with_deltas(an4.read_features(path))
    else:
      part = audio.probe(path, rate=front.rate, max_samples=_MAX_SAMPLES)
      content = _File(part, self._notice)
    if self.network.shape.frames_out(len(content)) < 1:
      raise audio.AudioError(
        f'{path} is shorter than a frame of {front.window:g} seconds: remove '
        'it from the files.',
        'shorter than a frame',
      )
    start, texts = None, []
    words: list[word_times.Word] = []
    for segment in self._segments(content):
      labels, outputs = [], []
      for piece in self._pieces(content, *segment):
        start = start or piece
        labels.append(piece.labels)
        outputs += [piece.log_probs] if times else []
      joined = np.concatenate(labels)
      texts.append(self.units.decode(joined))
      if times:
        frame, first = self.network.shape.frame, segment[0] / self._rate
        own = word_times.align(
          self.units, np.concatenate(outputs), joined, frame
        )
        words += [
          w._replace(start=first + w.start, stop=first + w.stop) for w in own
        ]
    assert start is not None
    # A segment ends a word.
    return Transcript(' '.join(filter(None, texts)), start, tuple(words))

  @property
  def _rate(self) -> float:
    """Samples or frames of the content per second."""
    front = self.network.shape.front
    return front.rate or round(1 / front.hop)

  def _segments(self, content: Any) -> list[tuple[int, int]]:
    """Cuts a file in its pauses; returns start and stop of each segment."""
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

  def hear(self, content: np.ndarray) -> Recognition:
    """Recognises one utterance, without cutting it in pauses.

    Args:
      content: samples (samples,) or features (frames, numbers), of any length.

    Returns:
      The recognition.
    """
    pieces = list(self._pieces(content, 0, len(content)))
    labels = np.concatenate([piece.labels for piece in pieces])
    return Recognition(
      self.units.decode(labels),
      np.concatenate([piece.spectrum for piece in pieces]),
      np.concatenate([piece.log_probs for piece in pieces]),
      labels,
    )

  def _pieces(
    self, content: Any, first: int, last: int
  ) -> Iterator[Recognition]:
    """Recognises a segment by overlapping windows.

    Args:
      content: samples or frames; slices of it are arrays.
      first: first sample or frame of the segment.
      last: last sample or frame, exclusive.

    Yields:
      Consecutive recognitions; each frame is in one of them.
    """
    shape = self.network.shape
    a_second = self._rate
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
      # The first frame that is in both windows.
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
    sizes = [round(s * self._rate) for s in _SECONDS]
    size = next(s for s in sizes if s >= len(content))
    features, log_probs, out = self.network.outputs(
      self._weights, *feed.pad_and_stack([content], size)
    )
    frames = int(front_end.count_frames(front, len(content)))
    return (
      np.asarray(features[0])[:frames],
      np.asarray(log_probs[0], np.float64)[: int(out[0])],
    )

  def _decode(
    self,
    spectrum: np.ndarray,
    log_probs: np.ndarray,
    first: int,
    stop: int,
    last_label: int,
  ) -> Recognition:
    """Decodes frames of a window that follow a frame labelled `last_label`."""
    log_probs = log_probs[first:stop]
    shrink = self.network.shape.shrink
    labels = np.zeros(0, np.int32)
    if len(log_probs) and self._beam > 1:
      (labels,) = decoding.decode([log_probs], width=self._beam, **self._search)
    elif len(log_probs):
      labels = decoding.collapse(np.argmax(log_probs, axis=-1))
    if len(labels) and np.argmax(log_probs[0]) == labels[0] == last_label:
      labels = labels[1:]  # It continues the label of the previous window.
    text = self.units.decode(labels)
    return Recognition(
      text, spectrum[first * shrink : stop * shrink], log_probs, labels
    )

  def draw(
    self, path: files.Path, recognition: Recognition, title: str = ''
  ) -> None:
    """Draws spectrum and units of a recognition with a non-empty text."""
    picture.draw(
      path,
      recognition.spectrum,
      recognition.log_probs,
      recognition.labels,
      self.units.symbols,
      seconds=len(recognition.log_probs) * self.network.shape.frame,
      title=title or recognition.text,
    )


class _File:
  """The samples of a file, read slice by slice."""

  def __init__(self, part: audio.Part, notice: Callable[[str], None]):
    self._part = part
    # Gives a notice once instead of for each slice.
    self._notice = functools.cache(notice)

  def __len__(self) -> int:
    return self._part.length

  def __getitem__(self, place: slice) -> np.ndarray:
    part = audio.span(self._part, place.start, place.stop)
    return audio.read(part, self._notice)[: place.stop - place.start]


def transcribe(
  transcriber: Transcriber, paths: Sequence[files.Path], *, times: bool = False
) -> Iterator[tuple[files.Path, Transcript | harness.UserError]]:
  """Transcribes files in order; yields the error of a file that fails."""
  for path in paths:
    try:
      yield path, transcriber.transcribe(path, times=times)
    except harness.UserError as error:
      yield path, error


def _print_notice(message: Any) -> None:
  print(f'transcribe: {" ".join(str(message).split())}', file=sys.stderr)


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  thunks.one_by_one()
  parser = argparse.ArgumentParser(
    prog='python -m experiments.speech.transcribe',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('files', nargs='+', help='audio files')
  add = functools.partial(parser.add_argument, metavar='X')
  add('--checkpoint', required=True, help='workdir of train, or its .npz file')
  add('--beam', type=int, default=1, help='beam width; 1 decodes greedily')
  add('--language', help='.arpa file of a language model, with --beam')
  add(
    '--weight',
    type=float,
    default=0.5,
    help='weight of the language model (%(default)s)',
  )
  add(
    '--bonus',
    type=float,
    default=0.0,
    help='score per unit of a search; larger values give longer texts '
    '(%(default)s)',
  )
  add(
    '--format',
    choices=('text', 'ctm'),
    default='text',
    help='text: a line per file; ctm: a line per word, with its time',
  )
  add('--picture', help='.png file for a picture of the first segment')
  flags = parser.parse_args(arguments)
  status, drawn = 0, None
  try:
    transcriber = Transcriber(
      flags.checkpoint,
      beam=flags.beam,
      language=flags.language,
      weight=flags.weight,
      bonus=flags.bonus,
      notice=_print_notice,
    )
    ctm = flags.format == 'ctm'
    for path, result in transcribe(transcriber, flags.files, times=ctm):
      if isinstance(result, harness.UserError):
        _print_notice(result)
        status = 1
        continue
      line = f'{path}\t{result.text}'
      if line := word_times.to_ctm(str(path), result.words) if ctm else line:
        # The name of a file need not be UTF-8.
        print(line.encode(errors='backslashreplace').decode(), flush=True)
      drawn = drawn or (path, result.start)
    if flags.picture and drawn:
      path, start = drawn
      if len(start.labels):
        title = f'{pathlib.Path(path).name}: {start.text}'
        transcriber.draw(flags.picture, start, title)
      else:
        _print_notice(f'nothing to draw in {path}.')
  except harness.UserError as error:
    _print_notice(error)
    return 1
  return status


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
