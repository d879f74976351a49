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
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from experiments import harness
from experiments.harness.study import comparison
from experiments.tracking import detections, evaluation, judging, mot_files
from experiments.tracklet import simulation, untrained

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
  """What the peers are judged on, as in `train`.

  Attributes:
    data: sequences, and detections that are simulated of them.
    tuned: whether the grids are tried.
    trackers: by their names.
  """

  data: simulation.Data = simulation.Data()  # noqa: RUF009
  tuned: bool = True
  trackers: Annotated[tuple[str, ...], harness.Among(GRIDS)] = tuple(GRIDS)


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


def judge(
  results: harness.Results,
  name: str,
  best: judging.Tuned,
  held: Sequence[judging.Trial],
  folder: pathlib.Path,
  *,
  kinds: Sequence[str],
) -> None:
  """Adds the numbers of a peer.

  Args:
    results: to which they are added.
    name: of the peer.
    best: what was chosen.
    held: what it is judged on.
    folder: of files.
    kinds: its numbers: 'default', 'tuned'.
  """
  jobs = [{'tracker': name, 'options': point} for point in ({}, best.point)]
  found, times = run_jobs(jobs, [t.found for t in held], folder)
  results.add({'tracker': name}, edges=len(best.edges), tried=best.tried)
  for kind, outputs, spent in zip(kinds, found, times, strict=False):
    at = {'tracker': name, 'numbers': kind}
    scored = [_scores(trial, one) for trial, one in zip(held, outputs)]
    for measure in judging.MEASURES:
      values = [getattr(one, measure) for one in scored]
      results.put(at, {measure: judging.crossed(values)})
    tuned = kind == 'tuned'
    results.note(
      at,
      {
        'frames a second': spent['frames'] / spent['seconds'],
        'tried': best.tried if tuned else '',
        'chosen': best.words() if tuned else '',
      },
    )


def judge_elsewhere(
  results: harness.Results,
  data_dir: str | None,
  chosen: Mapping[str, Mapping[str, Any]],
  folder: pathlib.Path,
) -> None:
  """Adds IDF1 of each peer on what nothing was tuned on, and the median."""
  held = untrained.read(data_dir)
  if held is None:
    return
  draws = [held.every, *held.dropped]
  given = [trial.found for draw in draws for trial in draw]
  each = len(held.every)
  values: dict[str, list[float]] = {'all': [], 'drops': []}
  for name, best in chosen.items():
    jobs = [{'tracker': name, 'options': point} for point in ({}, best)]
    outputs = run_jobs(jobs, given, folder)[0]
    for kind, output in zip(('default', 'tuned'), outputs, strict=True):
      pooled = [
        untrained.pooled(draw, output[i * each : (i + 1) * each]).idf1
        for i, draw in enumerate(draws)
      ]
      found = {
        ('idf1', 'all'): np.array([pooled[:1]]),
        ('idf1', 'drops'): np.array([pooled[1:]]),
      }
      untrained.add(results, {'tracker': name, 'numbers': kind}, found)
      for (_, draw), idf1 in found.items():
        values[draw].append(float(idf1.mean()))
  for draw, means in values.items():
    at = {'tracker': 'median', 'data': 'untrained', 'draws': draw}
    results.add(at, idf1=np.median(means))


def main(options: harness.Options) -> harness.Report:
  """Tunes the peers and judges them."""
  evaluation.import_trackeval()  # Before the trackers run, not after it.
  settings = options.settings
  train_on, held_out, source = simulation.read(options)
  tuning = settings.data.tuning_trials(train_on)
  held = settings.data.held_trials(held_out)
  folder = pathlib.Path(options.workdir)
  results = harness.Results()
  chosen, kinds = {}, ('default', 'tuned')[: 1 + settings.tuned]
  for name in settings.trackers:
    best = judging.Tuned({})
    if settings.tuned:
      best = tune(name, tuning, folder / 'tuning')
      print(f'{name}: {best.words() or "defaults"}', flush=True)
    chosen[name] = best.point
    judge(results, name, best, held, folder / 'held', kinds=kinds)
  best = max(
    results.mean('idf1', {'tracker': name, 'numbers': kind})
    for name in settings.trackers
    for kind in kinds
  )
  results.add({'tracker': 'best'}, idf1=best)
  judge_elsewhere(results, options.data_dir, chosen, folder / 'untrained')
  return harness.Report(
    results,
    rows=('tracker', 'numbers'),
    columns=(*judging.MEASURES, 'frames a second', 'tried', 'chosen'),
    titles={name: name.replace('_', ' ') for name in GRIDS},
    data=[source],
    published=[simulation.PUBLISHED],
    more={'chosen': chosen},
  )


def _scores(trial, result):
  data = evaluation.prepared(trial.scene.truth, result, trial.scene.info.length)
  return evaluation.evaluate({'one': data})[0]


STUDY = harness.Study(
  main,
  PRESETS,
  paper='tracklet',
  binary='peers',
  check=lambda settings: settings.data.check(),
  renamed={'looks': 'data.embedding'},
)


if __name__ == '__main__':
  harness.run(STUDY)
