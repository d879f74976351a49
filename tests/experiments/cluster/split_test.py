"""Tests of comparisons in jobs."""

import pytest

from experiments import harness
from experiments.cluster import split
from experiments.harness.study import jobs

ZOO = 'experiments.stsa.bilevel_zoo'
FLAGS = (
  *('--preset=smoke', '--methods=soba,saba', '--seeds=2', '--calls=300'),
  *('--records=2', '--max_grid_extensions=0'),
)


def test_lists_of_settings_are_parts(tmp_path):
  options = split.resolve(ZOO, [*FLAGS, f'--workdir={tmp_path}'])
  assert options.workdir == str(tmp_path)
  assert split.list_values(options.settings, 'methods') == ('soba', 'saba')
  assert split.list_values(options.settings, 'grid.ratios')
  for name in ('seeds', 'nothing', 'grid.nothing'):
    with pytest.raises(harness.SettingsError, match=f'--over={name}: .*--help'):
      split.list_values(options.settings, name)
  with pytest.raises(harness.SettingsError, match='is no program'):
    split.resolve('experiments.nothing', [])
  with pytest.raises(harness.SettingsError, match='nothing'):
    split.resolve(ZOO, ['--nothing=1'])


@pytest.mark.slow
def test_jobs_and_the_merge_give_the_results_of_one_process(tmp_path):
  one, many = tmp_path / 'one', tmp_path / 'many'
  plan = jobs.Plan(jobs=2)
  assert split.split(ZOO, [*FLAGS, f'--workdir={many}'], 'methods', plan) == 0
  logs = sorted(path.name for path in (many / 'jobs').iterdir())
  assert logs == ['methods=saba.txt', 'methods=soba.txt']
  records = sorted(many.rglob('metrics.jsonl'))
  saved = sorted(many.rglob('checkpoints/*/about/metadata'))
  before = [path.stat().st_mtime_ns for path in saved]
  written = [path.read_bytes() for path in records]
  # The merge alone: it trains nothing.
  words = ['-m', ZOO, *FLAGS, f'--workdir={many}']
  assert not split.command_lib.run_logged(
    [split.sys.executable, *words], many / 'merge.txt'
  )
  assert saved and [path.stat().st_mtime_ns for path in saved] == before
  assert [path.read_bytes() for path in records] == written
  words[-1] = f'--workdir={one}'
  one.mkdir()
  assert not split.command_lib.run_logged(
    [split.sys.executable, *words], one / 'log.txt'
  )
  results = [
    harness.read_results(folder / 'results.json')['metrics']
    for folder in (one, many)
  ]
  drop = lambda metrics: {
    k: v for k, v in metrics.items() if not k.startswith('seconds')
  }
  assert drop(results[1]) == drop(results[0])
