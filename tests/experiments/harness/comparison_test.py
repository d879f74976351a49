"""Comparisons: choices, edges, widening, failures, and what is reported."""

import math

import numpy as np
import pytest

from experiments import harness
from experiments.harness.study import comparison

BEST = 1.0


def make_options(seeds=(0, 1)):
  return harness.Options('p', 'b', 'quick', None, None, None, seeds)


def make_rules(**changes):
  given = {
    'settings': {'size': 3},
    'score': lambda trained: trained.history['score'][-1],
    'tuning_seeds': (7, 8),
  } | changes
  return comparison.Rules(make_options(), **given)


def trained_with(scores):
  history = {'score': np.asarray(scores, np.float64)[None]}
  return harness.Trained(
    None, None, (), 1, np.array([1]), history, (), 0.0, 0.0
  )


class Recorder:
  """Trains by a formula, and keeps the jobs."""

  def __init__(self, score):
    self.jobs, self._score = [], score

  def __call__(self, job):
    self.jobs.append(job)
    rows = [
      self._score(job, {k: float(v[i]) for k, v in job.hyper.items()}, seed)
      for i, seed in enumerate(job.seeds)
    ]
    return trained_with(rows)


def peak_at(best):
  return lambda job, point, seed: -abs(math.log(point['rate'] / best))


def test_a_choice_within_the_grid_is_not_widened():
  train = Recorder(peak_at(1.0))
  outcome = comparison.run(make_rules(), 'm', train, {'rate': (0.1, 1.0, 10.0)})
  assert outcome.point == {'rate': 1.0}
  assert not outcome.edges
  assert len(outcome.trials) == 3
  tuning, reported = train.jobs
  assert tuning.tuning and tuning.seeds == (7, 8) * 3
  np.testing.assert_allclose(tuning.hyper['rate'], [0.1, 0.1, 1, 1, 10, 10])
  assert not reported.tuning and reported.seeds == (0, 1)
  assert reported.name == 'm'
  assert reported.settings['tried'] == [{'rate': 1.0}]


@pytest.mark.parametrize('best, steps', [(100.0, 3), (0.01, 3), (30.0, 2)])
def test_an_edge_is_widened_and_only_new_points_are_run(best, steps):
  train = Recorder(peak_at(best))
  outcome = comparison.run(make_rules(), 'm', train, {'rate': (0.3, 1.0, 3.0)})
  # Of 0.3, 1, 3 the next values are 9, 27, 81, or .09, .027, .0081.
  assert len(outcome.trials) == 3 + min(3, len(train.jobs) - 2)
  tried = [trial.point['rate'] for trial in outcome.trials]
  assert len(set(tried)) == len(tried)
  assert [len(job.seeds) for job in train.jobs[1:-1]] == [2] * (
    len(train.jobs) - 2
  )
  nearest = min(tried, key=lambda rate: abs(math.log(rate / best)))
  assert outcome.point['rate'] == nearest
  at_edge = nearest in (min(tried), max(tried))
  assert outcome.edges == (('rate',) if at_edge else ())


def test_widening_ends_after_three_times_and_the_edge_is_marked():
  train = Recorder(lambda job, point, seed: point['rate'])
  outcome = comparison.run(make_rules(), 'm', train, {'rate': (1.0, 2.0)})
  assert outcome.point == {'rate': 16.0}
  assert outcome.edges == ('rate',)
  results = harness.Results()
  comparison.add_outcomes(
    results, {'m': outcome}, lambda o: {'score': o.last('score')}
  )
  (row,), metrics = results.table('method'), results.metrics()
  assert row['rate'] == '16 (edge)'
  assert row['trials'].mean == metrics['trials/m'] == 5
  assert metrics['edges/m'] == 1
  assert metrics['score/m'] == 16.0


def test_bounds_and_choices_are_no_edges():
  axes = {
    'share': comparison.Axis((0.0, 0.5, 1.0), bounds=(0.0, 1.0)),
    'kind': comparison.among((0, 1, 2)),
  }
  train = Recorder(lambda job, point, seed: point['share'] + point['kind'])
  outcome = comparison.run(make_rules(), 'm', train, axes)
  assert outcome.point == {'share': 1.0, 'kind': 2.0}
  assert not outcome.edges and len(outcome.trials) == 9


def test_few_points_of_a_wider_grid():
  asked = []

  def try_points(points, widening):
    asked.append((widening, points))
    value = lambda p: -abs(math.log(p['a'] / 8)) - abs(p['b'] - 3) - p['c']
    none = np.array([])
    return [comparison.Trial(p, value(p), None, none) for p in points]

  grid = {'a': (1, 2), 'b': (1.0, 2.0), 'c': comparison.among((0, 1))}
  chosen, edges, trials = comparison.search(grid, try_points, all_points=False)
  assert chosen.point == {'a': 8, 'b': 2.0, 'c': 0} and not edges
  assert len(asked[0][1]) == 8 and len(trials) == sum(len(p) for _, p in asked)
  # Both ends at once, then the one that is still an end.
  beside = [{'a': a, 'b': b, 'c': 0} for a in (2, 4) for b in (2.0, 4.0)]
  assert asked[1] == (1, [p for p in beside if p['a'] + p['b'] > 4])
  assert asked[2] == (2, [{'a': 8, 'b': 2.0, 'c': 0}])
  assert [t.point['a'] for t in trials[-1:]] == [16] and len(asked) == 4
  assert all(isinstance(t.point['a'], int) for t in trials)
  # Below 1 comes 0, where the range ends by itself.
  chosen, edges, trials = comparison.search(
    {'a': (1, 2)},
    lambda points, _: [
      comparison.Trial(p, -p['a'], None, np.array([])) for p in points
    ],
  )
  assert (chosen.point, edges) == ({'a': 0}, ()), trials


def test_a_widened_axis_stops_at_its_bound():
  axis = comparison.Axis((0.2, 0.6), bounds=(0.0, 1.0)).widened(1)
  assert axis.values == (0.2, 0.6, 1.0)
  assert axis.side(1.0) == 0
  # Differences, where ratios make no sense.
  assert comparison.Axis((0.0, 1.0), (-5, 5)).widened(1).values == (0, 1, 2)
  assert comparison.Axis((0.0, 1.0), (-5, 5)).widened(-1).values == (-1, 0, 1)


def test_of_equals_the_inner_one_is_chosen():
  train = Recorder(lambda job, point, seed: min(point['rate'], 1.0))
  outcome = comparison.run(make_rules(), 'm', train, {'rate': (0.1, 1.0, 10.0)})
  assert outcome.point == {'rate': 1.0}


@pytest.mark.parametrize('bad', [math.nan, -math.inf, math.inf])
def test_a_point_with_a_stopped_seed_is_not_chosen(bad):
  score = lambda job, point, seed: (
    bad if (point['rate'], seed) == (3.0, 8) else point['rate']
  )
  outcome = comparison.run(
    make_rules(widenings=0), 'm', Recorder(score), {'rate': (1.0, 2.0, 3.0)}
  )
  assert outcome.point == {'rate': 2.0}


def test_the_worst_seed_may_decide():
  score = lambda job, point, seed: {(1.0, 7): 5.0, (1.0, 8): 0.0}.get(
    (point['rate'], seed), 1.0
  )
  grid = {'rate': comparison.among((1.0, 2.0))}
  mean = comparison.run(make_rules(), 'm', Recorder(score), grid)
  worst = comparison.run(
    make_rules(over_seeds=np.min), 'm', Recorder(score), grid
  )
  assert (mean.point['rate'], worst.point['rate']) == (1.0, 2.0)


def test_beyond_a_widened_edge_everything_may_stop():
  def train(job):
    if 4.0 in job.hyper['rate']:
      raise harness.AllStoppedError('all stopped')
    return trained_with(job.hyper['rate'])

  outcome = comparison.run(make_rules(), 'm', train, {'rate': (1.0, 2.0)})
  assert outcome.point == {'rate': 2.0}
  assert not outcome.edges and not outcome.failure


def test_tuning_on_validation_data_reports_the_same_run():
  train = Recorder(peak_at(1.0))
  rules = make_rules(tuning_seeds=())
  outcome = comparison.run(rules, 'm', train, {'rate': (0.1, 1.0, 10.0)})
  assert len(train.jobs) == 1 and not train.jobs[0].tuning
  np.testing.assert_array_equal(outcome.members, [2, 3])
  np.testing.assert_array_equal(outcome.last('score'), [0, 0])


@pytest.mark.parametrize('error', [TypeError('no such\nthing'), None])
def test_a_method_that_fails_costs_its_own_row(error):
  def train(job):
    if job.method == 'broken':
      raise error or harness.AllStoppedError('all stopped')
    return trained_with(job.hyper['rate'])

  with pytest.warns(RuntimeWarning, match='broken failed, the others continue'):
    outcomes = comparison.compare(
      make_rules(), ('broken', 'fine'), train, {'rate': (1.0, 2.0, 1.5)}
    )
  assert not outcomes['fine'].failure
  results = harness.Results()
  comparison.add_outcomes(
    results, outcomes, lambda o: {'score': o.last('score')}, {'at': 'here'}
  )
  rows, metrics = results.table('method'), results.metrics()
  said = 'TypeError: no such' if error else 'AllStoppedError'
  assert said in rows[0]['trials']
  assert 'score/broken/here' not in metrics and 'score/fine/here' in metrics


def test_errors_of_the_folder_end_the_comparison():
  def train(job):
    raise harness.OtherRunError('another run')

  with pytest.raises(harness.OtherRunError):
    comparison.compare(make_rules(), ('m',), train, {'rate': (1.0, 2.0)})


def test_all_methods_have_as_many_points():
  grids = {'a': {'rate': (1, 2, 3, 4)}, 'b': {'rate': (1, 2), 'own': (1, 2)}}
  train = Recorder(lambda job, point, seed: -abs(point['rate'] - 2.5))
  comparison.compare(make_rules(widenings=0), 'ab', train, grids.get)
  with pytest.raises(ValueError, match='a 4, b 2'):
    grids['b'] = {'rate': (1, 2)}
    comparison.compare(make_rules(), 'ab', train, grids.get)


def test_one_point_is_not_tuned():
  train = Recorder(peak_at(1.0))
  outcome = comparison.run(make_rules(), 'm', train, {'rate': (0.5,)})
  assert len(train.jobs) == 1 and not train.jobs[0].tuning
  assert outcome.point == {'rate': 0.5} and not outcome.edges


def test_tuning_seeds_are_not_reported():
  with pytest.raises(ValueError, match=r'the seeds \[1\] are both tuning'):
    make_rules(tuning_seeds=(1, 2))


def test_the_best_of_a_family_says_how_often_it_looked():
  outcomes = [
    comparison.Outcome(name, {}, score=score)
    for name, score in (('t1', 3.0), ('t5', math.nan), ('t9', 2.0))
  ]
  outcomes.append(comparison.Outcome('broken', {}, failure='it failed'))
  best = comparison.select_best('fednest', outcomes, lambda o: o.score)
  assert (best.method, best.score, best.evaluations_on_test) == (
    'fednest',
    2.0,
    3,
  )
  assert comparison.select_best('x', outcomes[-1:], lambda o: o.score).failure


@pytest.mark.parametrize('keep', [False, True])
def test_tuning_keeps_params_only_where_asked(keep):
  whole = trained_with([0.0, 1.0])._replace(params='large', state='larger')
  outcome = comparison.run(
    make_rules(keep=keep, tuning_seeds=(7,), widenings=0),
    'm',
    lambda job: whole,
    {'rate': (1.0, 2.0)},
  )
  assert (outcome.chosen.trained.params == 'large') == keep
  assert outcome.trained.params == 'large'
