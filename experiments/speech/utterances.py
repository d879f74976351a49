"""What the loaders of speech have in common: utterances, and sets of them."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.harness.data import sources
from experiments.speech import audio

# Why an utterance is left out, by reason: the names of those that are.
Skipped = Mapping[str, tuple[str, ...]]


class Utterance(NamedTuple):
  """A piece of speech that is read when it is asked for.

  Attributes:
    name: in its data set, of this utterance alone.
    text: what is said, words with a space between; None if nobody wrote it
      down, '' if nothing is said.
    speaker: who says it; '' if that is not known.
    length: samples at the rate of the corpus, or frames of features: how long
      what `load` returns is.
    seconds: likewise.
    load: () -> (samples float32 (length,), their rate), or (features float32
      (length, numbers), None). Raises `audio.AudioError`.
    part: of the file that `load` reads; None where the content is in memory.
  """

  name: str
  text: str | None
  speaker: str
  length: int
  seconds: float
  load: Callable[[], tuple[np.ndarray, int | None]]
  part: audio.Part | None = None


class Later:
  """A call to be made later, which is shown without its arguments.

  They hold files' contents, and a lambda could not be sent to a process.
  """

  def __init__(self, call: Callable[..., Any], *arguments: Any):
    self._call, self._arguments = call, arguments

  def __call__(self) -> Any:
    return self._call(*self._arguments)

  def __repr__(self) -> str:
    return f'Later({self._call.__module__}.{self._call.__name__})'


class Corpus(NamedTuple):
  """Utterances to learn from, to choose with, and to report on.

  Attributes:
    train: utterances, with a text and without.
    validation: for choosing; each has a text.
    test: for what is reported; each has a text.
    rate: samples a second of all audio; None where features are given.
    frame_rate: frames a second of given features; None where there is audio.
    numbers: of a frame of given features; None likewise.
    skipped: by reason, the names of utterances that were left out.
    source: what was read.
    more: further sets that are reported, by name.
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
  """Collects reasons, and names to each in order."""

  def __init__(self, found: Skipped | None = None):
    self._names = {why: list(names) for why, names in (found or {}).items()}

  def add(self, reason: str, name: str) -> None:
    """One more that is left out."""
    self._names.setdefault(reason, []).append(name)

  def found(self) -> dict[str, tuple[str, ...]]:
    """The names by reason."""
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
  """An utterance of a file of audio, or of a part of it.

  Args:
    name: of the utterance.
    text: what is said.
    speaker: who says it.
    path: of the file.
    rate: samples a second, to which it is resampled.
    start: of the part, in seconds.
    stop: likewise; None is the end of the file.

  Returns:
    The utterance.

  Raises:
    AudioError: if the file's header says that it cannot be read, or that it
      does not reach as far.
  """
  part = audio.part_of(path, rate=rate, start=start, stop=stop)
  seconds = part.length / rate
  load = Later(_read, part)
  in_memory = isinstance(part.file, bytes)
  return Utterance(
    name,
    text,
    speaker,
    part.length,
    seconds,
    load,
    None if in_memory else part,
  )


def _read(part):
  return audio.read(part), part.rate


def loaded(
  utterances: Iterable[Utterance], skips: Skips
) -> Iterator[tuple[Utterance, np.ndarray]]:
  """Reads utterances one by one, and leaves out those whose audio is broken.

  A header does not tell everything: what is not finite, or ends in the middle,
  is seen here.

  Args:
    utterances: to be read.
    skips: gets the reasons and the names.

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


def usable(
  corpus: Corpus,
  units: Any,
  frames_out: Callable[[int], int],
  *,
  parts: Sequence[str] = ('train', 'validation'),
) -> Corpus:
  """Leaves out what connectionist temporal classification cannot learn.

  A path of T frames says n labels only if T >= n + r, with r labels that are
  equal to the one before, since a blank has to be between. Otherwise the loss
  is infinite, and optax's is a large finite number. Utterances without a text
  stay if they have a frame at all.

  Args:
    corpus: to be checked.
    units: of the text, see `units.Units`.
    frames_out: of the network, by the `length` of an utterance.
    parts: that are checked. What is tested stays as it is: a network that
      cannot say a text has its errors counted.

  Returns:
    The corpus, with fewer utterances and more in `skipped`.

  Raises:
    DamagedDataError: if nothing is left of a part that had something.
  """
  skips = Skips(corpus.skipped)
  kept: dict[str, Any] = {}
  for part in parts:
    before = getattr(corpus, part)
    kept[part] = tuple(
      utterance
      for utterance in before
      if not _told(skips, utterance, _reason(utterance, units, frames_out))
    )
    if before and not kept[part]:
      reasons = _count(skips.found())
      raise harness.DamagedDataError(
        f'no utterance of the part {part} can be learnt from: {reasons}.'
      )
  return corpus._replace(**kept, skipped=skips.found())


def _told(skips, utterance, reason):
  if reason:
    skips.add(reason, utterance.name)
  return reason


def _reason(utterance, units, frames_out):
  frames = frames_out(utterance.length)
  if frames < 1:
    return 'shorter than a frame'
  if utterance.text is None:
    return ''
  if not utterance.text.strip():
    return 'empty text'
  if units.unknown([utterance.text]):
    return 'symbols that are no units'
  if frames < frames_needed(units.encode(utterance.text)):
    return 'more labels than frames'
  return ''


def frames_needed(labels: np.ndarray) -> int:
  """The least frames of a path that says labels, int (n,)."""
  return len(labels) + int(np.sum(labels[1:] == labels[:-1]))


def hide_texts(corpus: Corpus, fraction: float, *, seed: int) -> Corpus:
  """Takes the texts from a part of the training utterances.

  The order in which texts are given depends on the seed and the names alone, so
  those of a small fraction are among those of a larger one.

  Args:
    corpus: with its texts.
    fraction: of the training utterances with a text that keep it, rounded up.
    seed: of the order.

  Returns:
    The corpus; utterances stay where they are.

  Raises:
    SettingsError: if the fraction is not within 0 and 1.
  """
  if not 0 <= fraction <= 1:
    raise harness.SettingsError(
      f'the fraction of utterances with a text is within 0 and 1, got '
      f'{fraction}.'
    )
  names = [u.name for u in corpus.train if u.text is not None]
  names.sort(key=lambda name: order(name, seed))
  # Rounding must not turn .1 * 30 into four.
  kept = set(names[: math.ceil(round(fraction * len(names), 6))])
  train = tuple(
    u if u.name in kept else u._replace(text=None) for u in corpus.train
  )
  return corpus._replace(train=train)


def order(name: str, seed: int) -> str:
  """Where a name stands in an order that depends on a seed and itself alone."""
  return hashlib.blake2b(f'{seed} {name}'.encode(), digest_size=8).hexdigest()


def texts(utterances: Iterable[Utterance]) -> list[str]:
  """The texts of those that have one."""
  return [u.text for u in utterances if u.text is not None]


def source(
  words: str, parts: Sequence[Sequence[Utterance]], *, otherwise: str
) -> harness.Source:
  """Which utterances were read, told by their names, texts and lengths.

  Args:
    words: one line for people.
    parts: sets of utterances.
    otherwise: the name of data that are not known by their content.

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
  return sources.source_of(words, digests, otherwise=otherwise)


def describe(corpus: Corpus) -> str:
  """One line: how much of what there is, and what was left out."""
  sets = {'train': corpus.train, 'validation': corpus.validation}
  sets |= {'test': corpus.test, **corpus.more}
  words = []
  for name, part in sets.items():
    minutes = sum(u.seconds for u in part) / 60
    words.append(f'{name} {len(part):,} ({minutes:.1f} min)')
  without = sum(u.text is None for u in corpus.train)
  if without:
    words[0] += f', {without:,} without text'
  skipped = _count(corpus.skipped)
  return '; '.join(words) + (f'; left out: {skipped}' if skipped else '')


def left_out(corpus: Corpus, most: int = 3) -> list[str]:
  """One line a reason: the names of what was left out, the first of many."""
  lines = []
  for why, names in corpus.skipped.items():
    more = f' and {len(names) - most:,} more' if len(names) > most else ''
    lines.append(f'{why}: {", ".join(names[:most])}{more}')
  return lines


def _count(skipped: Skipped) -> str:
  return ', '.join(f'{len(names):,} {why}' for why, names in skipped.items())


def checked(corpus: Corpus, *, where: Any) -> Corpus:
  """Returns a corpus of which each part has something.

  Args:
    corpus: that a loader has read.
    where: it was read from, for the message.

  Raises:
    DamagedDataError: if a part is empty; names the reasons.
  """
  for part in ('train', 'validation', 'test'):
    if not getattr(corpus, part):
      names = [n for names in corpus.skipped.values() for n in names][:1]
      why = f': left out are {_count(corpus.skipped)}' if names else ''
      first = f' ({names[0]} for instance)' if names else ''
      raise harness.DamagedDataError(
        f'{where} has no utterance for {part}{why}{first}.'
      )
  return corpus
