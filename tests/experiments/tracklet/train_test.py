"""What is reported of a run, and a run from end to end."""

import dataclasses
import sys
import threading

import numpy as np
import pytest
import scipy.stats

from experiments import harness
from experiments.tracklet import (
  claims,
  detections,
  judging,
  learning,
  peers,
  scenes,
  train,
)


def test_an_interval_over_training_seeds_and_simulations():
  rng = np.random.default_rng(0)
  table = rng.normal(size=(3, 10)) + rng.normal(size=(3, 1))
  found = judging.crossed(table)
  rows, columns = table.mean(1), table.mean(0)
  parts = [
    scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    for x in (rows, columns)
  ]
  assert found.mean == pytest.approx(table.mean())
  assert found.half_width == pytest.approx(np.hypot(*parts))
  assert np.isnan(judging.crossed([1.0]).half_width)
  # Of simulations alone it is the usual one.
  usual = harness.mean_interval(table[0])
  assert judging.crossed(table[:1]).half_width == pytest.approx(
    usual.half_width
  )


def test_k_grows_to_its_end_and_all_updates_are_spent():
  assert learning.stages(4, 400, growing=False) == [(4, 400)]
  assert learning.stages(4, 400, growing=True) == [(1, 133), (2, 133), (4, 134)]
  assert learning.stages(6, 10, growing=True) == [
    (1, 2),
    (2, 2),
    (3, 2),
    (6, 4),
  ]
  assert learning.stages(1, 5, growing=True) == [(1, 5)]
  # No stage without an update.
  assert learning.stages(8, 2, growing=True) == [(4, 1), (8, 1)]


def test_each_stage_begins_where_the_one_before_ended(options, monkeypatch):
  given = []

  def fake(task, losses, *, name, steps, start=None, **more):
    given.append((name, losses.beam.hypotheses, steps, start))
    return harness.Trained(*[name] * len(harness.Trained._fields))

  monkeypatch.setattr(learning, 'train', fake)
  settings = dataclasses.replace(
    train.PRESETS['smoke'], growing=True, hypotheses=4, search=30
  )
  found = dict(train.networks(options(settings), None))
  assert given[1][:2] == ('teacher_forcing', 0) and given[1][3] == 'warm'
  assert given[2:] == [
    ('search-1', 1, 10, 'warm'),
    ('search-2', 2, 10, 'search-1'),
    ('search', 4, 10, 'search-2'),
  ]
  assert found['search'].params == 'search'
  assert list(found) == [train.FIRST, 'teacher_forcing', 'search']
  assert found[train.FIRST].params == 'warm'


def test_networks_of_a_seed_stand_side_by_side(options, monkeypatch):
  asked = {}

  def fake(solver, init, *, seeds, **more):
    asked['seeds'] = seeds

  monkeypatch.setattr(learning.harness, 'train', fake)
  made = judging.trials([scenes.make_up(0)], detections.STANDARD, [0])
  data = detections.padded([trial.found for trial in made])
  task = learning.Task(data, learning.motion.NOISE, 4, {}, 2)
  given = options(train.PRESETS['smoke'])._replace(seeds=(0, 3))
  more = {'rate': 1.0, 'steps': 1, 'chunk': 1, 'settings': {}}
  learning.train(
    task, learning.TEACHER, name='a', members=2, options=given, **more
  )
  assert asked['seeds'] == [0, 1, 6, 7]
  params = {'last': np.arange(4.0).reshape(4, 1, 1)}
  found = train.members_of(params, 2)
  assert [x['last'].ravel().tolist() for x in found] == [[0, 1], [2, 3]]
  one = train.members_of(params, 1)
  assert [x['last'].shape for x in one] == [(1, 1, 1)] * 4


def test_claims_find_their_metrics():
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
    f'{n}_{k}': np.array([0.5, 0.7]) for n in both for k in train.SEARCHES
  }
  chosen = {
    'search': judging.Tuned({'least': 0.5}),
    'overlap': judging.Tuned({'least': 0.3, 'death': 30}, ('least',), 7),
  }
  metrics, rows = train.report(scores, chosen, purity)
  metrics |= {'untrained/idf1/all/better': 70.0}
  said = {row['method']: row['chosen'] for row in rows}
  assert said['search'] == 'least 0.5'
  assert said['overlap'] == 'least 0.3 (edge), death 30'
  assert metrics['edges/overlap'] == 1 and metrics['edges/search'] == 0
  for claim in (c for c in claims.CLAIMS if c.binary == 'train'):
    judged = harness.judge(claim, {'metrics': metrics})
    assert judged.verdict in (
      'shown',
      'not shown',
      'mean only',
      'shown, no interval',
    )
  assert metrics['idf1/search_lead'] == -2
  assert metrics['idf1/gain/search'] == 1
  assert metrics['idf1/gain/teacher_forcing'] == 3
  assert metrics['idf1/lead_over_classical'] == 5
  assert len(rows) == 8 and len({frozenset(row) for row in rows}) == 1
  # Where the networks alone are judged, there is nothing to compare them with.
  alone, rows = train.report(
    {name: scores[name] for name in both}, {'search': chosen['search']}, purity
  )
  assert len(rows) == 2 and alone['idf1/search_lead'] == -2
  lacks = ('classical', 'near_online', 'gain')
  assert not [k for k in alone if any(name in k for name in lacks)]


def test_rules_are_tuned_with_the_first_seed_online(monkeypatch):
  """On the training sequences; what waits has the same ones."""
  asked = []

  def track(name):
    def of(model, found, rules):
      asked.append((name, model, found, rules.least))
      return rules

    return of

  monkeypatch.setattr(train.tracker, 'online', track('online'))
  monkeypatch.setattr(train.near_online, 'track', track('near'))
  # Without a second pass is better, and so is a birth at once.
  monkeypatch.setattr(
    judging, 'idf1', lambda found, given: found[0].second - found[0].birth
  )
  monkeypatch.setattr(
    judging,
    'judge',
    lambda track, given: {
      m: np.array([track(given).birth, track(given).second])
      for m in judging.MEASURES
    },
  )
  tuning = [judging.Trial(None, 'tuning')]
  given = ('search', ['first', 'second'], tuning, 'held')
  found = train.judge_networks(*given, waiting=True)
  assert found['search'].tuned.point == {'second': 2.0, 'birth': 1}
  assert found['search_near_online'].tuned is None
  for one in found.values():
    assert one.scores['idf1'].tolist() == [[1, 2], [1, 2]]
  # The least affinity is null's.
  assert {x for x in asked if x[2] == 'tuning'} == {
    ('online', 'first', 'tuning', 0.0)
  }
  assert {x[:3] for x in asked if x[2] == 'held'} == {
    (name, model, 'held')
    for name in ('online', 'near')
    for model in ('first', 'second')
  }
  assert set(train.judge_networks(*given, waiting=False)) == {'search'}


def test_work_beside_gives_its_result_or_its_error():
  begun, go = threading.Event(), threading.Event()

  def work():
    begun.set()
    assert go.wait(10)
    return 7

  future = judging.beside(work)
  # It is under way, while this goes on.
  assert begun.wait(10) and not future.done()
  go.set()
  assert future.result(10) == 7
  failed = judging.beside(lambda: {}['nothing'])
  with pytest.raises(KeyError, match='nothing'):
    failed.result(10)


def test_tuning_takes_the_best_point_and_true_identities_are_the_roof():
  pytest.importorskip('trackeval')
  scene = scenes.make_up(1, length=60, people=6)
  given = judging.trials([scene], detections.STANDARD, [0])
  make, grid = judging.classical(train.judging.motion.NOISE)['overlap']
  values = judging.values_of(make, given)
  grid |= {'least': (0.2, 0.99), 'death': (30,), 'birth': (3,)}
  tuned = judging.tune(grid, values, widenings=0)
  assert tuned.point == {'least': 0.2, 'death': 30, 'birth': 3}
  assert (tuned.edges, tuned.tried) == (('least',), 2)
  assert tuned.words() == 'least 0.2 (edge), death 30, birth 3'
  assert [tuned.value] == values([tuned.point])
  found = judging.judge(make(**tuned.point), given)
  assert found['idf1'].mean() == tuned.value
  roof = judging.judge(judging.true_identities, given)
  assert found['idf1'][0] <= roof['idf1'][0] + 1e-9 and found['mota'][0] > 30


@pytest.mark.parametrize('binary', [train, peers])
def test_a_missing_package_is_told_before_any_work(
  binary, options, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'trackeval', None)

  def read(options):
    raise AssertionError('data are read before')

  monkeypatch.setattr(train, 'read', read)
  given = options(binary.PRESETS['smoke'], preset='smoke')
  with pytest.raises(harness.SettingsError, match=r"'bilevel_jax\[.*mot\]'"):
    binary.main(given)


def test_settings_say_what_was_meant(tmp_path, options):
  held = options(train.PRESETS['smoke'], preset='smoke')
  made, apart, _ = train.read(held)
  assert len(made) == 2 and apart.info.length == 60
  with pytest.raises(harness.MissingDataError, match='MOTChallenge'):
    train.read(held._replace(data_dir=str(tmp_path)))
  hard = dataclasses.replace(train.PRESETS['quick'], detector='hard', looks=16)
  assert train.detector_of(hard) == detections.HARD._replace(looks=16)


@pytest.mark.parametrize(
  'changes, says',
  [
    ({'window': 1}, 'window=1'),
    ({'held_out': 'MOT17-02'}, 'held_out=MOT17-02'),
    ({'sequences': ('A', 'A')}, 'sequences=A,A'),
    ({'sequences': ()}, 'each sequence once'),
  ],
)
def test_settings_that_no_run_can_have_are_refused(changes, says):
  train.check(train.PRESETS['quick'])
  settings = dataclasses.replace(train.PRESETS['quick'], **changes)
  with pytest.raises(harness.SettingsError, match=says):
    train.check(settings)


def test_crops_need_pictures(options, tmp_path):
  settings = dataclasses.replace(train.PRESETS['smoke'], crops='small')
  with pytest.raises(harness.SettingsError, match='needs pictures'):
    train.encoder_of(options(settings), [])
  assert train.encoder_of(options(train.PRESETS['smoke']), []) is None
  (tmp_path / 'MOT17-02').mkdir()
  with pytest.raises(harness.MissingDataError, match='--crops=none'):
    train.encoder_of(options(settings, data_dir=str(tmp_path)), [])


@pytest.mark.slow
def test_a_run_from_end_to_end(options, results, tmp_path):
  pytest.importorskip('trackeval')
  settings = dataclasses.replace(
    train.PRESETS['smoke'], warm=4, forced=2, search=2, judged=2, chunk=2
  )
  metrics = train.main(options(settings, preset='smoke'))
  kept = results()
  assert 'made-up walks' in kept['substituted']
  assert kept['metrics'].keys() == metrics.keys()
  for name in ('search.npz', 'teacher_forcing.npz', 'tracks.png', 'losses.png'):
    assert (tmp_path / name).stat().st_size > 500
  again = train.main(options(settings, preset='smoke'))
  assert again == metrics
