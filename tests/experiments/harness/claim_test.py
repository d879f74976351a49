"""Tests of claims: what a number says, and what a claim may be."""

import json
import math

import numpy as np
import pytest

from experiments import harness


def claim(**changes):
  given = {'run': 'toy', 'metric': 'a', 'at_least': 0.5}
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
      ({'at_least': 0}, (0.0,), (-1e-9,), '≥ 0'),
    ],
  )
  def test_bounds(self, bounds, inside, outside, words):
    bounded = claim(**bounds)
    assert bounded.bound() == words
    for value in inside:
      judged = judge(bounded, {'a': value})
      assert (judged.holds, judged.verdict) == (True, 'shown, no interval')
    for value in outside:
      judged = judge(bounded, {'a': value})
      assert (judged.holds, judged.verdict) == (False, 'not shown')

  @pytest.mark.parametrize(
    ('given', 'verdict'),
    [
      ({'a': 0.6, 'a/half_width': 0.09}, 'shown'),
      ({'a': 0.6, 'a/half_width': 0.11}, 'mean only'),
      ({'a': 0.4, 'a/half_width': 0.3}, 'not shown'),
      ({'a': 0.6, 'a/low': 0.55, 'a/high': 9.0}, 'shown'),
      ({'a': 0.6, 'a/low': 0.45, 'a/high': 0.61}, 'mean only'),
      ({'a': 0.6, 'a/half_width': None}, 'shown, no interval'),
    ],
  )
  def test_the_whole_interval_or_the_mean_alone(self, given, verdict):
    assert judge(claim(), given).verdict == verdict

  def test_between_two_bounds_both_ends_count(self):
    between = claim(at_least=0.0, at_most=1.0)
    verdict = lambda half: judge(between, {'a': 0.7, 'a/half_width': half})
    assert verdict(0.2).verdict == 'shown'
    assert verdict(0.4).verdict == 'mean only'

  @pytest.mark.parametrize(
    ('relative', 'words', 'limit'),
    [
      ({'at_least': 'b'}, '≥ b', 0.4),
      ({'at_least': 'b', 'factor': 1.5}, '≥ 1.5 x b', 0.6),
      ({'at_least': 'b', 'lead': 0.1}, '≥ b + 0.1', 0.5),
      ({'at_least': 'b', 'lead': -0.1}, '≥ b - 0.1', 0.3),
      ({'at_least': None, 'at_most': 'b', 'lead': -0.1}, '≤ b + 0.1', 0.5),
    ],
  )
  def test_a_factor_of_another_metric_or_a_lead_over_it(
    self, relative, words, limit
  ):
    side = -1 if 'at_most' in relative else 1
    relative = claim(**relative)
    inside = judge(relative, {'a': limit + side * 0.01, 'b': 0.4})
    assert inside.bound == f'{words}; b is 0.4'
    assert inside.holds
    assert not judge(relative, {'a': limit - side * 0.01, 'b': 0.4}).holds

  def test_the_other_one_has_an_interval_too(self):
    """3 and 2 x 2 add up to an interval of 5 around the difference."""
    relative = claim(at_least='b', factor=2.0)
    given = {'b': 10.0, 'a/half_width': 3.0, 'b/half_width': 2.0}
    assert judge(relative, given | {'a': 25.1}).verdict == 'shown'
    assert judge(relative, given | {'a': 24.9}).verdict == 'mean only'
    assert judge(relative, given | {'a': 19.9}).verdict == 'not shown'
    one = judge(relative, {'a': 99.0, 'b': 10.0, 'a/half_width': 3.0})
    assert one.verdict == 'shown, no interval'

  def test_seeds_that_are_shared_are_paired(self):
    """The seeds spread by 10, the difference by 0.1: only pairs tell it."""
    seeds = np.array([0.0, 10.0, 20.0, 30.0, 40.0])
    lead = np.array([0.9, 1.0, 1.1, 1.0, 1.0])
    values = {'a': seeds + lead, 'b': seeds}
    metrics = {}
    for name, one in values.items():
      metrics |= harness.mean_interval(one).metrics(name)
    per_seed = {name: one.tolist() for name, one in values.items()}
    relative = claim(at_least='b')
    assert judge(relative, metrics).verdict == 'mean only'
    judged = judge(relative, metrics, per_seed=per_seed)
    assert judged.verdict == 'shown'
    # 2.776 standard errors of 0.0707 / sqrt(5).
    assert judged.bound.endswith('; paired difference 1.000 ± 0.088')
    led = claim(at_least='b', lead=0.95)
    assert judge(led, metrics, per_seed=per_seed).verdict == 'mean only'
    twice = claim(at_least='b', factor=2.0, lead=-20.0)
    judged = judge(twice, metrics, per_seed=per_seed)
    # 21 - 2 x 20: the differences spread as the seeds do.
    assert judged.verdict == 'mean only' and '-19 ± 20' in judged.bound
    per_seed['b'][0] = None
    assert judge(relative, metrics, per_seed=per_seed).verdict == 'mean only'

  def test_fewer_than_five_seeds_are_counted(self):
    few = harness.mean_interval([0.9, 0.91, 0.9]).metrics('a')
    per_seed = {'a': list(few['a'].per_seed)}
    assert judge(claim(), few, per_seed=per_seed).verdict == 'shown, 3 seeds'

  def test_a_paired_interval_covers_no_difference_in_95_of_100_cases(self):
    """Three seeds, of which a percentile bootstrap covers 77 of 100."""
    draws = np.random.default_rng(0).normal(size=(2_000, 2, 3))
    beyond = 0
    for first, second in draws.tolist():
      results = {'per_seed': {'a': first, 'b': second}}
      interval = harness.paired_interval(results, 'a', 'b')
      beyond += abs(interval.mean) > interval.half_width
    # Five standard deviations of a count are 0.025 of them.
    assert abs(beyond / len(draws) - 0.05) < 0.025

  @pytest.mark.parametrize('value', [None, math.nan, math.inf, -math.inf])
  def test_what_is_not_finite_shows_nothing(self, value):
    judged = judge(claim(), {'a': value, 'a/half_width': 0.1})
    assert judged.verdict == 'not shown: a is not a finite number'
    assert judged.result == '-'
    for bound in ('at_least', 'at_most'):
      relative = claim(**{'at_least': None, bound: 'b'})
      judged = judge(relative, {'a': 1.0, 'b': value})
      assert judged.verdict == 'not shown: b is not a finite number'

  def test_a_mean_of_some_seeds_shows_nothing(self):
    found = harness.mean_interval([0.9, 0.9, math.nan]).metrics('a')
    said = judge(claim(), found)
    assert said.verdict == 'not shown: a lacks 1 seeds, which stopped'
    assert not said.holds

  def test_interval(self):
    assert judge(claim(), {'a': 0.75, 'a/half_width': 0.02}).result == (
      '0.750 ± 0.020'
    )
    assert judge(claim(), {'a': 0.75, 'a/half_width': None}).result == '0.75'

  def test_substituted_data_show_no_claim(self):
    said = judge(claim(substituted='toys'), {'a': 1.0}).verdict
    assert said == 'substituted data (toys): shown, no interval there'
    said = judge(claim(), {'a': 0.0}, substituted='packaged digits').verdict
    assert said == 'substituted data (packaged digits): not shown there'
    said = judge(claim(), {'a': 1.0}, substituted='').verdict
    assert said == 'shown, no interval'

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
      ({'factor': 1.5}, 'relative to another metric'),
      ({'at_least': 'b', 'factor': -1.0}, 'above zero'),
      ({'presets': ('huge',)}, 'huge'),
      ({'presets': ()}, 'smoke, quick, paper'),
    ],
  )
  def test_what_no_claim_can_be(self, changes, message):
    with pytest.raises(ValueError, match=message):
      claim(**changes)

  @pytest.mark.parametrize(
    ('changes', 'message'),
    [
      ({'flags': ('steps=3',)}, '--name=value'),
      ({'flags': ('--workdir=here',)}, '--workdir=here'),
      ({'presets': ('huge',)}, 'huge'),
    ],
  )
  def test_what_no_run_can_be(self, changes, message):
    with pytest.raises(ValueError, match=message):
      harness.Run('toy', **changes)

  def test_the_words_of_a_run(self):
    run = harness.Run('toy', mode='score', flags=('--steps=3',), data='mnist')
    assert run.words('quick') == ('score', '--preset=quick', '--steps=3')
    assert run.words('quick', '/data')[2] == '--data_dir=/data/mnist'
    assert harness.Run('toy').words('smoke', '/data')[1] == '--data_dir=/data'


class TestReadResults:
  @pytest.mark.parametrize(
    ('text', 'message'),
    [
      (None, 'wrote no results.json'),
      ('{"metr', 'damaged'),
      ('{}', 'no metrics'),
      ('{"metrics": null}', 'no metrics'),
      ('{"metrics": {"a": "good"}}', 'metric a is no number'),
      ('\udcff', 'damaged'),
      ('[]', 'no metrics'),
    ],
  )
  def test_errors(self, tmp_path, text, message):
    path = tmp_path / 'results.json'
    if text is not None:
      path.write_text(text, errors='surrogateescape')
    with pytest.raises(ValueError, match=message):
      harness.read_results(path)

  def test_reads(self, tmp_path):
    path = tmp_path / 'results.json'
    path.write_text(json.dumps({'metrics': {'a': 1}}))
    assert harness.read_results(path) == {'metrics': {'a': 1}}
