"""Tests of the reproduction of claims, by the toy as its binary."""

import importlib
import json
import signal
import sys

import pytest
from absl import flags

from experiments import harness, reproduce
from experiments.harness import flags as flags_lib

TOY = ('--starts=4', '--penalties=10,20', '--solvers=known_value')


def claim(words='It works.', **changes):
  given = {
    'binary': 'toy',
    'metric': 'fraction_at_minima',
    'at_least': 0.5,
    'flags': TOY,
  }
  return harness.Claim(words, **given | changes)


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Reproduces claims of the toy's paper; gives the verdicts by claim."""

  def reproduce_these(*claims, **arguments):
    monkeypatch.setattr(reproduce, 'load', lambda papers: {'pbgd': claims})
    fine = reproduce.reproduce(preset='smoke', workdir=tmp_path, **arguments)
    report = (tmp_path / 'report.md').read_text()
    rows = [line for line in report.splitlines() if line.startswith('| ')]
    cells = [[c.strip() for c in row.split(' | ')] for row in rows[2:]]
    return fine, {row[0].removeprefix('| '): row[4] for row in cells}

  monkeypatch.setattr(reproduce, 'without_claims', lambda *_: [])
  return reproduce_these


def test_a_crash_costs_its_own_row_and_nothing_is_run_twice(run, tmp_path):
  claims = (
    claim('Shown.'),
    claim('Not shown.', metric='gap_exponent', at_least=0),
    claim('Without a metric.', metric='no_such'),
    claim('Crashes.', binary='no_such_binary'),
    claim('Refuses.', flags=('--starts=0',)),
    claim('Later.', presets=('paper',)),
  )
  fine, verdicts = run(*claims)
  assert not fine
  assert list(verdicts) == [c.words for c in claims[:-1]]
  assert verdicts['Shown.'] == 'shown, no interval'
  assert verdicts['Not shown.'] == 'not shown'
  assert 'no metric no_such' in verdicts['Without a metric.']
  assert 'No module named' in verdicts['Crashes.']
  assert 'starts is at least 1.' in verdicts['Refuses.']
  logs = list(tmp_path.rglob('log.txt'))
  assert len(logs) == 3  # The first three claims share one run.
  before = {path: path.read_bytes() for path in logs}

  fine, again = run(*claims[:3])
  assert not fine  # One names a metric that there is not.
  assert again == {k: verdicts[k] for k in list(verdicts)[:3]}
  assert run(*claims[:2])[0]
  run(*claims)
  grown = {p.parent.parent.name for p in logs if p.read_bytes() != before[p]}
  assert grown == {'no_such_binary', 'toy'}  # Of the toy, the refused one.
  assert sum(p.read_bytes() != before[p] for p in logs) == 2


@pytest.mark.slow
def test_results_that_are_gone_or_damaged_are_made_again(run, tmp_path):
  _, verdicts = run(claim())
  (results,) = tmp_path.rglob('results.json')
  text = results.read_text()
  report = (tmp_path / 'report.md').read_text()
  assert 'no data' in report and ' s in all' in report
  for damaged in (None, '{"metr'):
    results.unlink() if damaged is None else results.write_text(damaged)
    assert run(claim()) == (True, verdicts)
    assert (
      json.loads(results.read_text())['metrics']
      == (json.loads(text)['metrics'])
    )
  # What a program writes that knows no limits of JSON.
  results.write_text(text.replace('"fraction_at_minima": 1.0', '"x": 1.0'))
  assert 'no metric fraction_at' in run(claim())[1]['It works.']
  results.write_text('{"metrics": {"fraction_at_minima": Infinity}}')
  assert 'not a finite number' in run(claim())[1]['It works.']


def test_a_claim_whose_extra_is_missing_is_not_run(run, tmp_path, monkeypatch):
  setup = tmp_path / 'root' / 'setup.cfg'
  setup.parent.mkdir()
  setup.write_text(
    '[options.extras_require]\nllm =\n    no-such-package>=1\n'
    'here =\n    numpy>=2\n'
  )
  monkeypatch.setattr(reproduce, 'ROOT', setup.parent / 'experiments')
  assert reproduce.lacking(claim(extra='here')) == ''
  fine, verdicts = run(claim(extra='llm'))
  assert fine
  assert verdicts['It works.'] == 'not run: needs the extra `llm`'
  assert not list(tmp_path.rglob('log.txt'))


def test_smoke_runs_binaries_without_a_claim():
  claims = reproduce.load()
  judged = reproduce.commands(claims, preset='smoke', data_dir=None)
  found = reproduce.without_claims(claims, [c for _, _, c in judged], 'smoke')
  names = {(command.paper, command.binary) for command in found}
  assert {('aipod', 'federated'), ('pbgd', 'pollution')} <= names


def test_data_in_words():
  of = lambda data: reproduce.data_of({'data': data})
  assert of(None) == 'no data'
  assert of('packaged digits') == 'packaged digits'
  assert of(
    [['a9a', '32,561 rows', 'f00'], ['magic', '19,020 rows', 'ba2']]
  ) == ('a9a: 32,561 rows; magic: 19,020 rows')


def test_a_run_that_takes_too_long(run):
  fine, verdicts = run(claim(), timeout=0.05)
  assert not fine
  assert 'took more than 0.05 s' in verdicts['It works.']


def test_the_time_of_an_attempt_that_is_ended_counts(tmp_path):
  command = reproduce.Command('pbgd', 'toy', ('--preset=smoke',))
  before = signal.signal(signal.SIGALRM, lambda *_: sys.exit(75))
  try:
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(SystemExit):
      reproduce.execute(command, tmp_path)
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
  (path,) = tmp_path.rglob('command.json')
  record = json.loads(path.read_text())
  assert not record['finished']
  assert record['seconds'] > 0.1


def test_unknown_papers_name_the_known():
  with pytest.raises(harness.SettingsError, match=r"'nothing'.*known: .*pbgd"):
    reproduce.load(['nothing'])


def test_folders_differ_and_are_no_longer_than_a_name():
  of = lambda *flags: reproduce.Command('pbgd', 'toy', flags).folder
  data = [f'--data_dir=/{"long/" * 100}{end}' for end in 'ab']
  folders = [
    of('--preset=smoke'),
    of('--preset=smoke', '--steps=10'),
    of('--preset=smoke', data[0]),
    of('--preset=smoke', data[1]),
  ]
  assert len(set(folders)) == 4
  assert max(map(len, folders)) < 100
  assert folders[0] == 'pbgd/toy/preset=smoke'


DECLARED = [
  (paper, claim)
  for paper, claims in reproduce.load().items()
  for claim in claims
]


@pytest.mark.parametrize(
  ('paper', 'claim_'), DECLARED, ids=lambda x: getattr(x, 'words', x)
)
def test_declared_claims_have_a_binary_with_their_presets_and_flags(
  paper, claim_
):
  module = importlib.import_module(f'experiments.{paper}.{claim_.binary}')
  for preset in claim_.presets:
    values = flags.FlagValues()
    about = {'paper': paper, 'binary': claim_.binary, 'values': values}
    flags_lib.define(module.PRESETS, **about)
    values([sys.argv[0], f'--preset={preset}', *claim_.flags])
    flags_lib.resolve(module.PRESETS, **about)
  assert not reproduce.lacking(claim_).startswith('setup.cfg')


def test_every_paper_judges_something_in_every_preset():
  for preset in ('smoke', 'quick', 'paper'):
    found = reproduce.commands(reproduce.load(), preset=preset, data_dir=None)
    assert {paper for paper, _, _ in found} == set(reproduce.discover())
    rows = [(paper, claim.words) for paper, claim, _ in found]
    assert len(set(rows)) == len(rows)
