"""Runs trackers on simulated detections, tunes their rules, and judges them."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special

from experiments import harness
from experiments.tracklet import (
  baselines,
  detections,
  evaluation,
  mot_files,
  motion,
  scenes,
  tracker,
)

MEASURES = ('idf1', 'mota', 'hota', 'switches')
Track = Callable[[detections.Detected], mot_files.Boxes]


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


def true_identities(found: detections.Detected) -> mot_files.Boxes:
  """What no tracker of these detections can be above: every true box."""
  known = found.ids >= 0
  return found.boxes.where(known)._replace(ids=found.ids[known])


def tune(
  make: Callable[..., Track], grid: Mapping[str, Sequence[Any]], given
) -> dict[str, Any]:
  """The point of a grid with the best mean IDF1 on the training sequences."""
  points = [
    dict(zip(grid, values)) for values in itertools.product(*grid.values())
  ]

  def value(point):
    track = make(**point)
    return np.mean(
      [
        evaluation.idf1(
          evaluation.prepared(
            trial.scene.truth, track(trial.found), trial.scene.info.length
          )
        )
        for trial in given
      ]
    )

  return max(points, key=value)


def edges(
  grid: Mapping[str, Sequence[Any]], chosen: Mapping[str, Any]
) -> tuple[str, ...]:
  """The numbers that were chosen at an edge of what was tried."""
  return tuple(
    name
    for name, values in grid.items()
    if len(values) > 1 and chosen[name] in (min(values), max(values))
  )


def classical(noise: motion.Noise) -> dict[str, tuple[Any, dict]]:
  """Classical trackers, each a function of its numbers, and their grid."""

  def overlap(least, death):
    model = baselines.overlap(noise, least=least)
    rules = tracker.Rules(second=2.0, death=death)
    return lambda found: tracker.online(model, found, rules)

  def likelihood(worth, fading, death):
    model = baselines.likelihood(noise, worth=worth, fading=fading)
    rules = tracker.Rules(second=2.0, death=death)
    return lambda found: tracker.online(model, found, rules)

  death = (30, 90)
  return {
    'overlap': (overlap, {'least': (0.1, 0.2, 0.3), 'death': death}),
    'likelihood': (
      likelihood,
      {'worth': (14.0, 18.0), 'fading': (1.0, 2.0), 'death': death},
    ),
  }


def crossed(values: Any) -> harness.Interval:
  """The interval of a mean over training seeds and simulations.

  Both are drawn, and each training is judged on each simulation: the interval
  is the root of the squares of those of the rows' and of the columns' means.

  Args:
    values: (training seeds, simulations), or (simulations,).

  Returns:
    An interval; of as many values as there are.
  """
  table = np.atleast_2d(np.asarray(values, np.float64))
  half = 0.0
  for axis in (0, 1):
    means = table.mean(axis=1 - axis)
    if len(means) > 1:
      quantile = scipy.special.stdtrit(len(means) - 1, 0.975)
      half += (quantile * means.std(ddof=1)) ** 2 / len(means)
  return harness.Interval(
    float(table.mean()), float(half**0.5), table.size, table.size
  )
