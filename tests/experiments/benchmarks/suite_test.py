"""The suite: rows have names and bounds, resume, and fail one by one."""

import dataclasses
import json

import pytest

from experiments import harness
from experiments.benchmarks import environment, measure, suite


@pytest.fixture
def rows(monkeypatch, options):
  """Makes options for a suite of given rows, measured in this process."""

  def make(*rows, only=('all',)):
    known = {row.name: row for row in rows}
    monkeypatch.setattr(suite, 'registry', lambda preset: known)
    settings = dataclasses.replace(suite.PRESETS['smoke'], only=only)
    return options(settings, paper='benchmarks', binary='suite', seeds=(0,))

  def run(command):
    made = [flag for flag in command if flag.startswith('--only=')]
    assert made == ['--only=' + ','.join(make.options.settings.only)]
    # An earlier run's programs would hide what compiling takes.
    assert '--compile_cache=off' in command
    suite.measure_rows(make.options)
    return 0

  def started(*rows, **changes):
    make.options = make(*rows, **changes)
    return make.options

  monkeypatch.setattr(suite.lifeline, 'run', run)
  monkeypatch.setattr(suite, '_commit', lambda: 'abc')
  return started


def _row(name, numbers, bounds=None):
  def measured(context):
    if isinstance(numbers, Exception):
      raise numbers
    return numbers

  return measure.Row(name, f'{name} / another', measured, bounds or {})


RATIO = {
  'wall': 0.8,
  'low': 0.7,
  'high': 0.9,
  'cpu': 0.75,
  'seconds': 2.0,
  'base_seconds': 2.5,
}


def test_names_are_unique_and_groups_are_those_that_are_promised():
  for preset in suite.PRESETS:
    known = suite.registry(preset)
    assert set(known) == {row.name for row in known.values()}
    assert all(
      ' / ' in row.compared or 'to' in row.compared for row in known.values()
    )
  groups = {name.partition('/')[0] for name in known}
  assert groups >= {
    *('vpbgd', 'hypergradient', 'coupled', 'aggregators', 'projections', 'lm'),
    *('trackers', 'rl', 'first_step', 'call', 'scan', 'loop', 'import'),
    *('growth', 'warm_cache'),
  }
  for what in ('parameters', 'rows', 'objectives', 'sequences', 'seeds'):
    assert any(name.startswith(f'growth/{what}') for name in known)


def test_a_table_has_what_was_measured_and_what_failed(
  rows, results, tmp_path, capsys
):
  options = rows(
    _row('a/one', RATIO, {'wall': 0.9}),
    _row('a/two', {'time_exponent': 0.5}, {'time_exponent': 1.0}),
    _row('b', environment.MissingPeerError('the environment lacks torch')),
    _row('c', ZeroDivisionError('by none')),
    _row('d', RATIO),
  )
  suite.main(options)
  table = (tmp_path / 'table.md').read_text()
  one, two, b, c, d = table.splitlines()[2:]
  assert '0.800 (0.70 to 0.90)' in one and '2e+03 / 2.5e+03' in one
  assert 'time ≤ 0.9' in one and 'holds' in one
  assert 'time grows by the power 0.5' in two and 'holds' in two
  assert 'not measured: the environment lacks torch' in b
  assert 'not measured: failed: ZeroDivisionError: by none' in c
  assert 'holds' not in d
  kept = results()
  assert kept['metrics']['a/one/wall'] == 0.8
  assert kept['metrics']['rows/holds'] == 2
  assert kept['metrics']['rows/not_measured'] == 2
  history = {'a/one': 0.8, 'a/two': 0.5, 'b': None, 'c': None, 'd': 0.8}
  assert kept['history'] == history
  assert kept['commit'] == 'abc' and 'cores' in kept['processor']
  assert '2 holds' in capsys.readouterr().out


def test_a_ratio_above_its_bound_fails_the_command(rows, capsys):
  options = rows(
    _row('fine', RATIO, {'wall': 0.9}),
    _row('perhaps', RATIO, {'wall': 0.75}),
    _row('slow', RATIO, {'wall': 0.5}),
  )
  with pytest.raises(SystemExit) as info:
    suite.main(options)
  assert info.value.code == 1
  assert capsys.readouterr().err == 'Exceeded: slow.\n'


def test_rows_are_kept_and_what_failed_is_tried_again(rows, results):
  suite.main(rows(_row('a', RATIO), _row('b', ValueError('once'))))
  suite.main(rows(_row('a', ValueError('again')), _row('b', RATIO)))
  metrics = results()['metrics']
  assert metrics['a/wall'] == metrics['b/wall'] == 0.8


def test_rows_are_chosen_by_the_beginning_of_their_names(rows, tmp_path):
  two = _row('a/b', RATIO), _row('ab', RATIO)
  suite.main(rows(*two, only=('a',)))
  assert [p.name for p in (tmp_path / 'rows').iterdir()] == ['a+b.json']
  options = rows(*two, only=('c',))
  with pytest.raises(harness.SettingsError, match='groups are a, ab'):
    suite.main(options)


def test_a_row_whose_process_dies_says_so_and_the_others_go_on(
  rows, results, tmp_path, monkeypatch
):
  options = rows(_row('a', RATIO), _row('b', RATIO), _row('c', RATIO))
  inner = suite.lifeline.run

  def dies(command):
    path = tmp_path / 'rows' / 'b.json'
    if not path.exists():
      path.parent.mkdir()
      path.write_text(json.dumps({'missing': 'the process ended'}))
      return -9
    return inner(command)

  monkeypatch.setattr(suite.lifeline, 'run', dies)
  suite.main(options)
  assert results()['metrics']['rows/not_measured'] == 1
  assert 'the process ended' in (tmp_path / 'table.md').read_text()
