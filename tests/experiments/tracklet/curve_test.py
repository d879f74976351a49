"""Conditions, and their metrics and curves."""

import dataclasses

import numpy as np
import pytest

from experiments import harness
from experiments.harness.study import report, stored
from experiments.tracking import detections
from experiments.tracklet import curve, train


def test_conditions_are_runs_of_train():
  found = {c.folder: s for c, s in curve.conditions(curve.PRESETS['quick'])}
  assert len(found) == 11 and next(iter(found)) == 'standard-motion'
  one = found['hard-1.5']
  hard = detections.HARD._replace(embedding_size=16, noise=1.5)
  assert one.data.simulated_detector() == hard
  steps, judged = one.training.pretrain_steps, one.data.judged
  assert (steps, judged, one.seeds, one.full) == (1000, 4, 2, False)
  assert found['hard-motion'].data.embedding == 0
  assert one.data.sequences == train.PRESETS['quick'].data.sequences


def run_results(search, auc=None, half=1.5):
  """The results of a run of `train`."""
  found = harness.Results()
  number = harness.Interval(search, half, 8, 8, (search, search))
  found.add({'method': 'search'}, idf1=number)
  found.add({'method': 'teacher_forcing'}, idf1=number)
  lead = {'method': 'search', 'over': 'teacher_forcing'}
  found.add(lead, idf1_lead=3.0, switches_lead=1.0)
  if auc:
    found.add(auc=auc)
  return found


def test_metrics_keep_their_intervals(options, results, tmp_path, monkeypatch):
  given = {
    'standard-motion': run_results(60.0),
    'standard-2': run_results(68.0, 0.73),
  }
  asked = []

  def fake(options):
    asked.append((options.binary, options.settings.data.noise))
    return harness.Report(given[options.workdir.rsplit('/', 1)[-1]])

  monkeypatch.setattr(curve.train, 'main', fake)
  settings = dataclasses.replace(curve.PRESETS['quick'], noises=(2.0,), hard=())
  harness.execute(curve.main, options(settings))
  assert asked == [('train', 1.0), ('train', 2.0)]
  metrics = results()['metrics']
  assert metrics['idf1/search/standard/noise=2'] == 68.0
  assert metrics['idf1/search/standard/noise=2/half_width'] == 1.5
  assert metrics['auc/standard/noise=2'] == pytest.approx(0.73)
  assert metrics['idf1/search/standard/motion'] == 60.0
  assert 'auc/standard/motion' not in metrics
  rows = (tmp_path / 'table.md').read_text().splitlines()
  assert '68.0 ± 1.5' in rows[-1]
  assert (tmp_path / 'curve.png').stat().st_size > 10_000


def test_curves_are_over_areas_and_motion_only_is_level():
  runs = {
    curve.Condition('hard', 1.0): run_results(70.0, 0.9, half=2.0),
    curve.Condition('hard', 3.0): run_results(60.0, 0.6, half=0.0),
    curve.Condition('hard', curve.ALONE): run_results(55.0, half=1.0),
    curve.Condition('standard', 1.0): run_results(80.0, 0.9),
  }
  found = curve.curves(runs, 'hard')
  areas, ends = found['search']
  assert areas == [0.6, 0.9]
  np.testing.assert_array_equal(ends, [[60, 60], [68, 72]])
  assert found['search, motion only'] == ([0.5, 1.0], [[54, 56], [54, 56]])
  assert list(curve.curves(runs, 'standard')) == ['search', 'teacher forcing']


def test_a_group_of_settings_may_have_the_former_name_of_a_field():
  settings = report.plain(curve.PRESETS['quick'])
  results = {'paper': 'tracklet', 'binary': 'curve', 'preset': 'quick'}
  assert stored.declared({**results, 'settings': settings})[0] == 'curve'
