"""Sequences of another data set are read, dropped and pooled."""

import numpy as np
import pytest

from experiments import harness
from experiments.tracking import judging, mot_files
from experiments.tracklet import untrained


def written(tmp_path, name, shift):
  """Writes a sequence of two standing people, in the published folders."""
  rows = [(f, i, 100.0 * i + shift, 50) for f in range(1, 31) for i in (1, 2)]
  table = np.array(rows)
  boxes = np.c_[table[:, 2:], np.full((len(table), 2), 40.0)]
  truth = mot_files.make(table[:, 0], boxes, ids=table[:, 1])
  for folder, found, path in (
    ('MOT15_sort_det', mot_files.make(table[:, 0], boxes), 'det/det.txt'),
    ('motmetrics_pkg', truth, 'gt.txt'),
  ):
    path = tmp_path / 'mot' / folder / name / path
    path.parent.mkdir(parents=True)
    mot_files.write_boxes(path, found)


def test_both_sequences_are_read_and_a_twentieth_is_dropped(tmp_path):
  assert untrained.read(None) is None
  written(tmp_path, 'TUD-Campus', 0)
  assert untrained.read(tmp_path) is None
  written(tmp_path, 'TUD-Stadtmitte', 5)
  draws = untrained.read(tmp_path)
  assert [t.scene.info.name for t in draws.full] == list(untrained.NAMES)
  assert len(draws.dropped) == 10
  counts = [len(t.detected.ids) for draw in draws.dropped for t in draw]
  assert 0.9 * 60 < np.mean(counts) < 0.99 * 60 and len(set(counts)) > 1
  again = untrained.read(tmp_path)
  for one, two in zip(draws.dropped[3], again.dropped[3]):
    np.testing.assert_array_equal(
      one.detected.boxes.boxes, two.detected.boxes.boxes
    )


def test_sequences_are_pooled(tmp_path):
  pytest.importorskip('trackeval')
  for i, name in enumerate(untrained.NAMES):
    written(tmp_path, name, i)
  draws = untrained.read(tmp_path)
  named = lambda detected: detected.boxes._replace(
    ids=(detected.boxes.boxes[:, 0] > 150).astype(int)
  )
  halved = lambda detected: named(detected).where(detected.boxes.frames <= 15)
  found = untrained.judge([named, halved], draws)
  assert found['idf1', 'all'][0, 0] == 100
  # Half of the boxes, all correct: 2 / (1 + 1 / 0.5).
  assert found['idf1', 'all'][1, 0] == pytest.approx(100 * 2 / 3)
  assert found['idf1', 'drops'].shape == (2, 10)
  assert (found['idf1', 'drops'][0] < 100).all()
  results = harness.Results()
  untrained.add(results, {'method': 'search'}, found)
  metrics = results.metrics()
  assert metrics['idf1/search/untrained/all'] == pytest.approx(250 / 3)
  assert metrics['idf1/search/untrained/drops/half_width'] == pytest.approx(
    judging.crossed_interval(found['idf1', 'drops']).half_width
  )
