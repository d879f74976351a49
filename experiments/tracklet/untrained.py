"""Tests trackers on sequences of another data set: TUD-Campus, TUD-Stadtmitte.

No tracker is trained or tuned on them. Their detections are real, from a Faster
R-CNN, in the format of 2D MOT 2015. Together they have 250 frames and 1,500
true boxes, so one lost identity costs points of IDF1. Trackers are therefore
scored on all detections, and ten times without a random twentieth of them.
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


class Draws(NamedTuple):
  """Sequences with all detections, and with some dropped at random.

  Attributes:
    full: one trial per sequence.
    dropped: one trial per draw and sequence.
  """

  full: list[judging.Trial]
  dropped: list[list[judging.Trial]]


def read(data_dir: files.Path | None) -> Draws | None:
  """Reads both sequences; returns None if a file is missing."""
  try:
    full = [_read(data_dir, name) for name in NAMES]
  except harness.MissingDataError:
    return None
  return Draws(
    full,
    [
      [
        drop(trial, np.random.default_rng([i, j]))
        for j, trial in enumerate(full)
      ]
      for i in range(DROPS)
    ],
  )


def _read(data_dir, name):
  path = mot_files.find_file(data_dir, name, 'det/det.txt')
  boxes = mot_files.read_boxes(path, identities=False)
  truth = mot_files.read_boxes(
    mot_files.find_file(data_dir, name, 'gt/gt.txt', 'gt.txt'), identities=True
  )
  info = mot_files.read_info(path.parent.parent, boxes, truth)
  info = info._replace(name=name)
  embedding = np.zeros((len(boxes.ids), 0), np.float32)
  detected = detections.Detected(boxes, boxes.ids, embedding, info)
  return judging.Trial(scenes.Scene(truth, info), detected)


def drop(
  trial: judging.Trial, rng: np.random.Generator, share: float = SHARE
) -> judging.Trial:
  """Drops a random share of the detections of a trial."""
  detected = trial.detected
  mask = rng.random(len(detected.ids)) >= share
  return trial._replace(
    detected=detected._replace(
      boxes=detected.boxes.where(mask),
      ids=detected.ids[mask],
      embedding=detected.embedding[mask],
    )
  )


def pooled_scores(
  trials: Sequence[judging.Trial], results: Sequence[mot_files.Boxes]
) -> evaluation.Scores:
  """Pooled scores of all sequences; their truths have no classes."""
  return evaluation.evaluate(
    {
      trial.scene.info.name: trial.compare(result, classes=False)
      for trial, result in zip(trials, results)
    }
  )[0]


def judge(tracks: Sequence[judging.Track], draws: Draws) -> Scores:
  """Measures IDF1 and MOTA of the trackers of several training seeds.

  Args:
    tracks: one tracker per seed.
    draws: to score on.

  Returns:
    Values by measure and kind: `all`, (seeds, 1), and `drops`, (seeds, draws).
  """
  scores: Scores = {}
  for kind, sets in {'all': [draws.full], 'drops': draws.dropped}.items():
    rows = [
      [pooled_scores(x, [track(t.detected) for t in x]) for x in sets]
      for track in tracks
    ]
    for measure in ('idf1', 'mota'):
      scores[measure, kind] = np.array(
        [[getattr(one, measure) for one in row] for row in rows]
      )
  return scores


def add(
  results: harness.Results, at: Mapping[str, str], scores: Scores
) -> None:
  """Adds a tracker's numbers, such as `idf1/METHOD/untrained/all`.

  Args:
    results: to add to.
    at: coordinates of the tracker.
    scores: output of `judge`.
  """
  for (measure, kind), values in scores.items():
    interval = judging.crossed_interval(values)
    results.put({**at, 'data': 'untrained', 'draws': kind}, {measure: interval})
