"""Runs trackers on simulated detections, tunes their rules, and scores them."""

import concurrent.futures
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import scipy.special

from experiments import harness
from experiments.harness.study import comparison
from experiments.tracking import (
  baselines,
  detections,
  evaluation,
  mot_files,
  motion,
  scenes,
  tracker,
)

MAX_WIDENINGS = 6  # Extensions of a grid; bounds the time of a run.
# Detections in a row before a tracklet is reported, for all trackers here.
BIRTH = comparison.Axis((2, 3), bounds=(1, 30))
MEASURES = ('idf1', 'mota', 'hota', 'switches')
Track = Callable[[detections.Detected], mot_files.Boxes]
T = TypeVar('T')


class Trial(NamedTuple):
  """Detections of a scene, and its truth."""

  scene: scenes.Scene
  detected: detections.Detected

  def compare(
    self, result: mot_files.Boxes, *, classes: bool = True
  ) -> dict[str, Any]:
    """Makes trackeval's input from a result; see `evaluation.prepare`."""
    truth, info = self.scene
    return evaluation.prepare(truth, result, info.length, classes=classes)


def trials(
  several: Sequence[scenes.Scene],
  detector: detections.Detector,
  seeds: Sequence[int],
) -> list[Trial]:
  """Simulates the detections of scenes, once per seed."""
  return [
    Trial(
      scene,
      detections.simulate(
        scene.truth, scene.info, np.random.default_rng([seed, i]), detector
      ),
    )
    for seed in seeds
    for i, scene in enumerate(several)
  ]


def score(
  results: Sequence[mot_files.Boxes], on: Sequence[Trial]
) -> dict[str, np.ndarray]:
  """Scores the result of each trial, by the name of the measure."""
  rows = [
    evaluation.evaluate({'result': trial.compare(result)})[0]
    for trial, result in zip(on, results, strict=True)
  ]
  return {
    name: np.array([getattr(row, name) for row in rows]) for name in MEASURES
  }


def judge(track: Track, on: Sequence[Trial]) -> dict[str, np.ndarray]:
  """Runs a tracker on trials and scores it, by the name of the measure."""
  return score([track(trial.detected) for trial in on], on)


def judge_all(
  makers: Sequence[Callable[..., Track]],
  point: dict[str, Any],
  on: Sequence[Trial],
) -> dict[str, np.ndarray]:
  """Scores the trackers of a point, by measure, (trackers, trials)."""
  rows = [judge(make(**point), on) for make in makers]
  return {name: np.stack([row[name] for row in rows]) for name in MEASURES}


def true_identities(detected: detections.Detected) -> mot_files.Boxes:
  """Reports each true detection by its true identity: an upper bound."""
  true = detected.ids >= 0
  return detected.boxes.where(true)._replace(ids=detected.ids[true])


class Choice(NamedTuple):
  """The point that was chosen on the training sequences.

  Attributes:
    point: values by name.
    edges: names whose value is at an edge of the grid.
    tried: number of points.
    value: mean IDF1 of the point there.
  """

  point: dict[str, Any]
  edges: tuple[str, ...] = ()
  tried: int = 0
  value: float = float('nan')

  def describe(self) -> str:
    """The values; those at an edge are marked."""
    return ', '.join(
      f'{k} {v:g}' + ' (edge)' * (k in self.edges)
      for k, v in self.point.items()
    )


def idf1(results: Sequence[mot_files.Boxes], on: Sequence[Trial]) -> float:
  """Mean IDF1 of the results of trials."""
  return float(
    np.mean(
      [
        evaluation.idf1(trial.compare(result))
        for trial, result in zip(on, results, strict=True)
      ]
    )
  )


def tune(
  grid: comparison.Grid,
  values: Callable[[list[dict[str, Any]]], Sequence[float]],
  widenings: int = MAX_WIDENINGS,
) -> Choice:
  """Finds the best point of a grid, extending axes whose end is chosen.

  Args:
    grid: values by name; see `comparison.search`.
    values: a function of points to their mean IDF1 on the training sequences.
    widenings: how often an axis may be extended.

  Returns:
    `Choice`.
  """

  def try_points(points, widening):
    del widening
    none = np.array([], int)
    return [
      comparison.Trial(point, float(value), None, none)
      for point, value in zip(points, values(points), strict=True)
    ]

  chosen, edges, tried = comparison.search(
    grid, try_points, widenings=widenings, all_points=False
  )
  return Choice(chosen.point, edges, len(tried), chosen.score)


def objective(
  make: Callable[..., Track], on: Sequence[Trial]
) -> Callable[[list[dict[str, Any]]], list[float]]:
  """The `values` of `tune` for a tracker that is made of a point."""

  def value(point):
    track = make(**point)
    return idf1([track(trial.detected) for trial in on], on)

  return lambda points: [value(point) for point in points]


class Judged(NamedTuple):
  """Scores of a tracker.

  Attributes:
    scores: by measure, (seeds, simulations).
    choice: its rules; None if they were not tuned.
  """

  scores: dict[str, np.ndarray]
  choice: Choice | None = None


def tune_and_judge(
  title: str,
  makers: Sequence[Callable[..., Track]],
  grid: comparison.Grid,
  tuning: Sequence[Trial],
  test: Sequence[Trial],
) -> Judged:
  """Tunes the first of several trackers, and scores all at its choice.

  Args:
    title: to print.
    makers: functions of a point to a tracker, one per training seed.
    grid: values by name.
    tuning: trials to choose the point on.
    test: trials to score on.

  Returns:
    `Judged`.
  """
  choice = tune(grid, objective(makers[0], tuning))
  print(f'{title}: {choice.describe()}', flush=True)
  return Judged(judge_all(makers, choice.point, test), choice)


def run_in_thread(work: Callable[[], T]) -> 'concurrent.futures.Future[T]':
  """Runs work in a daemon thread.

  Compiled programs release Python's lock, so trackers are scored while networks
  train.
  """
  future: concurrent.futures.Future[T] = concurrent.futures.Future()

  def run():
    try:
      future.set_result(work())
    except BaseException as error:
      future.set_exception(error)

  threading.Thread(target=run, daemon=True).start()
  return future


def make_tracker(
  track: Callable[..., mot_files.Boxes], model: tracker.Model, **rules: Any
) -> Track:
  """A tracker from a model and some rules; the others keep their defaults."""
  return lambda detected: track(model, detected, tracker.Rules(**rules))


def classical(noise: motion.Noise) -> dict[str, tuple[Any, comparison.Grid]]:
  """Classical trackers: functions of a point, and their grids, by name."""

  def overlap(min_overlap, **rules):
    model = baselines.overlap(noise, min_overlap=min_overlap)
    return make_tracker(tracker.online, model, **rules)

  def likelihood(match_score, gap_decay, **rules):
    model = baselines.likelihood(
      noise, match_score=match_score, gap_decay=gap_decay
    )
    return make_tracker(tracker.online, model, **rules)

  both = {
    # A sequence has fewer frames than the bound.
    'death': comparison.Axis((30, 60), bounds=(1, 960)),
    'birth': BIRTH,
  }
  overlaps = comparison.Axis((0.1, 0.2, 0.3), bounds=(0.0, 1.0))
  scores = {'match_score': (18.0, 23.0), 'gap_decay': (2.0, 4.0)}
  return {
    'overlap': (overlap, {'min_overlap': overlaps, **both}),
    'likelihood': (likelihood, {**scores, **both}),
  }


def crossed_interval(values: Any) -> harness.Interval:
  """Interval of a mean over training seeds and simulations, both random.

  Each network is scored on each simulation. The squared half-width is the sum
  of the squared half-widths over the row means and over the column means.

  Args:
    values: (training seeds, simulations), or (simulations,).

  Returns:
    The interval; its half-width is NaN for a single value. It keeps the mean
    per training seed, or for one seed the value per simulation.
  """
  table = np.atleast_2d(np.asarray(values, np.float64))
  half = math.nan if table.size == 1 else 0.0
  for axis in (0, 1):
    means = table.mean(axis=1 - axis)
    if len(means) > 1:
      quantile = scipy.special.stdtrit(len(means) - 1, 0.975)
      half += (quantile * means.std(ddof=1)) ** 2 / len(means)
  rows = table.mean(axis=1) if len(table) > 1 else table[0]
  return harness.Interval(
    float(table.mean()),
    float(half**0.5),
    table.size,
    table.size,
    tuple(rows.tolist()),
  )
