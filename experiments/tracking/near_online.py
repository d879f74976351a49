r"""Tracking by the score of whole tracklets: several hypotheses compete.

Each hypothesis is a set of tracklets. Every frame extends it by its likeliest
assignments; the K likeliest hypotheses stay. A frame is reported after a delay,
by the best hypothesis then, and a choice is final after `scan` frames:
hypotheses that disagree with the best one on that frame are dropped.

Hypotheses are compared by log-probability, not by their sum of affinities: for
a tracklet with affinities a_j to the detections within its gate, detection j
has

    log p_j = a_j - log(1 + sum_k exp a_k),

and a miss has the same with 0 in place of a_j. The network's scores are trained
as such logits, step by step: a constant added to all scores of a step leaves
the training loss unchanged, so sums of the scores would prefer histories that
inflate them. An unmatched detection costs `birth_cost`.

With one hypothesis, this is `tracker.online`. The totals of tracklets then
change no choice: an assignment of tracklets i to detections c(i) has the total
sum_i [L_i + log p_i,c(i)] over all tracklets, missed ones included. The past
L_i and the normaliser are the same for all assignments, so the best total is
the best sum of step affinities. Totals compete only between several
histories, so matching by whole tracklets needs several hypotheses. `ONLINE`
reports each frame at once, by the hypothesis that is the best so far; its later
frames may return to another history. `DELAY` is near-online.
"""

import functools
import heapq
from typing import NamedTuple

import numpy as np

from experiments.tracking import detections, inference, mot_files, tracker


class Delay(NamedTuple):
  """Limits of the search over hypotheses.

  Attributes:
    hypotheses: that stay, K.
    doubtful_pairs: pairs of an assignment to try without.
    frames: until a frame is reported.
    birth_cost: of an unmatched detection.
    scan: frames until a choice is final; at least `frames`.
  """

  hypotheses: int = 4
  doubtful_pairs: int = 3
  frames: int = 10
  birth_cost: float = 4.0
  scan: int = 10


DELAY = Delay()
ONLINE = Delay(frames=0)


class Hypothesis(NamedTuple):
  """Tracklets, and their reports of the last frames.

  Attributes:
    tracks: the tracklets.
    reports: of the frames that are not final yet; see `tracker.report`.
    total: log-probability, without constants.
  """

  tracks: tracker.Tracks
  reports: tuple[tuple[np.ndarray, np.ndarray], ...]
  total: float = 0.0


def log_normaliser(affinity: np.ndarray) -> float:
  """The common term of all assignments: sum_i log(1 + sum_j exp a_ij)."""
  largest = affinity.max(axis=1, initial=0.0, keepdims=True)
  total = np.exp(affinity - largest).sum(axis=1) + np.exp(-largest[:, 0])
  return float((np.log(total) + largest[:, 0]).sum())


class _Node(NamedTuple):
  """An assignment, and the pairs that its part of the search fixes."""

  value: float
  chosen: np.ndarray
  affinity: np.ndarray  # Forbidden pairs are `FORBIDDEN`.
  forced: tuple[tuple[int, int], ...]


def _solve(affinity, forced):
  """The best assignment with the forced pairs."""
  allowed = affinity
  if forced:
    rows, columns = map(list, zip(*forced))
    allowed = affinity.copy()
    allowed[rows, :] = tracker.FORBIDDEN
    allowed[:, columns] = tracker.FORBIDDEN
    allowed[rows, columns] = affinity[rows, columns]
  chosen = tracker.assign(allowed)
  matched = np.flatnonzero(chosen >= 0)
  value = float(affinity[matched, chosen[matched]].sum())
  return _Node(value, chosen, affinity, forced)


def _branches(node, doubtful_pairs):
  """Splits the other assignments of a node by the first pair they lack."""
  matched = np.flatnonzero(node.chosen >= 0)
  others = node.affinity[matched]
  own = node.affinity[matched, node.chosen[matched]]
  others[np.arange(len(matched)), node.chosen[matched]] = 0.0
  margins = own - others.max(axis=1, initial=0.0)
  forced = node.forced
  tried = 0
  for row in matched[np.argsort(margins, kind='stable')].tolist():
    pair = row, int(node.chosen[row])
    if pair in node.forced:
      continue
    if tried == doubtful_pairs:
      return
    tried += 1
    without = node.affinity.copy()
    without[pair] = tracker.FORBIDDEN
    yield _solve(without, forced)
    forced = (*forced, pair)


def assignments(
  affinity: np.ndarray, count: int, doubtful_pairs: int
) -> list[tuple[float, np.ndarray, np.ndarray]]:
  """The assignments of the largest sums, by the partitions of Murty (1968).

  The assignments other than the best one are split by the first of its pairs
  that they lack; the best assignment of a part is found with that pair
  forbidden and the pairs before it forced, and its part is split in turn. Only
  pairs with an affinity above 0 are matched.

  Args:
    affinity: (tracklets, detections).
    count: number of assignments.
    doubtful_pairs: pairs of an assignment to split by: those with the least
      affinity above the tracklet's next best. The search is exact if it is at
      least the number of pairs.

  Returns:
    At most `count` triples, the best first: the sum of affinities; the
    detection of each tracklet, -1 for a miss; and the affinities, in which the
    pairs that it must lack are forbidden.
  """
  heap, order = [(0.0, 0, _solve(affinity, ()))], 0
  results: list[tuple[float, np.ndarray, np.ndarray]] = []
  while heap and len(results) < count:
    node = heapq.heappop(heap)[-1]
    results.append((node.value, node.chosen, node.affinity))
    if len(results) < count:
      for other in _branches(node, doubtful_pairs):
        order += 1
        heapq.heappush(heap, (-other.value, order, other))
  return results


def _same(one, two):
  return all(np.array_equal(a, b) for a, b in zip(one, two))


class _Names:
  """Identities that hypotheses share: by the detection that names a tracklet.

  So an identity is of one tracklet in all hypotheses, and reports of several
  hypotheses agree.
  """

  def __init__(self):
    self._names: dict[tuple[int, int], int] = {}

  def name(self, frame: int, tracks: tracker.Tracks, known: int):
    """Renames the identities from `known` on, which are new in this frame."""
    new = np.flatnonzero(tracks.ids >= known)
    if not len(new):
      return tracks
    ids = tracks.ids.copy()
    for row in new:
      key = frame, int(tracks.detection[row])
      ids[row] = self._names.setdefault(key, len(self._names) + 1)
    return tracks._replace(ids=ids)

  def next(self) -> int:
    """The smallest unused identity."""
    return len(self._names) + 1


def _extend(model, hypotheses, frame, rules, delay):
  """The likeliest extensions of hypotheses by the assignments of a frame.

  Returns:
    Tuples of the total, the hypothesis, its pairs and the choice; best first.
  """
  extensions = []
  for one in hypotheses:
    pairs = tracker.pair(model, one.tracks, frame, rules)
    common = one.total - log_normaliser(pairs.affinity)
    options = assignments(
      pairs.affinity, delay.hypotheses, delay.doubtful_pairs
    )
    for gain, chosen, affinity in options:
      unmatched = len(frame.confidence) - np.count_nonzero(chosen >= 0)
      total = common + gain - delay.birth_cost * unmatched
      # The second pass must not restore a forbidden pair.
      extensions.append((total, one, pairs._replace(affinity=affinity), chosen))
  extensions.sort(key=lambda each: -each[0])
  return extensions[: delay.hypotheses]


@inference.OneThread()
def track(
  model: tracker.Model,
  detected: detections.Detected,
  rules: tracker.Rules = tracker.RULES,
  delay: Delay = DELAY,
) -> mot_files.Boxes:
  """Tracks a sequence, and reports each frame some frames later.

  Args:
    model: of the affinities.
    detected: detections.
    rules: of births, matches and deaths.
    delay: limits of the search.

  Returns:
    Boxes with identities.
  """
  frames = tracker.split_frames(detected)
  if not frames:
    return tracker.as_boxes(detected, [])
  empty = tracker.Frame(*(x[:0] for x in frames[0]))
  hypotheses = [Hypothesis(tracker.begin(model, empty), ())]
  reports: list[tuple[np.ndarray, np.ndarray]] = []
  names, scan = _Names(), max(delay.scan, delay.frames)
  for number, frame in enumerate(frames):
    extensions = _extend(model, hypotheses, frame, rules, delay)
    known, hypotheses = names.next(), []
    for total, one, pairs, chosen in extensions:
      chosen = tracker.second_pass(pairs, chosen, frame, rules)
      before = one.tracks._replace(next_id=known)
      tracks = tracker.advance(model, before, pairs, chosen, frame, rules)
      tracks = names.name(number, tracks, known)
      now = (*one.reports, tracker.report(tracks))
      hypotheses.append(Hypothesis(tracks, now, total))
    pending = hypotheses[0].reports
    if len(pending) > delay.frames:
      reports.append(pending[-1 - delay.frames])
    if len(pending) > scan:
      hypotheses = [
        one._replace(reports=one.reports[1:])
        for one in hypotheses
        if _same(one.reports[0], pending[0])
      ]
  last = len(frames) - len(reports)
  pending = hypotheses[0].reports
  reports.extend(pending[len(pending) - last :])
  return tracker.as_boxes(detected, reports)


# How detections are matched: functions of a model, detections and rules.
MATCHINGS = {
  'step': tracker.online,
  'tracklet': functools.partial(track, delay=ONLINE),
  'near_online': track,
}
