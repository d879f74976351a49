r"""Trackers of other packages on the same detections.

Paper: Hu, Huang and Shen, Multi-object Tracking via End-to-end Tracklet
Searching and Ranking, 2020; these trackers are not in the paper.

    python -m venv PEERS && PEERS/bin/pip install 'trackers>=2.6,<2.7' \
      norfair-enough
    BILEVEL_JAX_PEERS=PEERS/bin/python python -m experiments.tracklet.peers \
      --preset=quick --data_dir=DATA

Expected: the best of them at an IDF1 of about 62 on MOT17-09. Time: 15 minutes.

The packages have an environment of their own, whose Python is named by
BILEVEL_JAX_PEERS; `peer_trackers` runs there on files of detections. Each
tracker is scored with its defaults, and with the better of these and the point
of a grid with the best mean IDF1 on the training sequences, in the simulation
that `train` tunes on. A grid is extended where its end is chosen.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from experiments import harness
from experiments.harness.study import comparison
from experiments.tracking import detections, evaluation, judging, mot_files
from experiments.tracklet import simulation, untrained

PYTHON_VARIABLE = 'BILEVEL_JAX_PEERS'
_SCRIPT = pathlib.Path(__file__).with_name('peer_trackers.py')
_axis = lambda *values, bounds=(0.0, 1.0): comparison.Axis(values, bounds)
# In frames; a sequence has fewer than the bound.
_BUFFER = {'lost_track_buffer': _axis(30, 60, bounds=(1, 960))}
_BIRTH = {'minimum_consecutive_frames': judging.BIRTH}
# The smallest simulated confidence is 0.05.
_HIGH = {'high_conf_det_threshold': _axis(0.4, 0.6, bounds=(0.05, 1.0))}
_NEW = {'track_activation_threshold': _axis(0.5, 0.7, bounds=(0.05, 1.0))}

# Points to try on the training sequences besides the defaults.
GRIDS: dict[str, dict[str, comparison.Axis]] = {
  'sort': {**_BUFFER, **_BIRTH, 'minimum_iou_threshold': _axis(0.2, 0.3)},
  'bytetrack': {**_BUFFER, **_BIRTH, **_HIGH, **_NEW},
  'oc_sort': {**_BUFFER, **_BIRTH, **_HIGH},
  'bot_sort': {**_BUFFER, **_BIRTH, **_HIGH, **_NEW},
  'c_biou': {**_BUFFER, **_BIRTH, **_HIGH, **_NEW},
  'norfair': {
    'distance_threshold': _axis(0.7, 0.9),
    # The delay must be below the counter.
    'hit_counter_max': _axis(15, 30, bounds=(8, 960)),
    'initialization_delay': _axis(1, 3, bounds=(0, 7)),
  },
}


MEANINGS = {
  'sort': 'SORT: Kalman filter and overlap.',
  'bytetrack': 'ByteTrack: SORT, then detections of low confidence.',
  'oc_sort': 'OC-SORT: SORT with motion estimated from observations.',
  'bot_sort': 'BoT-SORT: ByteTrack with another state; without images here.',
  'c_biou': 'C-BIoU: overlap of enlarged boxes, in two passes.',
  'norfair': 'Norfair: distance of boxes, after a delay.',
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings; the data are those of `train`.

  Attributes:
    data: sequences, and their simulated detections.
    tuned: whether to tune each tracker.
    trackers: trackers to score.
  """

  data: simulation.Data = simulation.Data()  # noqa: RUF009
  tuned: bool = True
  trackers: Annotated[tuple[str, ...], harness.Among(GRIDS, MEANINGS)] = tuple(
    GRIDS
  )


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    data=simulation.Data(judged=2), tuned=False, trackers=('sort',)
  ),
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


def interpreter() -> str:
  """The Python of the environment with the packages.

  Raises:
    SettingsError: if a package is missing; says how to make an environment.
  """
  path = os.environ.get(PYTHON_VARIABLE, sys.executable)
  if not _has_both(path):
    raise harness.SettingsError(
      f'{path} lacks trackers or norfair-enough: make an environment by '
      '`python -m venv PEERS && PEERS/bin/pip install '
      "'trackers>=2.6,<2.7' norfair-enough`, and set "
      f'{PYTHON_VARIABLE} to its Python, PEERS/bin/python.'
    )
  return path


def run_jobs(
  jobs: Sequence[Mapping[str, Any]],
  sequences: Sequence[detections.Detected],
  folder: pathlib.Path,
) -> tuple[list[list[mot_files.Boxes]], list[dict[str, float]]]:
  """Runs trackers on detections, in their own environment.

  Args:
    jobs: `tracker` and `options` of each.
    sequences: detections.
    folder: of the files of detections and results.

  Returns:
    Results of each job on each sequence, and `seconds`, `cpu_seconds` and
    `frames` of each job.

  Raises:
    SettingsError: if a tracker fails; quotes the last line of its error.
  """
  folder.mkdir(parents=True, exist_ok=True)
  paths = []
  for i, detected in enumerate(sequences):
    paths.append(folder / f'{i}-{detected.info.name}.txt')
    mot_files.write_boxes(paths[-1], detected.boxes)
  listed = [
    {
      **job,
      'sequences': [
        {
          'detections': str(path),
          'length': detected.info.length,
          'output': str(path.with_suffix(f'.{i}.result')),
        }
        for path, detected in zip(paths, sequences)
      ],
    }
    for i, job in enumerate(jobs)
  ]
  path = folder / 'jobs.json'
  path.write_text(json.dumps(listed), encoding='utf-8')
  process = subprocess.run(
    [interpreter(), '-I', str(_SCRIPT), str(path)],
    capture_output=True,
    text=True,
    check=False,
  )
  if process.returncode:
    lines = process.stderr.strip().splitlines() or ['no message']
    raise harness.SettingsError(f'a tracker of a peer failed: {lines[-1]}')
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
  name: str, on: Sequence[judging.Trial], folder: pathlib.Path
) -> judging.Choice:
  """Chooses the defaults or a point of the grid, on the training sequences."""

  def values(points):
    jobs = [{'tracker': name, 'options': point} for point in points]
    outputs, _ = run_jobs(jobs, [trial.detected for trial in on], folder)
    return [judging.idf1(results, on) for results in outputs]

  best = judging.tune(GRIDS[name], values)
  (default,) = values([{}])
  if default >= best.value:
    return judging.Choice({}, (), best.tried + 1, default)
  return best._replace(tried=best.tried + 1)


def judge(
  results: harness.Results,
  name: str,
  best: judging.Choice,
  test: Sequence[judging.Trial],
  folder: pathlib.Path,
  *,
  kinds: Sequence[str],
) -> None:
  """Adds the numbers of a peer to the results.

  Args:
    results: to add to.
    name: of the peer.
    best: the tuned point.
    test: trials to score on.
    folder: of files.
    kinds: 'default', or 'default' and 'tuned'.
  """
  points = {'default': {}, 'tuned': best.point}
  jobs = [{'tracker': name, 'options': points[kind]} for kind in kinds]
  outputs, times = run_jobs(jobs, [t.detected for t in test], folder)
  results.add({'tracker': name}, edges=len(best.edges), tried=best.tried)
  for kind, output, spent in zip(kinds, outputs, times, strict=True):
    at = {'tracker': name, 'numbers': kind}
    for measure, values in judging.score(output, test).items():
      results.put(at, {measure: judging.crossed_interval(values)})
    tuned = kind == 'tuned'
    results.note(
      at,
      {
        'frames a second': spent['frames'] / spent['seconds'],
        'tried': best.tried if tuned else '',
        'chosen': best.describe() if tuned else '',
      },
    )


def judge_untrained(
  results: harness.Results,
  data_dir: str | None,
  points: Mapping[str, Mapping[str, Any]],
  folder: pathlib.Path,
) -> None:
  """Adds IDF1 on another data set: of each peer, and the median."""
  draws = untrained.read(data_dir)
  if draws is None:
    return
  sets = [draws.full, *draws.dropped]
  sequences = [trial.detected for one in sets for trial in one]
  size = len(draws.full)
  values: dict[str, list[float]] = {'all': [], 'drops': []}
  for name, best in points.items():
    jobs = [{'tracker': name, 'options': point} for point in ({}, best)]
    outputs = run_jobs(jobs, sequences, folder)[0]
    for kind, output in zip(('default', 'tuned'), outputs, strict=True):
      pooled = [
        untrained.pooled_scores(one, output[i * size : (i + 1) * size]).idf1
        for i, one in enumerate(sets)
      ]
      scores = {
        ('idf1', 'all'): np.array([pooled[:1]]),
        ('idf1', 'drops'): np.array([pooled[1:]]),
      }
      untrained.add(results, {'tracker': name, 'numbers': kind}, scores)
      for (_, draw), idf1 in scores.items():
        values[draw].append(float(idf1.mean()))
  for draw, means in values.items():
    at = {'tracker': 'median', 'data': 'untrained', 'draws': draw}
    results.add(at, idf1=np.median(means))


def main(options: harness.Options) -> harness.Report:
  """Tunes and scores the peers."""
  evaluation.import_trackeval()  # Fails before the trackers run, not after.
  settings = options.settings
  train_on, held_out, source = simulation.read(options)
  tuning = settings.data.tuning_trials(train_on)
  test = settings.data.test_trials(held_out)
  folder = pathlib.Path(options.workdir)
  results = harness.Results()
  points, kinds = {}, ('default', 'tuned')[: 1 + settings.tuned]
  for name in settings.trackers:
    best = judging.Choice({})
    if settings.tuned:
      best = tune(name, tuning, folder / 'tuning')
      print(f'{name}: {best.describe() or "defaults"}', flush=True)
    points[name] = best.point
    judge(results, name, best, test, folder / 'held', kinds=kinds)
  best = max(
    results.mean('idf1', {'tracker': name, 'numbers': kind})
    for name in settings.trackers
    for kind in kinds
  )
  results.add({'tracker': 'best'}, idf1=best)
  judge_untrained(results, options.data_dir, points, folder / 'untrained')
  return harness.Report(
    results,
    rows=('tracker', 'numbers'),
    columns=(*judging.MEASURES, 'frames a second', 'tried', 'chosen'),
    titles={name: name.replace('_', ' ') for name in GRIDS},
    data=[source],
    published=[simulation.PUBLISHED],
    more={'chosen': points},
  )


STUDY = harness.Study(
  main,
  PRESETS,
  check=lambda settings: settings.data.check(),
  renamed={'looks': 'data.embedding'},
)


if __name__ == '__main__':
  harness.run(STUDY)
