"""Runs trackers on simulated detections, tunes their rules, and judges them."""

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

WIDENINGS = 6  # Of a grid, so that a run's time has a bound.
# Detections in a row until a tracklet is told, for all trackers here.
BIRTH = comparison.Axis((2, 3), bounds=(1, 30))
MEASURES = ('idf1', 'mota', 'hota', 'switches')
Track = Callable[[detections.Detected], mot_files.Boxes]
T = TypeVar('T')


class Trial(NamedTuple):
  """Detections of a scene, and its truth."""

  scene: scenes.Scene
  found: detections.Detected


def trials(
  several: Sequence[scenes.Scene],
  detector: detections.Detector,
  seeds: Sequence[int],
) -> list[Trial]:
  """Simulates detections of scenes, once for each seed."""
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


def judge(track: Track, given: Sequence[Trial]) -> dict[str, np.ndarray]:
  """Scores of each trial, by the name of the measure."""
  rows = []
  for trial in given:
    result = track(trial.found)
    data = evaluation.prepared(
      trial.scene.truth, result, trial.scene.info.length
    )
    rows.append(evaluation.evaluate({trial.scene.info.name: data})[0])
  return {
    name: np.array([getattr(row, name) for row in rows]) for name in MEASURES
  }


def judge_all(
  several: Sequence[Callable[..., Track]],
  point: dict[str, Any],
  given: Sequence[Trial],
) -> dict[str, np.ndarray]:
  """Scores by measure, (trackers, trials), of trackers made of numbers."""
  rows = [judge(make(**point), given) for make in several]
  return {name: np.stack([row[name] for row in rows]) for name in MEASURES}


def true_identities(found: detections.Detected) -> mot_files.Boxes:
  """What no tracker of these detections can be above: every true box."""
  known = found.ids >= 0
  return found.boxes.where(known)._replace(ids=found.ids[known])


class Tuned(NamedTuple):
  """What was chosen on the training sequences.

  Attributes:
    point: numbers by name.
    edges: those that were chosen at an edge of what was tried.
    tried: points.
    value: mean IDF1 of the choice there.
  """

  point: dict[str, Any]
  edges: tuple[str, ...] = ()
  tried: int = 0
  value: float = float('nan')

  def words(self) -> str:
    """The numbers, those at an edge marked."""
    return ', '.join(
      f'{k} {v:g}' + ' (edge)' * (k in self.edges)
      for k, v in self.point.items()
    )


def idf1(results: Sequence[mot_files.Boxes], given: Sequence[Trial]) -> float:
  """Mean IDF1 of results of trials."""
  return float(
    np.mean(
      [
        evaluation.idf1(
          evaluation.prepared(
            trial.scene.truth, result, trial.scene.info.length
          )
        )
        for trial, result in zip(given, results, strict=True)
      ]
    )
  )


def tune(
  grid: comparison.Grid,
  values: Callable[[list[dict[str, Any]]], Sequence[float]],
  widenings: int = WIDENINGS,
) -> Tuned:
  """The best point of a grid, widened where it lies at an end.

  Args:
    grid: tried values by name; see `comparison.search`.
    values: of points, mean IDF1 on the training sequences.
    widenings: how often an axis may grow.

  Returns:
    `Tuned`.
  """

  def try_points(points, widening):
    del widening
    none = np.array([], int)
    return [
      comparison.Trial(point, float(value), None, none)
      for point, value in zip(points, values(points), strict=True)
    ]

  chosen, edges, trials = comparison.search(
    grid, try_points, widenings=widenings, all_points=False
  )
  return Tuned(chosen.point, edges, len(trials), chosen.score)


def values_of(
  make: Callable[..., Track], given: Sequence[Trial]
) -> Callable[[list[dict[str, Any]]], list[float]]:
  """Values for `tune` of a tracker that is made of numbers."""

  def value(point):
    track = make(**point)
    return idf1([track(trial.found) for trial in given], given)

  return lambda points: [value(point) for point in points]


class Judged(NamedTuple):
  """What trackers came to.

  Attributes:
    scores: by measure, (seeds, simulations).
    tuned: their rules; None if there is nothing to tune.
  """

  scores: dict[str, np.ndarray]
  tuned: Tuned | None = None


def tuned(
  title: str,
  several: Sequence[Callable[..., Track]],
  grid: comparison.Grid,
  tuning: Sequence[Trial],
  held: Sequence[Trial],
) -> Judged:
  """Tunes the first of some trackers, and judges all by what is chosen.

  Args:
    title: that is printed.
    several: of each training seed, a function of its numbers.
    grid: of the numbers.
    tuning: on which they are chosen.
    held: what is judged on.

  Returns:
    `Judged`.
  """
  found = tune(grid, values_of(several[0], tuning))
  print(f'{title}: {found.words()}', flush=True)
  rows = [judge(make(**found.point), held) for make in several]
  return Judged(
    {k: np.stack([row[k] for row in rows]) for k in MEASURES}, found
  )


def beside(work: Callable[[], T]) -> 'concurrent.futures.Future[T]':
  """Does work in a thread of its own, which no end of the program waits for.

  What is compiled runs without Python's lock, so that trackers are judged while
  networks are trained.
  """
  future: concurrent.futures.Future[T] = concurrent.futures.Future()

  def run():
    try:
      future.set_result(work())
    except BaseException as error:
      future.set_exception(error)

  threading.Thread(target=run, daemon=True).start()
  return future


def classical(noise: motion.Noise) -> dict[str, tuple[Any, comparison.Grid]]:
  """Classical trackers, each a function of its numbers, and their grid."""

  def overlap(least, **rules):
    model = baselines.overlap(noise, least=least)
    rules = tracker.Rules(second=2.0, **rules)
    return lambda found: tracker.online(model, found, rules)

  def likelihood(worth, fading, **rules):
    model = baselines.likelihood(noise, worth=worth, fading=fading)
    rules = tracker.Rules(second=2.0, **rules)
    return lambda found: tracker.online(model, found, rules)

  both = {
    # More frames than a sequence has make no difference.
    'death': comparison.Axis((30, 60), bounds=(1, 960)),
    'birth': BIRTH,
  }
  return {
    'overlap': (
      overlap,
      {
        'least': comparison.Axis((0.1, 0.2, 0.3), bounds=(0.0, 1.0)),
        **both,
      },
    ),
    'likelihood': (
      likelihood,
      {'worth': (18.0, 23.0), 'fading': (2.0, 4.0), **both},
    ),
  }


def crossed(values: Any) -> harness.Interval:
  """The interval of a mean over training seeds and simulations.

  Both are drawn, and each training is judged on each simulation: the interval
  is the root of the squares of those of the rows' and of the columns' means.

  Args:
    values: (training seeds, simulations), or (simulations,).

  Returns:
    An interval of as many values as there are, without an end for one. It
    keeps the means per training seed, or of one seed those per simulation.
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
