"""Trackers of other packages: files, grids, and a run."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from experiments import harness
from experiments.harness.app import settings as settings_lib
from experiments.tracking import (
  detections,
  evaluation,
  judging,
  mot_files,
  scenes,
)
from experiments.tracklet import peer_trackers, peers


def test_files_are_exchanged(tmp_path):
  given = mot_files.make([3, 1, 1], [[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 2, 2]])
  mot_files.write_boxes(tmp_path / 'det.txt', given)
  frames = peer_trackers.read(tmp_path / 'det.txt', 4)
  assert [len(boxes) for boxes in frames] == [2, 0, 1, 0]
  np.testing.assert_allclose(frames[0][0], [5, 6, 12, 14, 1])
  rows = [(3, 7, *frames[2][0, :4]), (1, 2, *frames[0][1, :4])]
  peer_trackers.write(tmp_path / 'out.txt', rows)
  back = mot_files.read_boxes(tmp_path / 'out.txt', identities=True)
  assert back.frames.tolist() == [1, 3] and back.ids.tolist() == [2, 7]
  np.testing.assert_allclose(back.boxes, [[0, 0, 2, 2], [1, 2, 3, 4]])


def test_the_script_does_not_import_jax():
  code = (
    'import runpy, sys\n'
    f'runpy.run_path({str(peers._SCRIPT)!r}, run_name="script")\n'
    'assert not {"jax", "experiments", "bilevel_jax"} & set(sys.modules)\n'
  )
  subprocess.run([sys.executable, '-I', '-c', code], check=True)


def test_a_peer_is_tuned_beyond_its_grid_or_keeps_its_defaults(
  tmp_path, monkeypatch
):
  assert set(peers.GRIDS) == {*peer_trackers.CLASSES, 'norfair'}

  def value(options):
    if not options:
      return default
    buffer, birth, overlap = options.values()
    return -abs(np.log(buffer / 240)) - abs(overlap - 0.24) - birth

  def run(jobs, sequences, folder):
    assert not sequences and folder == tmp_path
    asked.extend(job['options'] for job in jobs)
    return [value(job['options']) for job in jobs], None

  monkeypatch.setattr(peers, 'run_jobs', run)
  monkeypatch.setattr(judging, 'idf1', lambda results, on: results)
  asked, default = [], -9.0
  tuned = peers.tune('sort', [], tmp_path)
  assert list(tuned.point.values()) == [240, 1, 0.2] and not tuned.edges
  assert tuned.tried == len(asked) < 8 + 8 + 3 + 3 + 1 and asked[-1] == {}
  assert max(point['lost_track_buffer'] for point in asked[:-1]) == 480
  assert all(isinstance(p['lost_track_buffer'], int) for p in asked[:-1])
  default = 1.0
  assert peers.tune('sort', [], tmp_path).point == {}


def test_a_missing_package_and_an_unknown_tracker_are_errors(
  tmp_path, monkeypatch
):
  monkeypatch.setenv(peers.PYTHON_VARIABLE, str(tmp_path / 'none'))
  with pytest.raises(harness.SettingsError, match='make an environment by'):
    peers.interpreter()
  settings = dataclasses.replace(peers.PRESETS['smoke'], trackers=('sorted',))
  with pytest.raises(harness.SettingsError, match='=sorted: trackers knows'):
    settings_lib.check(settings)


@pytest.mark.slow
def test_every_peer_follows_people_who_walk(tmp_path):
  pytest.importorskip('trackeval')
  try:
    peers.interpreter()
  except harness.SettingsError as error:
    pytest.skip(str(error))
  scene = scenes.make_up(1, length=80, people=6)
  found = detections.simulate(scene.truth, scene.info, np.random.default_rng(0))
  jobs = [{'tracker': name, 'options': {}} for name in peers.GRIDS]
  results, times = peers.run_jobs(jobs, [found], tmp_path / 'jobs')
  for job, (result,), spent in zip(jobs, results, times):
    data = evaluation.prepare(scene.truth, result, 80)
    assert evaluation.idf1(data) > 60, job
    assert spent['frames'] == 80 and spent['seconds'] > 0
  with pytest.raises(harness.SettingsError, match=r'a peer failed: .*nothing_'):
    peers.run_jobs(
      [{'tracker': 'sort', 'options': {'nothing_': 1}}],
      [found],
      tmp_path / 'jobs',
    )
