"""Utterances and corpora, shared by the loaders of speech."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.harness.data import sources
from experiments.speech import audio

# Names of the skipped utterances by reason.
Skipped = Mapping[str, tuple[str, ...]]


class Utterance(NamedTuple):
  """A speech segment that is read on demand.

  Attributes:
    name: unique name in the data set.
    text: words separated by single spaces; '' for silence, None without a
      transcript.
    speaker: name of the speaker; '' if unknown.
    length: number of samples at the rate of the corpus, or of feature frames.
    seconds: length in seconds.
    load: () -> (samples float32 (length,), their rate), or (features float32
      (length, numbers), None). Raises `audio.AudioError`.
    part: part of the file that `load` reads; None if it is in memory.
  """

  name: str
  text: str | None
  speaker: str
  length: int
  seconds: float
  load: Callable[[], tuple[np.ndarray, int | None]]
  part: audio.Part | None = None


class LazyCall:
  """A picklable deferred call whose repr omits its large arguments."""

  def __init__(self, call: Callable[..., Any], *arguments: Any):
    self._call, self._arguments = call, arguments

  def __call__(self) -> Any:
    return self._call(*self._arguments)

  def __repr__(self) -> str:
    return f'LazyCall({self._call.__module__}.{self._call.__name__})'


class Corpus(NamedTuple):
  """Sets of utterances for training, validation and test.

  Attributes:
    train: utterances with and without a text.
    validation: utterances with a text.
    test: utterances with a text.
    rate: sampling rate of the audio, hertz; None for features.
    frame_rate: frames per second of features; None for audio.
    numbers: numbers per frame of features; None for audio.
    skipped: names of skipped utterances by reason.
    source: description and digest of the data.
    more: further test sets by name.
  """

  train: tuple[Utterance, ...]
  validation: tuple[Utterance, ...]
  test: tuple[Utterance, ...]
  rate: int | None
  frame_rate: float | None
  numbers: int | None
  skipped: Skipped
  source: harness.Source
  more: Mapping[str, tuple[Utterance, ...]] = {}


class Skips:
  """Collects the names of skipped utterances by reason."""

  def __init__(self, names: Skipped | None = None):
    self._names = {reason: list(some) for reason, some in (names or {}).items()}

  def add(self, reason: str, name: str) -> None:
    """Adds a skipped utterance."""
    self._names.setdefault(reason, []).append(name)

  def by_reason(self) -> dict[str, tuple[str, ...]]:
    """Returns the names by reason."""
    return {reason: tuple(names) for reason, names in self._names.items()}


def from_audio(
  name: str,
  text: str | None,
  speaker: str,
  path: Any,
  *,
  rate: int,
  start: float = 0.0,
  stop: float | None = None,
) -> Utterance:
  """Makes an utterance of an audio file or of a part of it.

  Args:
    name: name of the utterance.
    text: its text, or None.
    speaker: name of the speaker.
    path: the file.
    rate: sampling rate to resample to, hertz.
    start: start of the part, seconds.
    stop: end of the part, seconds; None is the end of the file.

  Returns:
    The utterance.

  Raises:
    AudioError: if the header of the file is invalid, or the part is beyond its
      end.
  """
  part = audio.probe(path, rate=rate, start=start, stop=stop)
  return Utterance(
    name,
    text,
    speaker,
    part.length,
    seconds=part.length / rate,
    load=LazyCall(_read, part),
    part=None if isinstance(part.file, bytes) else part,
  )


def _read(part):
  return audio.read(part), part.rate


def load_readable(
  utterances: Iterable[Utterance], skips: Skips
) -> Iterator[tuple[Utterance, np.ndarray]]:
  """Reads utterances and skips those with broken audio.

  Args:
    utterances: the utterances.
    skips: collects the skipped utterances.

  Yields:
    An utterance, and its samples or features.
  """
  for utterance in utterances:
    try:
      content, _ = utterance.load()
    except audio.AudioError as error:
      skips.add(error.reason, utterance.name)
    else:
      yield utterance, content


def drop_unusable(
  corpus: Corpus,
  units: Any,
  frames_out: Callable[[int], int],
  *,
  parts: Sequence[str] = ('train', 'validation'),
) -> Corpus:
  """Drops utterances that a CTC loss cannot learn.

  A path of T frames can have n labels with r repetitions of the previous label
  only if T >= n + r, since a blank separates repeated labels. Otherwise the
  loss is infinite, and that of optax a large finite number. Utterances without
  a text need one frame.

  Args:
    corpus: the corpus.
    units: text units, see `units.Units`.
    frames_out: length of an utterance -> number of frames of the network.
    parts: sets to filter. The test set stays complete: a text that the network
      cannot output counts as errors.

  Returns:
    The corpus with fewer utterances, listed in `skipped`.

  Raises:
    DamagedDataError: if a set becomes empty.
  """
  skips = Skips(corpus.skipped)
  sets: dict[str, Any] = {}
  for part in parts:
    usable = []
    for utterance in getattr(corpus, part):
      if reason := _why_unusable(utterance, units, frames_out):
        skips.add(reason, utterance.name)
      else:
        usable.append(utterance)
    sets[part] = tuple(usable)
    if getattr(corpus, part) and not usable:
      reasons = _format_counts(skips.by_reason())
      raise harness.DamagedDataError(
        f'no utterance of the part {part} is usable: {reasons}.'
      )
  return corpus._replace(**sets, skipped=skips.by_reason())


def _why_unusable(utterance, units, frames_out):
  frames = frames_out(utterance.length)
  if frames < 1:
    return 'shorter than a frame'
  if utterance.text is None:
    return ''
  if not utterance.text.strip():
    return 'empty text'
  if units.unknown([utterance.text]):
    return 'symbols outside the units'
  if frames < frames_needed(units.encode(utterance.text)):
    return 'more labels than frames'
  return ''


def frames_needed(labels: np.ndarray) -> int:
  """Smallest number of frames of a CTC path with labels, int (n,)."""
  return len(labels) + int(np.sum(labels[1:] == labels[:-1]))


def hide_texts(corpus: Corpus, fraction: float, *, seed: int) -> Corpus:
  """Removes the texts of a fraction of the training utterances.

  The remaining texts of a small fraction are a subset of those of a larger one.

  Args:
    corpus: the corpus.
    fraction: fraction of the texts to keep, rounded up.
    seed: selects the texts.

  Returns:
    The corpus, with the utterances in the same order.

  Raises:
    SettingsError: if the fraction is outside [0, 1].
  """
  if not 0 <= fraction <= 1:
    raise harness.SettingsError(
      'the fraction of utterances with a text has to be within 0 and 1, got '
      f'{fraction}.'
    )
  names = [u.name for u in corpus.train if u.text is not None]
  names.sort(key=lambda name: order(name, seed))
  # The inner rounding keeps 0.1 * 30 at 3.
  labelled = set(names[: math.ceil(round(fraction * len(names), 6))])
  train = tuple(
    u if u.name in labelled else u._replace(text=None) for u in corpus.train
  )
  return corpus._replace(train=train)


def order(name: str, seed: int) -> str:
  """Computes a sort key that gives a random order of names."""
  return hashlib.blake2b(f'{seed} {name}'.encode(), digest_size=8).hexdigest()


def texts(utterances: Iterable[Utterance]) -> list[str]:
  """Returns the texts of utterances that have one."""
  return [u.text for u in utterances if u.text is not None]


def source(
  description: str, parts: Sequence[Sequence[Utterance]], *, otherwise: str
) -> harness.Source:
  """Identifies utterances by their names, texts and lengths.

  Args:
    description: one line of text.
    parts: sets of utterances.
    otherwise: name of data whose content is unknown.

  Returns:
    A `harness.Source`.
  """
  digests = [
    np.frombuffer(
      '\n'.join(f'{u.name}\t{u.text}\t{u.length}' for u in part).encode(),
      np.uint8,
    )
    for part in parts
  ]
  return sources.identify_source(description, digests, otherwise=otherwise)


def describe(corpus: Corpus) -> str:
  """Describes the sizes of the sets and the skipped utterances in a line."""
  sets = {'train': corpus.train, 'validation': corpus.validation}
  sets |= {'test': corpus.test, **corpus.more}
  words = []
  for name, part in sets.items():
    minutes = sum(u.seconds for u in part) / 60
    words.append(f'{name} {len(part):,} ({minutes:.1f} min)')
  without = sum(u.text is None for u in corpus.train)
  if without:
    words[0] += f', {without:,} without text'
  skipped = _format_counts(corpus.skipped)
  return '; '.join(words) + (f'; skipped: {skipped}' if skipped else '')


def describe_skipped(corpus: Corpus, max_names: int = 3) -> list[str]:
  """Lists the first skipped utterances in a line per reason."""
  lines = []
  for reason, names in corpus.skipped.items():
    rest = len(names) - max_names
    more = f' and {rest:,} more' if rest > 0 else ''
    lines.append(f'{reason}: {", ".join(names[:max_names])}{more}')
  return lines


def _format_counts(skipped: Skipped) -> str:
  return ', '.join(f'{len(names):,} {why}' for why, names in skipped.items())


def check_sets(corpus: Corpus, *, where: Any) -> Corpus:
  """Checks that no set of a corpus is empty, and returns the corpus.

  Args:
    corpus: the corpus.
    where: place of the data, for the message.

  Raises:
    DamagedDataError: if a set is empty; names the reasons.
  """
  for part in ('train', 'validation', 'test'):
    if not getattr(corpus, part):
      names = [n for names in corpus.skipped.values() for n in names][:1]
      reasons = f': skipped {_format_counts(corpus.skipped)}' if names else ''
      first = f' (for instance {names[0]})' if names else ''
      raise harness.DamagedDataError(
        f'{where} has no utterance for {part}{reasons}{first}: add some, or '
        'get the data again.'
      )
  return corpus
