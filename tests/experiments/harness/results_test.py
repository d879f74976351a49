"""Tests of the numbers of a study, and of what is made from them."""

import json
import math

import pytest

from experiments import harness


@pytest.fixture
def results():
  found = harness.Results()
  for method, offset in (('soba', 0.0), ('saba', 1.0)):
    for steps in (10, 100):
      at = {'method': method, 'steps': steps}
      found.add(at, error=[steps + offset, steps + offset + 2])
    found.put({'method': method}, {'last/loss': offset})
  found.note({'method': 'soba'}, {'trials': 'one'})
  return found


def test_names_have_words_and_named_numbers(results):
  metrics = results.metrics()
  assert metrics['error/soba/steps=10'] == 11
  assert metrics['error/soba/steps=10'].per_seed == (10, 12)
  assert metrics['error/soba/steps=10/half_width'] == pytest.approx(
    12.706, 1e-4
  )
  assert metrics['last/loss/saba'] == 1
  assert 'last/loss/saba/half_width' not in metrics
  assert len(metrics) == 4 * 2 + 2  # A note is in the table alone.
  assert results['error/saba/steps=100'].mean == 102


def test_a_table_has_a_row_for_each_place_and_columns_for_the_others(results):
  rows = results.table('method', titles={'soba': 'SOBA'})
  assert [list(row) for row in rows] == [
    ['method', 'error, steps 10', 'error, steps 100', 'last/loss', 'trials'],
    ['method', 'error, steps 10', 'error, steps 100', 'last/loss'],
  ]
  assert [row['method'] for row in rows] == ['SOBA', 'saba']
  assert rows[0]['trials'] == 'one'
  assert rows[1]['error, steps 100'].per_seed == (101, 103)


def test_columns_are_chosen_and_named(results):
  last = harness.Column('error', 'last error', at={'steps': 100})
  rows = results.table('method', [last, 'trials'])
  assert [list(row) for row in rows] == [
    ['method', 'last error', 'trials'],
    ['method', 'last error'],
  ]
  both = results.table(('method', 'steps'), ['error'])
  assert [(r['method'], r['steps'], r['error'].mean) for r in both] == [
    *(('soba', '10', 11), ('soba', '100', 101)),
    *(('saba', '10', 12), ('saba', '100', 102)),
  ]


def test_a_seed_that_stopped_is_counted_and_a_number_alone_may_be_missing():
  found = harness.Results()
  found.add({'method': 'a'}, loss=[1.0, math.nan, 3.0], gap=None)
  metrics = found.metrics()
  assert metrics['loss/a'] == 2 and metrics['loss/a/stopped'] == 1
  assert math.isnan(metrics['gap/a'])


def test_an_interval_is_kept_as_it_is():
  found = harness.Results()
  found.add(slope=harness.jackknife_interval(lambda seeds: seeds.mean(), 3))
  assert set(found.metrics()) == {'slope', 'slope/half_width'}


def test_an_interval_may_have_ends_of_its_own():
  found = harness.Results()
  found.add(area=harness.Interval(0.6, 0.1, 1, 1, ends=(0.45, 0.65)))
  assert found.metrics() == {'area': 0.6, 'area/low': 0.45, 'area/high': 0.65}
  assert str(found['area']) == '0.60 ± 0.10'


def test_two_numbers_of_one_name_are_refused(results):
  with pytest.raises(ValueError, match='two numbers error/soba/steps=10'):
    results.add({'method': 'soba', 'steps': 10}, error=1.0)


def test_a_report_becomes_files(options, results, tmp_path):
  figure = harness.draw_curves({'a': ([1, 2], [3, 4])}, xlabel='x', ylabel='y')
  said = harness.Report(
    results, columns=['error'], plots={'a.png': figure}, more={'note': 'x'}
  )
  assert harness.execute(lambda _: said, options(None)) is said
  kept = json.loads((tmp_path / 'results.json').read_text())
  assert kept['metrics']['error/soba/steps=10'] == 11
  assert kept['per_seed']['error/soba/steps=10'] == [10, 12]
  assert kept['note'] == 'x' and kept['wall_seconds'] >= 0
  assert (tmp_path / 'table.md').read_text().startswith('| method | error, st')
  assert (tmp_path / 'a.png').read_bytes()[1:4] == b'PNG'
