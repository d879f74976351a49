"""Trackers of other packages on the same detections, judged in the same way.

Paper: Hu, Huang and Shen, Multi-object Tracking via End-to-end Tracklet
Searching and Ranking, 2020; these are not of the paper.

    python -m venv PEERS && PEERS/bin/pip install 'trackers>=2.6,<2.7' \
      norfair-enough
    BILEVEL_JAX_PEERS=PEERS/bin/python python -m experiments.tracklet.peers
        --preset=quick --data_dir=DATA

Expected: the best of them at about 62 of IDF1 on MOT17-09. Time: 15 minutes.

The packages are in an environment of their own, whose Python the variable
BILEVEL_JAX_PEERS names: `peer_trackers` runs there, on files of detections.
Each tracker is judged with its own defaults, and with the point of a grid that
has the best mean IDF1 on the training sequences, in the simulation on which the
trackers of `train` are tuned as well; a grid whose end is chosen is widened.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from experiments import harness
from experiments.harness import comparison
from experiments.tracklet import (
  detections,
  evaluation,
  judging,
  mot_files,
  train,
  untrained,
)

PYTHON_VARIABLE = 'BILEVEL_JAX_PEERS'
_SCRIPT = pathlib.Path(__file__).with_name('peer_trackers.py')
_WIDENINGS = 6
_axis = lambda *values, bounds=(0.0, 1.0): comparison.Axis(values, bounds)
# Frames; more than a sequence has make no difference.
_BUFFER = {'lost_track_buffer': _axis(30, 60, bounds=(1, 960))}
_BIRTH = {'minimum_consecutive_frames': judging.BIRTH}
# Confidences are from .05 on.
_SURE = {'high_conf_det_threshold': _axis(0.4, 0.6, bounds=(0.05, 1.0))}
_NEW = {'track_activation_threshold': _axis(0.5, 0.7, bounds=(0.05, 1.0))}

# What is tried of each on the training sequences, beside its defaults; an axis
# is widened where its end is chosen.
GRIDS: dict[str, dict[str, comparison.Axis]] = {
  'sort': {**_BUFFER, **_BIRTH, 'minimum_iou_threshold': _axis(0.2, 0.3)},
  'bytetrack': {**_BUFFER, **_BIRTH, **_SURE, **_NEW},
  'oc_sort': {**_BUFFER, **_BIRTH, **_SURE},
  'bot_sort': {**_BUFFER, **_BIRTH, **_SURE, **_NEW},
  'c_biou': {**_BUFFER, **_BIRTH, **_SURE, **_NEW},
  'norfair': {
    'distance_threshold': _axis(0.7, 0.9),
    # A delay is to be below the counter.
    'hit_counter_max': _axis(15, 30, bounds=(8, 960)),
    'initialization_delay': _axis(1, 3, bounds=(0, 7)),
  },
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the peers are judged on; as in `train`.

  Attributes:
    sequences: to tune on.
    held_out: to judge on.
    detector: standard or hard.
    judged: simulations of the sequence that is held out.
    tuned: whether the grids are tried.
    trackers: by their names.
  """

  sequences: tuple[str, ...] = train.Settings.sequences
  held_out: str = train.Settings.held_out
  detector: Literal['standard', 'hard'] = 'standard'
  judged: int = 10
  tuned: bool = True
  trackers: tuple[str, ...] = tuple(GRIDS)


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(judged=2, tuned=False, trackers=('sort',)),
}


@functools.cache
def _has_both(interpreter):
  try:
    return not subprocess.run(
      [interpreter, '-I', '-c', 'import trackers, norfair'],
      capture_output=True,
      check=False,
    ).returncode
  except OSError:
    return False


def python() -> str:
  """The interpreter of the environment that the packages are in.

  Raises:
    SettingsError: if it lacks them; says how to make one.
  """
  given = os.environ.get(PYTHON_VARIABLE, sys.executable)
  if not _has_both(given):
    raise harness.SettingsError(
      f'{given} has not both packages, trackers and norfair-enough: make an '
      'environment by `python -m venv PEERS && PEERS/bin/pip install '
      "'trackers>=2.6,<2.7' norfair-enough`, and name its Python in "
      f'{PYTHON_VARIABLE}, PEERS/bin/python.'
    )
  return given


def run_jobs(
  jobs: Sequence[Mapping[str, Any]],
  given: Sequence[detections.Detected],
  folder: pathlib.Path,
) -> tuple[list[list[mot_files.Boxes]], list[dict[str, float]]]:
  """Runs trackers on detections, in their own environment.

  Args:
    jobs: `tracker` and `options` of each.
    given: detections, of which files are written.
    folder: of the files.

  Returns:
    Results of each job on each of the detections, and `seconds`, `cpu_seconds`
    and `frames` of each job.

  Raises:
    SettingsError: if a tracker fails; says its last words.
  """
  folder.mkdir(parents=True, exist_ok=True)
  paths = []
  for i, found in enumerate(given):
    paths.append(folder / f'{i}-{found.info.name}.txt')
    mot_files.write_boxes(paths[-1], found.boxes)
  listed = [
    {
      **job,
      'sequences': [
        {
          'detections': str(path),
          'length': found.info.length,
          'output': str(path.with_suffix(f'.{i}.result')),
        }
        for path, found in zip(paths, given)
      ],
    }
    for i, job in enumerate(jobs)
  ]
  path = folder / 'jobs.json'
  path.write_text(json.dumps(listed), encoding='utf-8')
  done = subprocess.run(
    [python(), '-I', str(_SCRIPT), str(path)],
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    said = done.stderr.strip().splitlines() or ['nothing']
    raise harness.SettingsError(f'a tracker of a peer failed: {said[-1]}')
  results = [
    [
      mot_files.read_boxes(sequence['output'], identities=True)
      for sequence in job['sequences']
    ]
    for job in listed
  ]
  times = json.loads(path.with_suffix('.json.times').read_text())
  return results, times


def tune(
  name: str, given: Sequence[judging.Trial], folder: pathlib.Path
) -> judging.Tuned:
  """The best of a peer's defaults and its grid, on the training sequences."""

  def values(points):
    jobs = [{'tracker': name, 'options': point} for point in points]
    found, _ = run_jobs(jobs, [trial.found for trial in given], folder)
    return [judging.idf1(results, given) for results in found]

  best = judging.tune(GRIDS[name], values, _WIDENINGS)
  (default,) = values([{}])
  if default >= best.value:
    return judging.Tuned({}, (), best.tried + 1, default)
  return best._replace(tried=best.tried + 1)


def main(options: harness.Options) -> dict[str, float]:
  """Tunes the peers, judges them, and writes table and results."""
  begin = time.monotonic()
  evaluation.import_trackeval()  # Before the trackers run, not after it.
  settings = options.settings
  train_on, held_out, source = train.read(options)
  detector = train.detector_of(train.Settings(detector=settings.detector))
  tuning = judging.trials(train_on, detector, [train.TUNING])
  held = judging.trials(
    [held_out], detector, range(train.HELD, train.HELD + settings.judged)
  )
  unknown = [name for name in settings.trackers if name not in GRIDS]
  if unknown:
    raise harness.SettingsError(
      f'there is no tracker {unknown[0]!r}; there are {", ".join(GRIDS)}.'
    )
  folder = pathlib.Path(options.workdir)
  metrics: dict[str, float] = {}
  rows, chosen = [], {}
  for name in settings.trackers:
    best = judging.Tuned({})
    if settings.tuned:
      best = tune(name, tuning, folder / 'tuning')
      print(f'{name}: {best.words() or "defaults"}', flush=True)
    metrics[f'edges/{name}'] = float(len(best.edges))
    metrics[f'tried/{name}'] = float(best.tried)
    chosen[name] = best.point
    jobs = [{'tracker': name, 'options': point} for point in ({}, best.point)]
    found, times = run_jobs(jobs, [t.found for t in held], folder / 'held')
    for kind, results, spent in zip(('default', 'tuned'), found, times):
      if kind == 'tuned' and not settings.tuned:
        continue
      scored = [_scores(trial, one) for trial, one in zip(held, results)]
      row: dict[str, Any] = {'tracker': name.replace('_', ' '), 'numbers': kind}
      for measure in judging.MEASURES:
        row[measure] = judging.crossed(
          [getattr(one, measure) for one in scored]
        )
        metrics |= row[measure].metrics(f'{measure}/{name}_{kind}')
      row['frames a second'] = spent['frames'] / spent['seconds']
      row['tried'] = best.tried if kind == 'tuned' else ''
      row['chosen'] = best.words() if kind == 'tuned' else ''
      rows.append(row)
  metrics |= _elsewhere(options.data_dir, chosen, folder / 'untrained')
  metrics['idf1/best'] = max(
    value
    for name, value in metrics.items()
    if name.startswith('idf1/') and name.count('/') == 1
  )
  seconds = time.monotonic() - begin
  train.write(options, rows, metrics, source, seconds=seconds, chosen=chosen)
  return metrics


def _elsewhere(data_dir, chosen, folder):
  """IDF1 of each peer on what nothing was tuned on, and the median."""
  held = untrained.read(data_dir)
  if held is None:
    return {}
  draws = [held.every, *held.dropped]
  scores = {}
  for name, best in chosen.items():
    jobs = [{'tracker': name, 'options': point} for point in ({}, best)]
    given = [trial.found for draw in draws for trial in draw]
    for kind, results in zip(
      ('default', 'tuned'), run_jobs(jobs, given, folder)[0]
    ):
      each = len(held.every)
      pooled = [
        untrained.pooled(draw, results[i * each : (i + 1) * each])
        for i, draw in enumerate(draws)
      ]
      values = np.array([[one.idf1 for one in pooled]])
      scores[f'{name}_{kind}'] = {
        'idf1/all': values[:, :1],
        'idf1/drops': values[:, 1:],
      }
  metrics = untrained.report(scores)
  for kind in ('all', 'drops'):
    metrics[f'untrained/idf1/{kind}/median'] = float(
      np.median([found[f'idf1/{kind}'].mean() for found in scores.values()])
    )
  return metrics


def _scores(trial, result):
  data = evaluation.prepared(trial.scene.truth, result, trial.scene.info.length)
  return evaluation.evaluate({'one': data})[0]


STUDY = harness.Study(main, PRESETS, paper='tracklet', binary='peers')


if __name__ == '__main__':
  harness.run(STUDY)
