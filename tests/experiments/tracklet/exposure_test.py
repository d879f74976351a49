"""Conditions, paired differences, and claims of the comparison."""

import dataclasses

import numpy as np
import pytest

from experiments import harness
from experiments.tracking import judging
from experiments.tracklet import claims, exposure, exposure_scores
from experiments.tracklet.train_report import FIRST
from tests.experiments.changes import change


def scored(rng, way):
  """Scores of three seeds on two sequences; each way has another mean."""
  level = 50.0 + 2 * [*exposure_scores.WAYS, FIRST].index(way)
  return {m: level + rng.normal(size=(3, 2)) for m in judging.MEASURES}


def test_leads_are_paired_by_seed_and_sequence_and_claims_have_metrics():
  rng, results = np.random.default_rng(0), harness.Results()
  by_condition = {}
  for condition in exposure.CONDITIONS:
    scores = {
      (way, matching): scored(rng, way)
      for way in (*exposure_scores.WAYS, FIRST)
      for matching in exposure.Settings().matchings
    }
    for oracle in exposure_scores.ORACLES:
      scores['teacher_forcing', f'oracle_{oracle}'] = {
        m: x + 4 for m, x in scores['teacher_forcing', 'step'].items()
      }
    exposure_scores.add_condition(results, condition, scores, ['A', 'B'])
    for way in exposure_scores.WAYS:
      results.add({'condition': condition, 'method': way}, cpu_seconds=1.0)
    by_condition[condition] = scores
  metrics = results.metrics()
  scores = by_condition['mixed']
  lead = (
    scores['rollouts', 'tracklet']['idf1']
    - scores['teacher_forcing', 'tracklet']['idf1']
  )
  name = 'idf1_lead/mixed/rollouts/teacher_forcing/tracklet'
  wanted = harness.mean_interval(lead.mean(axis=1))
  assert metrics[name] == pytest.approx(wanted.mean)
  assert metrics[f'{name}/half_width'] == pytest.approx(wanted.half_width)
  assert metrics[f'{name}/B'] == pytest.approx(lead[:, 1].mean())
  headroom = 'idf1_lead/mixed/teacher_forcing/last'
  assert metrics[headroom] == pytest.approx(4)
  for claim in (c for c in claims.CLAIMS if c.run == 'exposure'):
    verdict = harness.judge(claim, {'metrics': metrics}).verdict
    assert verdict.startswith(('shown', 'not shown', 'mean only'))


def test_conditions_change_the_detector_and_sequences_are_held_out_once():
  quick = exposure.PRESETS['quick']
  exposure.check(quick)
  for changes in exposure.CONDITIONS.values():
    data = dataclasses.replace(quick.data, **changes)
    detector = data.simulated_detector()
    assert detector.correlation == 0.5 and detector.jitter == 0.08
  for changes in (
    {'more_held_out': ('MOT17-02',)},
    {'validation': 'MOT17-09'},
    {'members': 2},
  ):
    with pytest.raises(harness.SettingsError, match='once each'):
      exposure.check(change(quick, **changes))
  for names, missing in ((('step',), 'tracklet'), (('tracklet',), 'step')):
    with pytest.raises(harness.SettingsError, match=missing):
      exposure.check(change(quick, matchings=names))


def test_scores_are_kept_until_what_they_depend_on_changes(tmp_path):
  path, calls = tmp_path / 'scores.json', []

  def compute():
    calls.append(1)
    return {'idf1': np.array([[0.1, 1 / 3]])}

  weights = {'last': np.ones(2)}
  one = exposure_scores.identify(weights, {'rate': 1})
  assert one != exposure_scores.identify({'last': np.zeros(2)}, {'rate': 1})
  assert one != exposure_scores.identify(weights, {'rate': 2})
  for _ in range(2):
    kept = exposure_scores.keep(path, one, compute)
    np.testing.assert_array_equal(kept['idf1'], [[0.1, 1 / 3]])
  assert len(calls) == 1
  exposure_scores.keep(path, 'other', compute)
  assert len(calls) == 2
  path.write_text(path.read_text().replace('0.1', '0.2'))
  with pytest.warns(RuntimeWarning, match='computing its numbers again'):
    kept = exposure_scores.keep(path, 'other', compute)
  assert kept['idf1'][0, 0] == 0.1 and len(calls) == 3


@pytest.mark.slow
def test_a_run_from_end_to_end_and_again(options, results, monkeypatch):
  pytest.importorskip('trackeval')
  given = options(exposure.PRESETS['smoke'], preset='smoke')
  harness.execute(exposure.main, given)
  metrics = results()['metrics']
  lead = metrics['idf1_lead/motion/rollouts/teacher_forcing/step']
  assert np.isfinite(lead)
  for name in (*exposure_scores.WAYS, FIRST):
    assert 0 <= metrics[f'mixed/motion/{name}'] <= 100
  for name in exposure_scores.WAYS:
    assert metrics[f'cpu_seconds/motion/{name}'] > 0
    assert metrics[f'rate/motion/{name}'] in (0.5, 1.0)
  # A second run reads all weights and scores, and costs, which would differ.
  fail = lambda *_, **__: pytest.fail('scored again')
  monkeypatch.setattr(exposure_scores, 'judge', fail)
  harness.execute(exposure.main, given)
  assert results()['metrics'] == metrics
