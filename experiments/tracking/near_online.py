r"""Near-online tracking: some states side by side; see `tracker`.

States are compared by a log-probability, not by the sum of their affinities: of
a tracklet with affinities a_j to the detections within its gate, detection j
has

    log p_j = a_j - log(1 + sum_k exp a_k),

and not to be seen has the same with 0 in place of a_j. The network's scores are
learnt as such logits, step by step: what is added to all of a step changes
nothing that is learnt, so sums of the scores themselves prefer histories that
inflate them. A detection that is left over costs `born`.
"""

import collections
from typing import NamedTuple

import numpy as np

from experiments.tracking import detections, mot_files, tracker


class Delay(NamedTuple):
  """How far a decision may wait.

  Attributes:
    hypotheses: states that go on.
    doubts: pairs of a state's best assignment that are tried without.
    frames: until a frame is told.
    born: cost of a detection that goes on with nobody.
  """

  hypotheses: int = 4
  doubts: int = 3
  frames: int = 10
  born: float = 4.0


DELAY = Delay()


class State(NamedTuple):
  """A state of everything.

  Attributes:
    tracks: the tracklets.
    told: what it tells of the last frames.
    total: its log-probability, without constants.
  """

  tracks: tracker.Tracks
  told: tuple[tuple[np.ndarray, np.ndarray], ...]
  total: float = 0.0


def constant(affinity: np.ndarray) -> float:
  """What all assignments have in common: sum_i log(1 + sum_j exp a_ij)."""
  largest = affinity.max(axis=1, initial=0.0, keepdims=True)
  total = np.exp(affinity - largest).sum(axis=1) + np.exp(-largest[:, 0])
  return float((np.log(total) + largest[:, 0]).sum())


def assignments(
  affinity: np.ndarray, doubts: int
) -> list[tuple[float, np.ndarray, np.ndarray]]:
  """The best assignment, and the best without each of its doubtful pairs.

  A pair is doubtful if its affinity is little above the next best of its
  tracklet. Without either pair of an exchange the other assignment is the same:
  it is given once.

  Args:
    affinity: (tracklets, detections).
    doubts: pairs, at most.

  Returns:
    Sums, detections of tracklets, -1 for none, and the affinities that they
    are best by, in which a pair that is tried without may not be. The best
    first.
  """
  value = lambda chosen: float(
    affinity[np.flatnonzero(chosen >= 0), chosen[chosen >= 0]].sum()
  )
  best = tracker.assign(affinity)
  found = [(value(best), best, affinity)]
  matched = np.flatnonzero(best >= 0)
  others = affinity[matched]
  others[np.arange(len(matched)), best[matched]] = 0.0
  margins = affinity[matched, best[matched]] - others.max(axis=1, initial=0.0)
  for place in np.argsort(margins, kind='stable')[:doubts]:
    one = matched[place]
    without = affinity.copy()
    without[one, best[one]] = tracker.NEVER
    chosen = tracker.assign(without)
    if not any(np.array_equal(chosen, other) for _, other, _ in found):
      found.append((value(chosen), chosen, without))
  return found


def _same(one, two):
  return all(np.array_equal(a, b) for a, b in zip(one, two))


def track(
  model: tracker.Model,
  found: detections.Detected,
  rules: tracker.Rules = tracker.RULES,
  delay: Delay = DELAY,
) -> mot_files.Boxes:
  """Tracks a sequence, each frame told some frames later.

  Args:
    model: of the affinities.
    found: detections.
    rules: of births, matches and deaths.
    delay: how far decisions wait.

  Returns:
    Boxes with identities.
  """
  frames = tracker.frames_of(found)
  if not frames:
    return tracker.result(found, [])
  empty = tracker.Frame(*(x[:0] for x in frames[0]))
  states = [State(tracker.begin(model, empty), ())]
  told: collections.deque = collections.deque()
  for frame in frames:
    tried = []
    for state in states:
      pairs = tracker.pair(model, state.tracks, frame, rules)
      common = state.total - constant(pairs.affinity)
      for gain, chosen, left in assignments(pairs.affinity, delay.doubts):
        alone = len(frame.sure) - np.count_nonzero(chosen >= 0)
        total = common + gain - delay.born * alone
        tried.append((total, state, pairs, chosen, left))
    tried.sort(key=lambda each: -each[0])
    states = []
    for total, state, pairs, chosen, affinity in tried[: delay.hypotheses]:
      # The second pass may not give back the pair that is tried without.
      pairs = pairs._replace(affinity=affinity)
      chosen = tracker.second_pass(pairs, chosen, frame, rules)
      tracks = tracker.advance(model, state.tracks, pairs, chosen, frame, rules)
      told_now = (*state.told, tracker.told_of(tracks))
      states.append(State(tracks, told_now, total))
    if len(states[0].told) > delay.frames:
      first = states[0].told[0]
      told.append(first)
      # Those that tell otherwise of that frame are dropped.
      states = [
        state._replace(told=state.told[1:])
        for state in states
        if _same(state.told[0], first)
      ]
  told.extend(states[0].told)
  return tracker.result(found, list(told))
