"""Tests of the documents' tables: what is stored, what is made of it."""

import json
import re

import pytest

from experiments import harness, tables
from experiments.harness.study import documents
from experiments.harness.study import stored as stored_lib
from experiments.pbgd import claims, toy

ROWS = [
  {'method': 'one', 'loss': harness.Interval(0.25, 0.01, 3, 3), 'own': 'c 1'},
  {'method': 'two', 'loss': harness.Interval(0.5, 0.02, 3, 3), 'own': ''},
]


@pytest.fixture
def stored(tmp_path, monkeypatch):
  """A run of the toy by other flags, stored under a root of its own."""
  monkeypatch.setitem(
    claims.RUNS,
    'few',
    harness.Run('toy', flags=('--penalties=10,20', '--starts=7')),
  )
  settings = toy.Settings(starts=7, penalties=(10.0, 20.0))
  options = harness.Options(
    'pbgd', 'toy', 'quick', settings, str(tmp_path / 'run'), None, (0,)
  )
  harness.write_table(tmp_path / 'run', ROWS)
  harness.write_results(
    options,
    metrics={
      'loss': 0.25,
      'loss/half_width': 0.01,
      'slope': -1.0,
      'slope/low': -1.25,
      'slope/high': -0.5,
      'count/gradients': 12.0,
      'gone': float('nan'),
      **harness.mean_interval([1, 2, 3]).metrics('first'),
      **harness.mean_interval([2, 3, 5]).metrics('second'),
    },
    seconds=75.0,
    curves={'one': [1.0, 10.0, 1000.0], 'two': [1.0, float('nan'), 1.0]},
    substituted='made-up numbers',
    data=[harness.Source('digits', 'digits in /home/me/data/mnist', '0')],
  )
  return stored_lib.store(tmp_path / 'run' / 'results.json', tmp_path)


def filled(marker, root, old=''):
  text = documents.render(f'before\n<!-- {marker} -->{old} after', root)
  return re.search(r'-->(.*) after', text)[1]


def test_the_file_has_a_telling_name_and_the_command(stored, tmp_path):
  assert stored.parent == tmp_path / 'experiments' / 'pbgd' / 'results'
  assert stored.stem == 'few'
  kept = json.loads(stored.read_text())
  assert kept['command'] == (
    'python -m experiments.pbgd.toy --preset=quick --penalties=10,20 --starts=7'
  )
  assert kept['metrics']['loss'] == 0.25
  assert kept['data'] == 'digits in mnist'  # And not whose folder it is.
  assert kept['metrics']['count/gradients'] == 12
  assert kept['per_seed']['first'] == [1.0, 2.0, 3.0]
  for name in ('seeds', 'settings', 'versions', 'hardware', 'date'):
    assert kept[name]
  assert '"seeds": [ 0 ]' in stored.read_text()


def test_a_table_is_the_run_s_own(stored, tmp_path):
  name = f'pbgd/{stored.stem}'
  text = documents.render(
    f'<!-- table: {name} | method | curve | loss = the loss | own -->\nold\n'
    '<!-- end -->\nand more',
    tmp_path,
  )
  lines = text.splitlines()
  assert lines[1:5] == [
    '| method | curve | the loss | own |',
    '| --- | --- | --: | --- |',
    '| one | ▁▃█ | 0.250 ± 0.010 | c 1 |',
    '| two | ▁·▁ | 0.500 ± 0.020 |  |',
  ]
  end = lines.index('<!-- end -->')
  source = ' '.join(lines[6:end])
  assert source.startswith('(1 seed, made-up numbers, 75 s, ')
  assert source.endswith('--penalties=10,20 --starts=7`)')
  assert lines[end + 1 :] == ['and more']
  assert documents.render(text, tmp_path) == text
  assert not documents.unstored(text)
  one = documents.render(
    f'<!-- table: {name} | own == c 1 -->\n<!-- end -->', tmp_path
  )
  assert 'one' in one and 'two' not in one


def test_a_history_is_a_line_a_commit_and_is_drawn(tmp_path):
  """Of the same processor; a commit that is stored again has its last line."""
  options = harness.Options(
    'pbgd', 'toy', 'quick', toy.PRESETS['quick'], str(tmp_path), None, (0,)
  )
  harness.write_table(tmp_path, [{'row': 'one', 'x': '1'}])

  def keep(commit, value, processor='fast'):
    harness.write_results(
      options,
      metrics={},
      seconds=1.0,
      commit=commit,
      processor=processor,
      history={'one': value, 'missing': None},
    )
    return stored_lib.store(tmp_path, tmp_path)

  for commit, value in (('a', 5.0), ('b', 2.0), ('b', 4.0), ('c', 1.0)):
    path = keep(commit, value)
    keep('slow', 9.0, 'slow')
  keep('c', 1.0)
  lines = path.with_suffix('.history').read_text().splitlines()
  kept = [json.loads(line) for line in lines]
  commits = [(one['commit'], one['numbers']) for one in kept]
  assert ('b', {'one': 4.0}) in commits and len(commits) == 4
  assert kept[0]['date'] and kept[0]['versions']['jax']
  assert 'history' not in json.loads(path.read_text())
  text = '<!-- table: pbgd/toy | row | curve -->\n<!-- end -->'
  assert '| one | █▆▁ |' in documents.render(text, tmp_path)


@pytest.mark.parametrize(
  ('asked', 'made'),
  [
    ('loss', '0.250 ± 0.010'),
    ('loss .1f', '0.2'),
    ('loss .0%', '25%'),
    ('slope', '-1.000 (-1.250 to -0.500)'),
    ('slope .2f', '-1.00'),
    ('second - first', '1.3 ± 1.4'),
    ('second - first +.2f', '+1.33'),
  ],
)
def test_a_number_takes_the_place_of_the_old_one(stored, tmp_path, asked, made):
  marker = f'number: pbgd/{stored.stem} {asked}'
  for old in ('', '7', '0.75 ± 0.5', '-3.0 (-4 to 2e-8)', made):
    assert filled(marker, tmp_path, old) == made
  row = f'| a | <!-- {marker} -->{made} |'
  assert not documents.unstored(f'| b | c |\n| --- | --- |\n{row}')


@pytest.mark.parametrize(
  ('marker', 'says'),
  [
    ('number: pbgd/none loss', r'no stored result pbgd/none; stored: few'),
    ('number: moco/none loss', 'no stored result moco/none; stored: none'),
    ('number: {} other', 'has no metric other'),
    ('number: {} gone', 'not finite'),
    ('number: {} loss - first', 'lacks the values per seed of loss or first'),
    ('number: {} first - other', 'has no metric other'),
    ('table: {} | no such -->\n<!-- end', "no column 'no such'"),
  ],
)
def test_what_is_not_stored_is_named(stored, tmp_path, marker, says):
  marker = marker.format(f'pbgd/{stored.stem}')
  with pytest.raises(ValueError, match=says):
    documents.render(f'<!-- {marker} -->', tmp_path)


def test_a_table_may_wait_for_its_run(tmp_path):
  made = documents.render('<!-- table: moco/other -->\n<!-- end -->', tmp_path)
  assert 'Not measured yet: there is no stored result `moco/other`' in made


def test_a_row_by_hand_is_found():
  table = lambda cell: f'| a | b |\n| --- | --- |\n| x | {cell} |\n'
  for cell in ('0.5', '0.5 ± 0.1', '12', 'about 0.5'):
    assert len(documents.unstored(table(cell))) == 1
  by_hand = '<!-- by hand -->\n{}' + table('0.5') + '<!-- end -->\n'
  assert documents.unstored(by_hand.format(''))  # Nothing says where from.
  for text in (
    table('SOBA'),
    table('`p0.5`'),
    by_hand.format('Published:\n\n'),
    table('0.5, before results were stored'),
  ):
    assert not documents.unstored(text)


def test_too_much_is_not_stored(stored, tmp_path):
  path = tmp_path / 'run' / 'results.json'
  results = json.loads(path.read_text())
  results['metrics'] = {f'metric{i}': i / 3 for i in range(8_000)}
  path.write_text(json.dumps(results))
  with pytest.raises(ValueError, match=r'too many to store \(at most 100,000'):
    stored_lib.store(path.parent, tmp_path)


def test_what_one_page_lacks_keeps_no_other_from_being_written(
  tmp_path, monkeypatch, capsys
):
  found = [tmp_path / name for name in ('a.md', 'b.md')]
  found[0].write_text('a <!-- number: pbgd/nowhere loss -->')
  found[1].write_text(
    'b <!-- number: pbgd/toy gap_exponent/known_value .2f -->'
  )
  monkeypatch.setattr(tables, 'ROOT', tmp_path)
  monkeypatch.setattr(tables, 'pages', lambda: found)
  assert tables.main([]) == 1
  assert 'a.md: no stored result pbgd/nowhere' in capsys.readouterr().err
  assert re.search(r'-->-2\.\d\d$', found[1].read_text())


def test_a_refused_run_changes_no_page(tmp_path, monkeypatch, capsys):
  page = tmp_path / 'a.md'
  page.write_text('a <!-- number: pbgd/toy gap_exponent/known_value .2f -->')
  before = page.read_text()
  monkeypatch.setattr(tables, 'ROOT', tmp_path)
  monkeypatch.setattr(tables, 'pages', lambda: [page])
  assert tables.main(['--store', str(tmp_path / 'nothing')]) == 1
  assert 'nothing' in capsys.readouterr().err
  assert page.read_text() == before


def test_documents_are_as_the_stored_results_make_them(capsys):
  """`python -m experiments.tables` mends it."""
  status = tables.main(['--check'])
  printed = capsys.readouterr()
  assert status == 0, printed.err
  assert 'agree' in printed.out


def test_stored_results_are_small_and_whole():
  found = sorted(stored_lib.ROOT.glob('experiments/*/results/*.json'))
  assert found
  for path in found:
    kept = json.loads(path.read_text(encoding='utf-8'))
    assert path.stat().st_size < stored_lib.LARGEST
    for name in ('metrics', 'seeds', 'settings', 'versions', 'command', 'date'):
      assert kept[name], path
    assert kept['hardware']['cores'] and kept['wall_seconds']
