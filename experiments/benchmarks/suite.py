"""Measures the library against its peers, with bounds on the ratios.

    python -m experiments.benchmarks.suite --preset=quick

Expected: every ratio within its bound, or in the list of exceeded ones.
Time: smoke a minute, quick 40 minutes, paper an hour, on 2 cores.

`python -m experiments.benchmarks` is the same. A row is what is measured / what
it is compared with: a cost over a cost, so that less is better. Rows:

    --only=vpbgd,lm/peft     those whose name starts so
    --peers=none             without other packages
    --peers=ENV/bin/python   with those of this environment

By default the packages are in the environment whose Python BILEVEL_JAX_PEERS
names, else in one that is made in the cache folder. A row whose package is
missing, or that fails, says so; the others go on. Rows that are measured are
kept in the workdir: the same command measures those that lack. The exit status
is 1 where a bound is exceeded.

Pairs are timed in turn, see `measure`. A wall time is undecided where the
fastest pair is within the bound and the median is not.
`python -m experiments.tables --store WORKDIR` keeps the results by commit, for
docs/benchmarks.md.
"""

import dataclasses
import gc
import importlib
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from experiments import harness
from experiments.benchmarks import environment, measure
from experiments.harness.app import compile_cache, flags
from experiments.harness.store import files

MODULES = (
  'cleaning',
  'hypergradients',
  'coupled',
  'aggregators',
  'projections',
  'lm',
  'reinforcement',
  'stackelberg',
  'speech',
  'tracklet',
  'startup',
)
# Numbers of a row that the table alone has.
IN_TABLE = ('low', 'high', 'seconds', 'base_seconds')
# Columns that say what a row is.
GIVEN = ('row', 'group', 'compared')
# Numbers of a row that have a column of their own, with their heads.
EXTRA = {
  'flops': 'operations',
  'memory': 'memory',
  'temporary': 'temporary memory',
  'time_exponent': 'time grows by the power',
  'memory_exponent': 'memory by',
  'peak_share': 'of the product',
  'difference': 'difference',
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    only: beginnings of the names of rows, or all.
    peers: 'auto', 'none', or the Python of an environment.
    rounds: pairs of timings of each comparison.
    seconds: about how long one timing lasts.
  """

  only: tuple[str, ...] = ('all',)
  peers: str = 'auto'
  rounds: int = 7
  seconds: float = 0.2


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(peers='none', rounds=2, seconds=0.001),
  'paper': Settings(rounds=15, seconds=0.5),
}


def registry(preset: str) -> dict[str, measure.Row]:
  """All rows of a preset, by name.

  Smoke has the first row of each kind, by the first two words of names of three
  or by the first, and no bounds: what is around small problems is most of
  their time.
  """
  results: dict[str, measure.Row] = {}
  for module in MODULES:
    package = f'experiments.benchmarks.{module}'
    for row in importlib.import_module(package).rows(preset):
      if row.name in results:
        raise ValueError(f'two rows have the name {row.name}.')
      results[row.name] = row
  if preset == 'smoke':
    kind = lambda name: name.split('/')[: 1 + (name.count('/') > 1)]
    first = {tuple(kind(name)): name for name in reversed(results)}
    record = sorted(first.values(), key=list(results).index)
    results = {name: results[name]._replace(bounds={}) for name in record}
  return results


def chosen(options: harness.Options) -> list[measure.Row]:
  """The rows that the settings ask for.

  Raises:
    SettingsError: if no row has a name that is asked for.
  """
  known = registry(options.preset)
  only = options.settings.only
  if only == ('all',):
    return list(known.values())
  begins = lambda name, word: f'{name}/'.startswith(f'{word.rstrip("/")}/')
  for word in only:
    if not any(begins(name, word) for name in known):
      groups = ', '.join(dict.fromkeys(n.partition('/')[0] for n in known))
      raise harness.SettingsError(
        f'--only={word}: no row has this name; groups are {groups}.'
      )
  return [
    row
    for name, row in known.items()
    if any(begins(name, word) for word in only)
  ]


def measure_rows(options: harness.Options) -> None:
  """Measures the rows that lack, in this process, and keeps each in a file."""
  settings = options.settings
  peers = environment.Peers(settings.peers)
  # Rows that need data say so: it is no part of the settings.
  data_dir = options.data_dir or os.environ.get(flags.DATA_VARIABLE)
  context = measure.Context(
    settings.rounds, settings.seconds, peers, options.workdir, data_dir
  )
  for row in chosen(options):
    path = _path(options, row.name)
    if path.exists():
      continue
    # What is left there if the process dies.
    _write(path, {'missing': 'the process ended'})
    start = time.perf_counter()
    try:
      record = {'metrics': dict(row.measure(context))}
    except (harness.UserError, environment.MissingPeerError) as error:
      record = {'missing': str(error)}
    except Exception as error:  # One row keeps no other from being measured.
      record = {'missing': f'failed: {type(error).__name__}: {error}'[:200]}
    _write(path, record | {'took': time.perf_counter() - start})
    print(f'{row.name}: {_line(row, record)}', flush=True)
    jax.clear_caches()
    gc.collect()


def main(options: harness.Options) -> None:
  """Measures in a process of its own, and writes table and results.

  Raises:
    SystemExit: with status 1, if a bound is exceeded.
  """
  wanted = chosen(options)
  for row in wanted:
    # What failed is tried again.
    if 'missing' in _read(options, row.name):
      _path(options, row.name).unlink()
  lacking = lambda: sum(not _path(options, r.name).exists() for r in wanted)
  while lacking():
    before = lacking()
    module = 'experiments.benchmarks.suite'
    command = [sys.executable, '-m', module, 'measure', *_flags(options)]
    status = subprocess.run(command, check=False).returncode
    if status < 0 and lacking() < before:
      print(f'The process ended by signal {-status}; the next row goes on.')
    elif status:
      raise harness.UserError(f'the measuring process has status {status}.')
  results = {row.name: _read(options, row.name) for row in wanted}
  table = [_row(row, results[row.name]) for row in wanted]
  harness.write_table(options.workdir, table)
  metrics = {
    f'{row.name}/{key}': value
    for row in wanted
    for key, value in results[row.name].get('metrics', {}).items()
    if key not in IN_TABLE
  }
  verdicts = {row.name: _verdict(row, results[row.name]) for row in wanted}
  exceeded = [name for name, answer in verdicts.items() if answer == 'EXCEEDED']
  counts = {
    answer: sum(x == answer for x in verdicts.values())
    for answer in ('holds', 'undecided', 'EXCEEDED', 'not measured')
  }
  metrics |= {f'rows/{k.replace(" ", "_")}': v for k, v in counts.items()}
  harness.write_results(
    options,
    metrics=metrics,
    seconds=sum(one.get('took', 0.0) for one in results.values()),
    commit=_commit(),
    processor=_processor(),
    # What the documents draw over the commits.
    history={
      row.name: next(
        (
          metrics[f'{row.name}/{key}']
          for key in _main(row)
          if math.isfinite(metrics.get(f'{row.name}/{key}', math.nan))
        ),
        None,
      )
      for row in wanted
    },
  )
  print(', '.join(f'{n} {answer}' for answer, n in counts.items()) + '.')
  if exceeded:
    print('Exceeded: ' + ', '.join(exceeded) + '.', file=sys.stderr)
    raise SystemExit(1)


def _main(row: measure.Row) -> list[str]:
  """Numbers that may stand for a row, the first that it has."""
  return [*row.bounds, 'wall', 'temporary', 'time_exponent']


def _path(options: harness.Options, name: str) -> pathlib.Path:
  folder = pathlib.Path(options.workdir) / 'rows'
  return folder / f'{name.replace("/", "+")}.json'


def _write(path: pathlib.Path, record: Mapping[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_text(path, json.dumps(record, default=float) + '\n')


def _read(options: harness.Options, name: str) -> dict[str, Any]:
  path = _path(options, name)
  if not path.exists():
    return {}
  return json.loads(path.read_text(encoding='utf-8'))


def _verdict(row: measure.Row, record: Mapping[str, Any]) -> str:
  if 'metrics' not in record:
    return 'not measured'
  return measure.judge(record['metrics'], row.bounds)


def _line(row: measure.Row, record: Mapping[str, Any]) -> str:
  """One row in words."""
  if 'missing' in record:
    return f'not measured: {record["missing"]}'
  cells = _row(row, record)
  answer = [f'{k} {v}' for k, v in cells.items() if v and k not in GIVEN]
  return ', '.join(answer)


def _row(row: measure.Row, record: Mapping[str, Any]) -> dict[str, str]:
  """Cells of the table."""
  group = row.name.partition('/')[0]
  cells = {'row': row.name, 'group': group, 'compared': row.compared}
  if 'metrics' not in record:
    return cells | {'verdict': f'not measured: {record.get("missing")}'}
  numbers = record['metrics']
  if 'low' in numbers:
    wall, low, high = (numbers[k] for k in ('wall', 'low', 'high'))
    cells['time (range)'] = f'{wall:.3f} ({low:.2f} to {high:.2f})'
  elif 'wall' in numbers:
    cells['time (range)'] = f'{numbers["wall"]:.3f}'
  if 'cpu' in numbers:
    cells['CPU time'] = f'{numbers["cpu"]:.3f}'
  if 'base_seconds' in numbers:
    pair = (1e3 * numbers[k] for k in ('seconds', 'base_seconds'))
    cells['ms'] = ' / '.join(f'{x:.3g}' for x in pair)
  other = [
    f'{head} {numbers[key]:.3g}'
    for key, head in EXTRA.items()
    if key in numbers
  ]
  cells['other'] = ', '.join(other)
  names = {'wall': 'time', 'cpu': 'CPU time'} | EXTRA
  cells['bound'] = ', '.join(
    f'{names[key]} ≤ {bound:g}' for key, bound in row.bounds.items()
  )
  cells['verdict'] = _verdict(row, record)
  return cells


def _flags(options: harness.Options) -> list[str]:
  """The words that give the same options in another process."""
  settings = options.settings
  words = [f'--preset={options.preset}', f'--workdir={options.workdir}']
  # What is compiled is measured, not what an earlier run has kept.
  words.append(f'--compile_cache={compile_cache.OFF}')
  if options.data_dir:
    words.append(f'--data_dir={options.data_dir}')
  for name, value in dataclasses.asdict(settings).items():
    value = ','.join(value) if isinstance(value, tuple) else value
    words.append(f'--{name}={value}')
  return words


def _commit() -> str:
  """The commit that is measured, with + if the files differ from it."""
  git = ['git', '-C', str(environment.HERE)]
  try:
    commit = subprocess.run(
      [*git, 'rev-parse', '--short=10', 'HEAD'],
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
    changed = subprocess.run(
      [*git, 'diff', '--quiet', 'HEAD'], check=False
    ).returncode
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
  return commit + '+' * bool(changed)


def _processor() -> str:
  """The name of the processor, and how many cores are ours."""
  name = 'unknown'
  info = pathlib.Path('/proc/cpuinfo')
  if info.exists():
    for line in info.read_text(encoding='utf-8').splitlines():
      if line.startswith('model name'):
        name = line.partition(':')[2].strip()
        break
  return f'{name}, {len(os.sched_getaffinity(0))} cores'


STUDY = harness.Study(
  main,
  PRESETS,
  paper='benchmarks',
  binary='suite',
  modes={'measure': measure_rows},
)

if __name__ == '__main__':
  harness.run(STUDY)
