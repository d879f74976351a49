"""Tests of claims: what a number says, and what a claim may be."""

import json
import math

import pytest

from experiments import harness


def claim(**changes):
  given = {'binary': 'toy', 'metric': 'a', 'at_least': 0.5}
  return harness.Claim('It works.', **given | changes)


def judge(claim_, metrics, **more):
  return harness.judge(claim_, {'metrics': metrics, **more})


class TestJudge:
  @pytest.mark.parametrize(
    ('bounds', 'inside', 'outside', 'words'),
    [
      ({'at_least': 0.5}, (0.5, 2.0), (0.49,), '≥ 0.5'),
      ({'at_least': None, 'at_most': 3}, (3.0, -1.0), (3.01,), '≤ 3'),
      (
        {'at_least': -2.3, 'at_most': -1.8},
        (-2.3, -2.0, -1.8),
        (-2.4, -1.7),
        'in [-2.3, -1.8]',
      ),
      ({'margin': 0.25}, (0.25, 1.0), (0.24,), '≥ 0.5, within 0.25'),
      ({'at_least': 0}, (0.0,), (-1e-9,), '≥ 0'),
    ],
  )
  def test_bounds(self, bounds, inside, outside, words):
    bounded = claim(**bounds)
    assert bounded.bound() == words
    for value in inside:
      judged = judge(bounded, {'a': value})
      assert (judged.holds, judged.verdict) == (True, 'shown')
    for value in outside:
      judged = judge(bounded, {'a': value})
      assert (judged.holds, judged.verdict) == (False, 'not shown')

  def test_another_metric_as_the_bound(self):
    relative = claim(at_least='b', margin=0.1)
    judged = judge(relative, {'a': 0.75, 'b': 0.8})
    assert judged.holds
    assert judged.bound == '≥ b, within 0.1; b is 0.8'
    assert not judge(relative, {'a': 0.69, 'b': 0.8}).holds

  @pytest.mark.parametrize('metrics', [{'a': None}, {'a': math.nan}])
  def test_what_is_not_finite_shows_nothing(self, metrics):
    judged = judge(claim(), metrics)
    assert (judged.verdict, judged.ours) == ('not shown', '-')
    assert not judge(claim(at_least='b'), {'a': 1.0, 'b': None}).holds

  def test_interval(self):
    assert judge(claim(), {'a': 0.75, 'a/half_width': 0.02}).ours == (
      '0.750 ± 0.020'
    )
    assert judge(claim(), {'a': 0.75, 'a/half_width': None}).ours == '0.75'

  def test_substituted_data_show_no_claim(self):
    said = judge(claim(substituted='toys'), {'a': 1.0}).verdict
    assert said == 'substituted data (toys): the bound holds there'
    said = judge(claim(), {'a': 0.0}, substituted='packaged digits').verdict
    assert said == 'substituted data (packaged digits): the bound fails there'
    assert judge(claim(), {'a': 1.0}, substituted='').verdict == 'shown'

  def test_a_missing_metric_is_named(self):
    with pytest.raises(ValueError, match='no metric a'):
      judge(claim(), {'b': 1.0})
    with pytest.raises(ValueError, match='no metric b'):
      judge(claim(at_least='b'), {'a': 1.0})


class TestClaim:
  @pytest.mark.parametrize(
    ('changes', 'message'),
    [
      ({'at_least': None}, 'needs a bound'),
      ({'margin': -1.0}, 'not negative'),
      ({'flags': ('steps=3',)}, '--name=value'),
      ({'flags': ('--workdir=here',)}, '--workdir=here'),
      ({'presets': ('huge',)}, 'huge'),
      ({'presets': ()}, 'smoke, quick, paper'),
    ],
  )
  def test_what_no_claim_can_be(self, changes, message):
    with pytest.raises(ValueError, match=message):
      claim(**changes)


class TestReadResults:
  @pytest.mark.parametrize(
    ('text', 'message'),
    [
      (None, 'wrote no results.json'),
      ('{"metr', 'damaged'),
      ('{}', 'no metrics'),
      ('[]', 'no metrics'),
    ],
  )
  def test_errors(self, tmp_path, text, message):
    path = tmp_path / 'results.json'
    if text is not None:
      path.write_text(text)
    with pytest.raises(ValueError, match=message):
      harness.read_results(path)

  def test_reads(self, tmp_path):
    path = tmp_path / 'results.json'
    path.write_text(json.dumps({'metrics': {'a': 1}}))
    assert harness.read_results(path) == {'metrics': {'a': 1}}
