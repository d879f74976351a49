"""Conditions and what is reported of them."""

import dataclasses

import pytest

from experiments.tracklet import curve, detections, train


def test_conditions_are_runs_of_train():
  found = curve.conditions(curve.PRESETS['quick'])
  assert len(found) == 11 and next(iter(found)) == 'standard-motion'
  one = found['hard-1.5']
  assert train.detector_of(one) == detections.HARD._replace(looks=16, noise=1.5)
  assert (one.warm, one.judged, one.seeds) == (1000, 4, 2)
  assert found['hard-motion'].looks == 0
  assert one.sequences == train.PRESETS['quick'].sequences


def test_what_is_reported_keeps_its_interval(
  options, results, tmp_path, monkeypatch
):
  given = {'standard-motion': 60.0, 'standard-2': 68.0}
  asked = []

  def fake(options):
    asked.append((options.binary, options.settings.noise))
    name = options.workdir.rsplit('/', 1)[-1]
    found = {'idf1/search': given[name], 'idf1/search/half_width': 1.5}
    return found | ({} if 'motion' in name else {'auc': 0.73})

  monkeypatch.setattr(curve.train, 'main', fake)
  settings = dataclasses.replace(curve.Settings(), noises=(2.0,), hard=())
  metrics = curve.main(options(settings))
  assert asked == [('train', 1.0), ('train', 2.0)]
  assert metrics['idf1/search/standard-2'] == 68.0
  assert metrics['idf1/search/standard-2/half_width'] == 1.5
  assert metrics['auc/standard-2'] == pytest.approx(0.73)
  assert 'auc/standard-motion' not in metrics
  assert results()['metrics'] == metrics
  rows = (tmp_path / 'table.md').read_text().splitlines()
  assert '68 ± 1.5' in rows[-1] and '0.73' in rows[-1]
  assert (tmp_path / 'curve.png').stat().st_size > 10_000


def test_curves_go_by_areas_and_motion_alone_is_level():
  metrics = {
    'idf1/search/hard-1': 70.0,
    'idf1/search/hard-1/half_width': 2.0,
    'idf1/search/hard-3': 60.0,
    'auc/hard-1': 0.9,
    'auc/hard-3': 0.6,
    'idf1/search/hard-motion': 55.0,
    'idf1/search/hard-motion/half_width': 1.0,
    'idf1/search/standard-1': 80.0,
    'auc/standard-1': 0.9,
    'idf1/search_lead/hard-1': 3.0,
  }
  assert curve.curves(metrics, 'hard') == {
    'search': ([0.6, 0.9], [[60, 60], [68, 72]]),
    'search, motion alone': ([0.5, 1.0], [[54, 56], [54, 56]]),
  }
  assert list(curve.curves(metrics, 'standard')) == ['search']
