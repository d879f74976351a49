"""Histories of the multi-target tracker: recorded, corrected by an oracle.

The tracker runs on training detections with the current networks, and the
choices of each tracklet are recorded. These histories are kept whatever their
purity. The target of a step is the last person of the history, also after a
false detection: going back to an earlier person would be another switch. With
an oracle, tracklets of more than one person are matched by the truth, which
bounds what better choices on such histories can gain.
"""

import collections
import itertools
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.tracking import detections, inference, mot_files, tracker

Oracle = Literal['last', 'person', 'majority']
_SURE = 1e3  # Affinity of the oracle.
# A history: frame of the sequence from 0, and detection in it, -1 for a miss.
History = list[tuple[int, int]]


class Recording(NamedTuple):
  """The result of a tracker, and the histories of all its tracklets."""

  boxes: mot_files.Boxes
  histories: list[History]


class Errors(NamedTuple):
  """Choices of tracklets whose last detection is a person's.

  Attributes:
    decisions: detections that continue a tracklet.
    mixed: share of them on histories of more than one person.
    wrong_pure: share of another person's detections, on other histories.
    wrong_mixed: the same on mixed histories.
  """

  decisions: int
  mixed: float
  wrong_pure: float
  wrong_mixed: float


def _with_keys(model: tracker.Model) -> tracker.Model:
  """Adds a key per tracklet to the end of a model's memory."""
  keys = itertools.count()

  def begin(initial, confidence, embedding):
    memory, updates = model.begin(initial, confidence, embedding)
    own = [next(keys) for _ in range(len(confidence))]
    return (*memory, np.array(own, np.int64)), updates

  return model._replace(
    affinity=lambda candidates, memory: model.affinity(candidates, memory[:-1]),
    begin=begin,
    remember=lambda memory, updates: (
      *model.remember(memory[:-1], updates),
      memory[-1],
    ),
  )


def _corrected(
  affinity: np.ndarray,
  counts: list[collections.Counter],
  last: list[int],
  ids: np.ndarray,
  oracle: Oracle,
) -> np.ndarray:
  """Matches mixed tracklets by the truth, within the gate."""
  affinity = affinity.copy()
  for row, (persons, one) in enumerate(zip(counts, last)):
    if len(persons) < 2:
      continue
    true = collections.Counter({i: n for i, n in persons.items() if i >= 0})
    if oracle == 'majority' and true:
      one = true.most_common(1)[0][0]
    gated = affinity[row] > tracker.FORBIDDEN
    right = (ids == one) & (one >= 0)
    affinity[row, gated] = np.where(right[gated], _SURE, -_SURE)
  return affinity


@inference.OneThread()
def record(
  model: tracker.Model,
  detected: detections.Detected,
  rules: tracker.Rules = tracker.RULES,
  oracle: Oracle | None = None,
) -> Recording:
  """Tracks a sequence online and records the histories of its tracklets.

  Args:
    model: of the affinities.
    detected: detections with true identities.
    rules: of births, matches and deaths.
    oracle: whom mixed tracklets follow: the person of the last detection, or
      none after a false one; the last person, also after a false one; or the
      person of most detections so far. None for the model's choices.

  Returns:
    The result, and the histories.
  """
  keyed, tracks = _with_keys(model), None
  rows = detected.boxes.by_frame(detected.info.length)
  histories: dict[int, History] = {}
  counts: dict[int, collections.Counter] = {}
  last: dict[int, int] = {}
  reports = []
  for number, frame in enumerate(tracker.split_frames(detected)):
    ids = detected.ids[rows[number]]
    if tracks is None:
      tracks = tracker.begin(keyed, tracker.Frame(*(x[:0] for x in frame)))
    pairs = tracker.pair(keyed, tracks, frame, rules)
    if oracle is not None:
      keys = tracks.memory[-1].tolist()
      pairs = pairs._replace(
        affinity=_corrected(
          pairs.affinity,
          [counts[key] for key in keys],
          [last[key] for key in keys],
          ids,
          oracle,
        )
      )
    chosen = tracker.assign(pairs.affinity)
    chosen = tracker.second_pass(pairs, chosen, frame, rules)
    tracks = tracker.advance(keyed, tracks, pairs, chosen, frame, rules)
    reports.append(tracker.report(tracks))
    for key, index in zip(tracks.memory[-1].tolist(), tracks.detection):
      histories.setdefault(key, []).append((number, int(index)))
      if index >= 0:
        identity = int(ids[index])
        if identity >= 0 or oracle != 'person' or key not in last:
          last[key] = identity
        counts.setdefault(key, collections.Counter())[identity] += 1
  return Recording(
    tracker.as_boxes(detected, reports), list(histories.values())
  )


def count_errors(
  detected: detections.Detected, histories: list[History]
) -> Errors:
  """Counts the choices of other persons, on pure and on mixed histories."""
  counts = np.zeros((2, 2), int)  # By mixed and wrong.
  rows = detected.boxes.by_frame(detected.info.length)
  for history in histories:
    ids = [
      int(detected.ids[rows[frame][index]])
      for frame, index in history
      if index >= 0
    ]
    persons = set(ids[:1])
    for before, after in itertools.pairwise(ids):
      if before >= 0:
        counts[int(len(persons) > 1), int(after != before)] += 1
      persons.add(after)
  share = lambda x, total: float(x / total) if total else 0.0
  pure, mixed = counts.sum(axis=1)
  return Errors(
    int(pure + mixed),
    share(mixed, pure + mixed),
    share(counts[0, 1], pure),
    share(counts[1, 1], mixed),
  )


class Windows(NamedTuple):
  """Windows of histories; see `windows.from_histories`.

  Attributes:
    frames: frame of each step in the padded detections, int32 (rows, 1 +
      steps).
    index: detection that the history takes, -1 for a miss, the same shape.
    count: steps after the first, int32 (rows,).
  """

  frames: Any
  index: Any
  count: Any


def cut(
  detected: detections.Detected,
  histories: list[History],
  *,
  rows: int,
  steps: int,
  length: int,
  offset: int,
  mixed_share: float,
  rng: np.random.Generator,
) -> Windows:
  """Cuts windows from histories, each from a detection on.

  A miss leaves the memory unchanged, so misses may be left out: four of five
  are, unless the target is there.

  Args:
    detected: detections with true identities.
    histories: output of `record` on these.
    rows: windows.
    steps: of a padded window.
    length: of the part of a history, at most `steps`.
    offset: frame of the padded detections that is the sequence's first.
    mixed_share: share of windows with detections of more than one person, if
      there are any.
    rng: of the choices.

  Returns:
    `Windows`; those of a recording without histories have no steps.
  """
  by_frame = detected.boxes.by_frame(detected.info.length)
  parts: dict[bool, list[History]] = {False: [], True: []}
  for history in histories:
    short, ids, last = [], [], -1
    for frame, index in history:
      here = detected.ids[by_frame[frame]]
      if index >= 0:
        last = int(here[index]) if here[index] >= 0 else last
      elif not (last >= 0 and last in here) and rng.random() < 0.8:
        continue
      short.append((frame, index))
      ids.append(int(here[index]) if index >= 0 else None)
    for start in range(0, max(len(short) - 1, 0), max(length // 2, 1)):
      while start < len(short) and short[start][1] < 0:
        start += 1
      part = short[start : start + 1 + length]
      if len(part) > 1:
        persons = {i for i in ids[start : start + 1 + length] if i is not None}
        parts[len(persons) > 1].append(part)
  frames = np.zeros((rows, 1 + steps), np.int32) + offset
  index = np.full((rows, 1 + steps), -1, np.int32)
  count = np.zeros(rows, np.int32)
  for row in range(rows):
    kind = rng.random() < mixed_share
    some = parts[kind] or parts[not kind]
    if some:
      part = np.array(some[rng.integers(len(some))])
      frames[row, : len(part)] = part[:, 0] + offset
      frames[row, len(part) :] = part[-1, 0] + offset
      index[row, : len(part)] = part[:, 1]
      count[row] = len(part) - 1
  return Windows(frames, index, count)
