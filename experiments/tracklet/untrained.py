"""Sequences that nothing was trained or tuned on: TUD-Campus, TUD-Stadtmitte.

Their detections are real, of a Faster R-CNN, in the format of 2D MOT 2015. Both
are short, some 250 frames and 1,500 boxes of the truth: one identity that is
lost is points of IDF1. So trackers are judged on all detections and ten times
without a twentieth of them, drawn anew.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from experiments.harness.store import files
from experiments.tracking import (
  detections,
  evaluation,
  judging,
  mot_files,
  scenes,
)

NAMES = ('TUD-Campus', 'TUD-Stadtmitte')
DROPS, SHARE = 10, 0.05
Scores = dict[tuple[str, str], Any]  # By measure and kind of draws.


class Held(NamedTuple):
  """Sequences with all of their detections, and with some left out.

  Attributes:
    every: one trial a sequence.
    dropped: of each draw, one trial a sequence.
  """

  every: list[judging.Trial]
  dropped: list[list[judging.Trial]]


def read(data_dir: files.Path | None) -> Held | None:
  """Reads both sequences; None where a file of them is missing."""
  try:
    every = [_read(data_dir, name) for name in NAMES]
  except harness.MissingDataError:
    return None
  return Held(
    every,
    [
      [
        drop(trial, np.random.default_rng([i, j]))
        for j, trial in enumerate(every)
      ]
      for i in range(DROPS)
    ],
  )


def _read(data_dir, name):
  path = mot_files.find_file(data_dir, name, 'det/det.txt')
  boxes = mot_files.read_boxes(path, identities=False)
  places = ('gt/gt.txt', 'gt.txt')
  truth = mot_files.read_boxes(
    mot_files.find_file(data_dir, name, *places), identities=True
  )
  info = mot_files.read_info(path.parent.parent, boxes, truth)
  info = info._replace(name=name)
  none = np.zeros((len(boxes.ids), 0), np.float32)
  found = detections.Detected(boxes, boxes.ids, none, info)
  return judging.Trial(scenes.Scene(truth, info), found)


def drop(
  trial: judging.Trial, rng: np.random.Generator, share: float = SHARE
) -> judging.Trial:
  """A trial without a share of its detections."""
  kept = rng.random(len(trial.found.ids)) >= share
  found = trial.found
  return trial._replace(
    found=found._replace(
      boxes=found.boxes.where(kept),
      ids=found.ids[kept],
      looks=found.looks[kept],
    )
  )


def pooled(
  trials: Sequence[judging.Trial], results: Sequence[mot_files.Boxes]
) -> evaluation.Scores:
  """Scores of all sequences together; their truths have no classes."""
  return evaluation.evaluate(
    {
      trial.scene.info.name: evaluation.prepared(
        trial.scene.truth, result, trial.scene.info.length, classes=False
      )
      for trial, result in zip(trials, results)
    }
  )[0]


def judge(tracks: Sequence[judging.Track], held: Held) -> Scores:
  """IDF1 and MOTA of trackers, each of them trained with another seed.

  Args:
    tracks: of each seed.
    held: what they are judged on.

  Returns:
    Values by measure and kind: of `all`, (seeds, 1), of `drops`,
    (seeds, draws).
  """
  several = {'all': [held.every], 'drops': held.dropped}
  found: Scores = {}
  for kind, draws in several.items():
    scores = [
      [pooled(draw, [track(t.found) for t in draw]) for draw in draws]
      for track in tracks
    ]
    for measure in ('idf1', 'mota'):
      found[measure, kind] = np.array(
        [[getattr(one, measure) for one in row] for row in scores]
      )
  return found


def add(results: harness.Results, at: Mapping[str, str], found: Scores) -> None:
  """Adds a tracker's numbers, such as `idf1/METHOD/untrained/all`.

  Args:
    results: to which they are added, with their intervals.
    at: coordinates of the tracker.
    found: of `judge`.
  """
  for (measure, kind), values in found.items():
    place = {**at, 'data': 'untrained', 'draws': kind}
    results.put(place, {measure: judging.crossed(values)})
