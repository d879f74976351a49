"""Metrics of a run, and a run from end to end."""

import sys
import threading

import numpy as np
import pytest
import scipy.stats

from experiments import harness
from experiments.harness.app import settings as settings_lib
from experiments.tracking import detections, judging, scenes
from experiments.tracklet import (
  claims,
  learning,
  peers,
  simulation,
  train,
  train_report,
  untrained,
)
from tests.experiments.changes import change


def test_an_interval_over_training_seeds_and_simulations():
  rng = np.random.default_rng(0)
  table = rng.normal(size=(3, 10)) + rng.normal(size=(3, 1))
  found = judging.crossed_interval(table)
  rows, columns = table.mean(1), table.mean(0)
  parts = [
    scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    for x in (rows, columns)
  ]
  assert found.mean == pytest.approx(table.mean())
  assert found.half_width == pytest.approx(np.hypot(*parts))
  assert np.isnan(judging.crossed_interval([1.0]).half_width)
  # For one seed it is the usual t interval.
  usual = harness.mean_interval(table[0])
  assert judging.crossed_interval(table[:1]).half_width == pytest.approx(
    usual.half_width
  )


def test_both_ways_start_from_the_pretrained_weights(options, monkeypatch):
  given = []

  def fake(task, run, settings, *, name, steps, start=None, **more):
    given.append((name, settings.hypotheses, steps, start))
    return harness.Trained(*[name] * len(harness.Trained._fields))

  monkeypatch.setattr(learning, 'train', fake)
  found = dict(train.train_networks(options(train.PRESETS['smoke']), None))
  assert given == [
    ('warm', 0, 20, None),
    ('teacher_forcing', 0, 20, 'warm'),
    ('search', 2, 10, 'warm'),
  ]
  assert list(found) == [train.FIRST, 'teacher_forcing', 'search']
  assert found[train.FIRST].params == 'warm'


def test_networks_of_a_seed_are_adjacent(options, monkeypatch):
  asked = {}

  def fake(solver, task, training):
    asked['seeds'] = training.seeds

  monkeypatch.setattr(learning.harness, 'train', fake)
  made = judging.trials([scenes.make_up(0)], detections.STANDARD, [0])
  data = detections.pad([trial.detected for trial in made])
  task = learning.Task(data, learning.motion.NOISE, 4, {}, 2)
  given = options(train.PRESETS['smoke'])._replace(seeds=(0, 3))
  run = learning.Run(given, {}, chunk=1, members=2)
  learning.train(task, run, learning.Search(0), name='a', rate=1.0, steps=1)
  assert asked['seeds'] == [0, 1, 6, 7]
  params = {'last': np.arange(4.0).reshape(4, 1, 1)}
  found = train.split_members(params, 2)
  assert [x['last'].ravel().tolist() for x in found] == [[0, 1], [2, 3]]
  one = train.split_members(params, 1)
  assert [x['last'].shape for x in one] == [(1, 1, 1)] * 4


def test_claims_have_their_metrics():
  names = ('overlap', 'likelihood', 'true_identities')
  both = ('search', 'teacher_forcing')
  shapes = dict.fromkeys(names, (1, 4)) | {train.FIRST: (2, 4)}
  for name in both:
    shapes |= {name: (2, 4), f'{name}_near_online': (2, 4)}
  scores = {
    method: {m: np.full(shape, 50.0 + i) for m in judging.MEASURES}
    for i, (method, shape) in enumerate(shapes.items())
  }
  purity = {
    (n, k): np.array([0.5, 0.7]) for n in both for k in train_report.SEARCHES
  }
  chosen = {
    'search': judging.Choice({'min_overlap': 0.5}),
    'overlap': judging.Choice(
      {'min_overlap': 0.3, 'death': 30}, ('min_overlap',), 7
    ),
  }
  results = train_report.summarise(scores, chosen, purity)
  untrained.add(
    results, {'method': 'better'}, {('idf1', 'all'): np.array([[70.0]])}
  )
  rows = results.table('method', train_report.COLUMNS)[:-1]
  metrics = results.metrics()
  chosen = {row['method']: row.get('chosen', '') for row in rows}
  assert chosen['search'] == 'min_overlap 0.5'
  assert chosen['overlap'] == 'min_overlap 0.3 (edge), death 30'
  assert metrics['edges/overlap'] == 1 and metrics['edges/search'] == 0
  for claim in (c for c in claims.CLAIMS if c.run == 'train'):
    judged = harness.judge(claim, {'metrics': metrics})
    assert judged.verdict.startswith(('shown', 'not shown', 'mean only'))
  assert metrics['idf1_lead/search/teacher_forcing'] == -2
  assert metrics['idf1_lead/search/first_weights'] == 1
  assert metrics['idf1_lead/teacher_forcing/first_weights'] == 3
  assert metrics['idf1_lead/better/classical'] == 5
  assert len(rows) == 8
  # Without other trackers there are no other leads.
  alone = train_report.summarise(
    {name: scores[name] for name in both},
    {'search': judging.Choice({})},
    purity,
  ).metrics()
  leads = {name for name in alone if name.startswith('idf1_lead/')}
  assert {name.removesuffix('/half_width') for name in leads} == {
    'idf1_lead/search/teacher_forcing'
  }


def test_rules_are_tuned_online_with_the_first_seed(monkeypatch):
  """On the training sequences; near-online trackers have the same rules."""
  asked = []

  def fake(name):
    def track(model, detected, rules):
      asked.append((name, model, detected, rules.min_score))
      return rules

    return track

  monkeypatch.setattr(train.tracker, 'online', fake('online'))
  monkeypatch.setattr(train.near_online, 'track', fake('near'))
  # No second pass and an immediate birth are best.
  monkeypatch.setattr(
    judging, 'idf1', lambda rules, on: rules[0].second_overlap - rules[0].birth
  )
  monkeypatch.setattr(
    judging,
    'judge',
    lambda track, on: {
      m: np.array([track(on).birth, track(on).second_overlap])
      for m in judging.MEASURES
    },
  )
  tuning = [judging.Trial(None, 'tuning')]
  given = ('search', ['first', 'second'], tuning, 'test')
  found = train.judge_networks(*given, with_near_online=True)
  assert found['search'].choice.point == {'second_overlap': 2.0, 'birth': 1}
  assert found['search_near_online'].choice is None
  for one in found.values():
    assert one.scores['idf1'].tolist() == [[1, 2], [1, 2]]
  # The smallest score is null's.
  assert {x for x in asked if x[2] == 'tuning'} == {
    ('online', 'first', 'tuning', 0.0)
  }
  assert {x[:3] for x in asked if x[2] == 'test'} == {
    (name, model, 'test')
    for name in ('online', 'near')
    for model in ('first', 'second')
  }
  assert set(train.judge_networks(*given, with_near_online=False)) == {'search'}


def test_a_thread_returns_its_result_or_its_error():
  started, go = threading.Event(), threading.Event()

  def work():
    started.set()
    assert go.wait(10)
    return 7

  future = judging.run_in_thread(work)
  assert started.wait(10) and not future.done()
  go.set()
  assert future.result(10) == 7
  failed = judging.run_in_thread(lambda: {}['nothing'])
  with pytest.raises(KeyError, match='nothing'):
    failed.result(10)


def test_tuning_chooses_the_best_point_below_the_upper_bound():
  pytest.importorskip('trackeval')
  scene = scenes.make_up(1, length=60, people=6)
  given = judging.trials([scene], detections.STANDARD, [0])
  make, grid = judging.classical(train.judging.motion.NOISE)['overlap']
  values = judging.objective(make, given)
  grid |= {'min_overlap': (0.2, 0.99), 'death': (30,), 'birth': (3,)}
  tuned = judging.tune(grid, values, widenings=0)
  assert tuned.point == {'min_overlap': 0.2, 'death': 30, 'birth': 3}
  assert (tuned.edges, tuned.tried) == (('min_overlap',), 2)
  assert tuned.describe() == 'min_overlap 0.2 (edge), death 30, birth 3'
  assert [tuned.value] == values([tuned.point])
  found = judging.judge(make(**tuned.point), given)
  assert found['idf1'].mean() == tuned.value
  bound = judging.judge(judging.true_identities, given)
  assert found['idf1'][0] <= bound['idf1'][0] + 1e-9 and found['mota'][0] > 30


@pytest.mark.parametrize('binary', [train, peers])
def test_a_missing_package_is_an_error_before_any_work(
  binary, options, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'trackeval', None)

  def read(options):
    raise AssertionError('data are read before')

  monkeypatch.setattr(simulation, 'read', read)
  given = options(binary.PRESETS['smoke'], preset='smoke')
  with pytest.raises(harness.SettingsError, match=r'experiments,mot\]'):
    binary.main(given)


def test_settings_select_data_and_detector(tmp_path, options):
  held = options(train.PRESETS['smoke'], preset='smoke')
  made, apart, _ = simulation.read(held)
  assert len(made) == 2 and apart.info.length == 60
  with pytest.raises(harness.MissingDataError, match='MOTChallenge'):
    simulation.read(held._replace(data_dir=str(tmp_path)))
  hard = simulation.Data(detector='hard', embedding=16)
  assert hard.simulated_detector() == detections.HARD._replace(
    embedding_size=16
  )


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'window': 1}, 'window must be at least 2'),
    ({'held_out': 'MOT17-02'}, 'held_out=MOT17-02'),
    ({'sequences': ('A', 'A')}, 'sequences=A,A'),
    ({'sequences': ()}, 'sequences needs at least one'),
  ],
)
def test_invalid_settings_are_refused(changes, message):
  train.check(train.PRESETS['quick'])
  with pytest.raises(harness.SettingsError, match=message):
    settings = change(train.PRESETS['quick'], **changes)
    settings_lib.check(settings)
    train.check(settings)


@pytest.mark.slow
def test_a_run_from_end_to_end(options, results, tmp_path):
  pytest.importorskip('trackeval')
  settings = change(
    train.PRESETS['smoke'],
    pretrain_steps=4,
    forcing_steps=2,
    search_steps=2,
    chunk=2,
  )
  harness.execute(train.main, options(settings, preset='smoke'))
  kept = results()
  assert 'made-up walks' in kept['substituted']
  for name in ('search.npz', 'teacher_forcing.npz', 'tracks.png', 'losses.png'):
    assert (tmp_path / name).stat().st_size > 500
  harness.execute(train.main, options(settings, preset='smoke'))
  assert results()['metrics'] == kept['metrics']
