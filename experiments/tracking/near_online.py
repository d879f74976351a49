r"""Near-online tracking with several hypotheses; see `tracker`.

Each hypothesis is a set of tracklets. Every frame extends it by its best
assignment, and by the best one without each of its most doubtful pairs; the K
likeliest hypotheses stay. A frame is reported after a delay, by the best
hypothesis then, and hypotheses that disagree on that frame are dropped.

Hypotheses are compared by log-probability, not by their sum of affinities: for
a tracklet with affinities a_j to the detections within its gate, detection j
has

    log p_j = a_j - log(1 + sum_k exp a_k),

and a miss has the same with 0 in place of a_j. The network's scores are trained
as such logits, step by step: a constant added to all scores of a step leaves
the training loss unchanged, so sums of the scores would prefer histories that
inflate them. An unmatched detection costs `birth_cost`.
"""

from typing import NamedTuple

import numpy as np

from experiments.tracking import detections, inference, mot_files, tracker


class Delay(NamedTuple):
  """Limits of the search over hypotheses.

  Attributes:
    hypotheses: that stay, K.
    doubtful_pairs: pairs of the best assignment to try without.
    frames: until a frame is reported.
    birth_cost: of an unmatched detection.
  """

  hypotheses: int = 4
  doubtful_pairs: int = 3
  frames: int = 10
  birth_cost: float = 4.0


DELAY = Delay()


class Hypothesis(NamedTuple):
  """Tracklets, and their reports of the last frames.

  Attributes:
    tracks: the tracklets.
    reports: of the frames that are not reported yet; see `tracker.report`.
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


def assignments(
  affinity: np.ndarray, doubtful_pairs: int
) -> list[tuple[float, np.ndarray, np.ndarray]]:
  """The best assignment, and the best without each of its doubtful pairs.

  A pair is doubtful if its affinity is little above the tracklet's next best.
  Each assignment is returned once.

  Args:
    affinity: (tracklets, detections).
    doubtful_pairs: number of pairs to try without.

  Returns:
    Triples, the best first: the sum of affinities; the detection of each
    tracklet, -1 for a miss; and the affinities, in which the pair to try
    without is forbidden.
  """
  value = lambda chosen: float(
    affinity[np.flatnonzero(chosen >= 0), chosen[chosen >= 0]].sum()
  )
  best = tracker.assign(affinity)
  results = [(value(best), best, affinity)]
  matched = np.flatnonzero(best >= 0)
  others = affinity[matched]
  others[np.arange(len(matched)), best[matched]] = 0.0
  margins = affinity[matched, best[matched]] - others.max(axis=1, initial=0.0)
  for row in np.argsort(margins, kind='stable')[:doubtful_pairs]:
    track = matched[row]
    without = affinity.copy()
    without[track, best[track]] = tracker.FORBIDDEN
    chosen = tracker.assign(without)
    if not any(np.array_equal(chosen, other) for _, other, _ in results):
      results.append((value(chosen), chosen, without))
  return results


def _same(one, two):
  return all(np.array_equal(a, b) for a, b in zip(one, two))


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
  for frame in frames:
    extensions = []
    for one in hypotheses:
      pairs = tracker.pair(model, one.tracks, frame, rules)
      common = one.total - log_normaliser(pairs.affinity)
      options = assignments(pairs.affinity, delay.doubtful_pairs)
      for gain, chosen, affinity in options:
        unmatched = len(frame.confidence) - np.count_nonzero(chosen >= 0)
        total = common + gain - delay.birth_cost * unmatched
        extensions.append((total, one, pairs, chosen, affinity))
    extensions.sort(key=lambda each: -each[0])
    hypotheses = []
    for total, one, pairs, chosen, affinity in extensions[: delay.hypotheses]:
      # The second pass must not restore the forbidden pair.
      pairs = pairs._replace(affinity=affinity)
      chosen = tracker.second_pass(pairs, chosen, frame, rules)
      tracks = tracker.advance(model, one.tracks, pairs, chosen, frame, rules)
      now = (*one.reports, tracker.report(tracks))
      hypotheses.append(Hypothesis(tracks, now, total))
    if len(hypotheses[0].reports) > delay.frames:
      first = hypotheses[0].reports[0]
      reports.append(first)
      hypotheses = [
        one._replace(reports=one.reports[1:])
        for one in hypotheses
        if _same(one.reports[0], first)
      ]
  reports.extend(hypotheses[0].reports)
  return tracker.as_boxes(detected, reports)
