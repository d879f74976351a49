"""Tests of the reproduction of claims, by the toy as its binary."""

import importlib
import json
import math
import re
import signal
import sys

import pytest

from experiments import harness
from experiments.harness.app import flags as flags_lib
from experiments.harness.study import command as command_lib
from experiments.harness.study import declared, jobs, reproduction

TOY = ('--starts=4', '--penalties=10,20', '--solvers=known_value')


METRIC = 'fraction_at_minima/known_value/penalty=10'
RUNS = {
  'toy': harness.Run('toy', flags=TOY),
  'gone': harness.Run('no_such_binary'),
  'refused': harness.Run('toy', flags=('--starts=0',)),
}


def claim(words='It works.', **changes):
  given = {'run': 'toy', 'metric': METRIC, 'at_least': 0.5}
  return harness.Claim(words, **given | changes)


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Reproduces claims of the toy's paper; gives the verdicts by claim."""

  def reproduce_these(*claims, runs=RUNS, **arguments):
    used = {name: runs[name] for name in {c.run for c in claims}}
    paper = declared.Declared(dict(sorted(used.items())), claims)
    monkeypatch.setattr(declared, 'load', lambda papers: {'pbgd': paper})
    fine = reproduction.reproduce(preset='smoke', workdir=tmp_path, **arguments)
    report = (tmp_path / 'report.md').read_text()
    rows = [line for line in report.splitlines() if line.startswith('| ')]
    cells = [[c.strip() for c in row.split(' | ')] for row in rows[2:]]
    return fine, {row[0].removeprefix('| '): row[4] for row in cells}

  return reproduce_these


@pytest.mark.slow
def test_a_crash_costs_its_own_row_and_nothing_is_run_twice(run, tmp_path):
  claims = (
    claim('Shown.'),
    claim('Not shown.', metric='gap_exponent/known_value', at_least=0),
    claim('Without a metric.', metric='no_such'),
    claim('Crashes.', run='gone'),
    claim('Refuses.', run='refused'),
    claim('Later.', presets=('paper',)),
  )
  fine, verdicts = run(*claims)
  assert not fine
  assert list(verdicts) == [c.words for c in claims[:-1]]
  assert verdicts['Shown.'] == 'shown, no interval'
  assert verdicts['Not shown.'] == 'not shown'
  assert 'no metric no_such' in verdicts['Without a metric.']
  assert 'No module named' in verdicts['Crashes.']
  assert 'starts must be at least 1.' in verdicts['Refuses.']
  logs = list(tmp_path.rglob('log.txt'))
  assert len(logs) == 3  # The first three claims share one run.
  before = {path: path.read_bytes() for path in logs}

  fine, again = run(*claims[:3])
  assert not fine  # One names a metric that there is not.
  assert again == {k: verdicts[k] for k in list(verdicts)[:3]}
  assert run(*claims[:2])[0]
  run(*claims)
  grown = {p.parent.parent.name for p in logs if p.read_bytes() != before[p]}
  assert grown == {'pbgd'}
  assert sum(p.read_bytes() != before[p] for p in logs) == 2


def without_times(report):
  return re.sub(r'(\d+ (h|min|s)\b *)+', '', report)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('engine', 'options', 'package'),
  [
    ('local', {}, 'absl'),
    ('slurm', {'cluster': 'local'}, 'submitit'),
    ('ray', {'num_cpus': 0.5}, 'ray'),
  ],
)
@pytest.mark.filterwarnings('ignore')  # Of the engines, not of this project.
def test_jobs_of_an_engine_give_the_report_of_one_process(
  run, tmp_path, engine, options, package
):
  pytest.importorskip(package)
  runs = {'one': RUNS['toy'], 'two': RUNS['toy'], 'refused': RUNS['refused']}
  claims = [claim(name, run=name) for name in runs]
  plan = jobs.Plan(engine, 2, options)
  many = run(*claims, runs=runs, plan=plan)
  report = (tmp_path / 'report.md').read_text()
  logs = list(tmp_path.rglob('pbgd/*/log.txt'))
  assert len(logs) == 3
  before = {path: path.read_bytes() for path in logs}
  # The merge, by one process: only the failed run is made again.
  assert run(*claims, runs=runs) == many
  assert without_times((tmp_path / 'report.md').read_text()) == (
    without_times(report)
  )
  grown = [path for path in logs if path.read_bytes() != before[path]]
  assert [path.parent.name for path in grown] == ['refused']
  assert many[1]['one'] == many[1]['two'] == 'shown, no interval'
  assert 'starts must be at least 1.' in many[1]['refused']


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
  results.write_text(text.replace(f'"{METRIC}": 1.0', '"x": 1.0'))
  assert 'no metric fraction_at' in run(claim())[1]['It works.']
  results.write_text(json.dumps({'metrics': {METRIC: math.inf}}))
  assert 'not a finite number' in run(claim())[1]['It works.']


def test_a_claim_whose_extra_is_missing_is_not_run(run, tmp_path, monkeypatch):
  setup = tmp_path / 'root' / 'setup.cfg'
  setup.parent.mkdir()
  setup.write_text(
    '[options.extras_require]\nllm =\n    no-such-package>=1\n'
    'here =\n    numpy>=2\n'
  )
  monkeypatch.setattr(declared, 'ROOT', setup.parent)
  assert declared.why_missing('here') == ''
  needing = {'toy': harness.Run('toy', extra='llm')}
  fine, verdicts = run(claim(), runs=needing)
  assert fine
  assert verdicts['It works.'] == 'not run: needs the extra `llm`'
  assert not list(tmp_path.rglob('log.txt'))


def test_smoke_runs_every_binary_of_every_paper():
  papers = declared.load()
  found = declared.commands(papers, preset='smoke', data_dir=None)
  made = {command.module for command in found.values()}
  for paper in papers:
    for path in sorted((declared.ROOT / 'experiments' / paper).glob('*.py')):
      if '\nSTUDY = ' in path.read_text(encoding='utf-8'):
        module = f'experiments.{paper}.{path.stem}'
        presets = importlib.import_module(module).STUDY.presets
        assert module in made or 'smoke' not in presets


def test_runs_by_name_have_their_own_preset(tmp_path):
  papers = declared.load(['pbgd'])
  of = lambda *only: declared.commands(
    papers, preset='quick', data_dir=str(tmp_path), only=only
  )
  (command,) = of('pbgd/mlp').values()
  preset, data = command.flags[:2]
  assert (preset, data) == ('--preset=table', f'--data_dir={tmp_path}/mnist')
  assert '--model=mlp' in command.flags
  with pytest.raises(harness.SettingsError, match=r'no run pbgd/x; .*/toy'):
    of('pbgd/x')


def test_a_run_that_takes_too_long(run):
  fine, verdicts = run(claim(), timeout=0.05)
  assert not fine
  assert 'took more than 0.05 s' in verdicts['It works.']


def test_the_time_of_an_attempt_that_is_ended_counts(tmp_path):
  command = declared.Command(
    'pbgd', 'toy', 'experiments.pbgd.toy', ('--preset=smoke',)
  )
  before = signal.signal(signal.SIGALRM, lambda *_: sys.exit(75))
  try:
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(SystemExit):
      command_lib.execute(command, tmp_path)
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
  (path,) = tmp_path.rglob('command.json')
  record = json.loads(path.read_text())
  assert not record['finished']
  assert record['seconds'] > 0.1


def test_unknown_papers_name_the_known():
  with pytest.raises(harness.SettingsError, match=r"'nothing'.*known: .*pbgd"):
    declared.load(['nothing'])


def test_an_incomplete_declaration_is_named(monkeypatch):
  monkeypatch.delattr('experiments.pbgd.claims.PAPER')
  with pytest.raises(harness.SettingsError, match=r'pbgd/claims\.py .* PAPER'):
    declared.load(['pbgd'])


def test_folders_differ_by_data_and_are_no_longer_than_a_name():
  of = lambda *flags: declared.Command('pbgd', 'toy', 'x', flags).folder
  data = [f'--data_dir=/{"long/" * 100}{end}' for end in 'ab']
  folders = [of('--preset=smoke'), *(of('--preset=smoke', x) for x in data)]
  assert len(set(folders)) == 3
  assert max(map(len, folders)) < 100
  assert folders[0] == 'pbgd/toy'


PAPERS = declared.load()
DECLARED = [(p, n) for p, paper in PAPERS.items() for n in paper.runs]


@pytest.mark.parametrize(('paper', 'name'), DECLARED)
def test_declared_runs_have_a_binary_with_their_presets_and_flags(paper, name):
  run = PAPERS[paper].runs[name]
  study = importlib.import_module(f'experiments.{paper}.{run.binary}').STUDY
  for preset in {run.preset, *run.presets}:
    settings = flags_lib.settings_by(
      study.presets, preset, run.flags, study.renamed
    )
    if study.check:
      study.check(settings)
  assert not run.mode or run.mode in study.modes
  assert not declared.why_missing(run.extra).startswith('setup.cfg')


@pytest.mark.parametrize('paper', PAPERS)
def test_declared_claims_have_a_run_in_their_presets(paper):
  runs, claims = PAPERS[paper]
  for claim_ in claims:
    # Claims on runs that are made by name only are judged then.
    presets = runs[claim_.run].presets or claim_.presets
    assert set(claim_.presets) & set(presets), claim_.words


# Fields have claims, but no paper.
WITH_PAPER = [p for p in PAPERS if declared.claims_module(p).PAPER]


@pytest.mark.parametrize('paper', WITH_PAPER)
def test_headlines_are_of_claims(paper):
  headlines = declared.claims_module(paper).PAPER.headlines
  assert headlines and set(headlines) <= {
    c.metric for c in PAPERS[paper].claims
  }
  assert all('{}' in words for words in headlines.values())


def test_every_paper_judges_something_in_every_preset():
  for preset in ('smoke', 'quick', 'paper'):
    commands = declared.commands(PAPERS, preset=preset, data_dir=None)
    found = declared.judged_in(PAPERS, commands, preset)
    judged = {command.paper for _, command in found}
    assert set(WITH_PAPER) <= judged <= set(declared.discover())
    rows = [(command.paper, claim.words) for claim, command in found]
    assert len(set(rows)) == len(rows)
