"""Compares the costs of the library with other code, with bounds.

    python -m experiments.benchmarks.suite --preset=quick

Expected: every ratio within its bound, or in the list of exceeded ones.
Time: smoke a minute, quick 40 minutes, paper an hour, on 2 cores.

`python -m experiments.benchmarks` is the same. A row is the cost of what is
measured divided by the cost of what it is compared with: less is better. Rows:

    --only=vpbgd,lm/peft     rows whose names start like this
    --peers=none             rows without other packages
    --peers=ENV/bin/python   with the packages of this environment

By default, other packages are in the environment whose Python is
BILEVEL_JAX_PEERS, otherwise in one that is created in the cache folder. If a
package is missing or a row fails, its row says so and the others continue. The
workdir keeps measured rows, and the same command measures the missing ones. The
exit status is 1 if a bound is exceeded.

Pairs are timed in turn, see `measure`. A wall time is undecided if the fastest
pair is within the bound and the median is not.
`python -m experiments.tables --store WORKDIR` stores the results by commit for
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
from experiments.benchmarks import environment, lifeline, measure
from experiments.harness.app import compile_cache, flags, settings
from experiments.harness.store import files

MODULES = (
  'cleaning',
  'hypergradients',
  'coupled',
  'aggregators',
  'projections',
  'lm',
  'seal',
  'reinforcement',
  'stackelberg',
  'speech',
  'tracklet',
  'startup',
)
# Numbers of a row that are in the table only.
IN_TABLE = ('low', 'high', 'seconds', 'base_seconds')
# Columns without numbers.
DESCRIPTIVE = ('row', 'group', 'compared')
# Other numbers of a row, with their names in the table.
EXTRA = {
  'flops': 'operations',
  'memory': 'memory',
  'temporary': 'temporary memory',
  'time_exponent': 'time grows by the power',
  'memory_exponent': 'memory by',
  'peak_share': 'fraction of the product',
  'difference': 'difference',
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    only: first parts of the names of rows, or all.
    peers: 'auto', 'none', or the Python of an environment.
    rounds: pairs of timings of a comparison.
    seconds: approximate duration of a timing, s.
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
  """Returns all rows of a preset by name.

  The preset smoke has one row of each kind, and no bounds, since small problems
  spend most of their time on overhead. The kind of a name with three or more
  parts are its first two parts, otherwise its first part.
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
    names = sorted(first.values(), key=list(results).index)
    results = {name: results[name]._replace(bounds={}) for name in names}
  return results


def select_rows(options: harness.Options) -> list[measure.Row]:
  """Returns the rows of the setting `only`.

  Raises:
    SettingsError: if no row has such a name.
  """
  known = registry(options.preset)
  only = options.settings.only
  if only == ('all',):
    return list(known.values())
  starts = lambda name, part: f'{name}/'.startswith(f'{part.rstrip("/")}/')
  for part in only:
    if not any(starts(name, part) for name in known):
      groups = ', '.join(dict.fromkeys(n.partition('/')[0] for n in known))
      raise harness.SettingsError(
        f'--only={part}: no row has this name; groups are {groups}.'
      )
  return [
    row
    for name, row in known.items()
    if any(starts(name, part) for part in only)
  ]


def measure_rows(options: harness.Options) -> None:
  """Measures the missing rows in this process, and writes a file for each."""
  lifeline.hold()
  settings = options.settings
  peers = environment.Peers(settings.peers)
  # Rows that need data report a missing folder.
  data_dir = options.data_dir or os.environ.get(flags.DATA_VARIABLE)
  context = measure.Context(
    settings.rounds, settings.seconds, peers, options.workdir, data_dir
  )
  for row in select_rows(options):
    path = _path(options, row.name)
    if path.exists():
      continue
    _write(path, {'missing': 'the process ended'})  # In case it dies.
    start = time.perf_counter()
    try:
      record = {'metrics': dict(row.measure(context))}
    except (harness.UserError, environment.MissingPeerError) as error:
      record = {'missing': str(error)}
    except Exception as error:  # The other rows are still measured.
      record = {'missing': f'failed: {type(error).__name__}: {error}'[:200]}
    _write(path, record | {'took': time.perf_counter() - start})
    print(f'{row.name}: {_line(row, record)}', flush=True)
    jax.clear_caches()
    gc.collect()


def main(options: harness.Options) -> None:
  """Measures in a separate process, and writes table and results.

  Raises:
    SystemExit: with status 1, if a bound is exceeded.
  """
  rows = select_rows(options)
  for row in rows:
    # Repeats failed rows.
    if 'missing' in _read(options, row.name):
      _path(options, row.name).unlink()
  missing = lambda: sum(not _path(options, r.name).exists() for r in rows)
  while missing():
    before = missing()
    module = 'experiments.benchmarks.suite'
    command = [sys.executable, '-m', module, 'measure', *_flags(options)]
    status = lifeline.run(command)
    if status < 0 and missing() < before:
      print(f'The process ended by signal {-status}; the next row follows.')
    elif status:
      raise harness.UserError(f'the measuring process has status {status}.')
  results = {row.name: _read(options, row.name) for row in rows}
  table = [_row(row, results[row.name]) for row in rows]
  harness.write_table(options.workdir, table)
  metrics = {
    f'{row.name}/{key}': value
    for row in rows
    for key, value in results[row.name].get('metrics', {}).items()
    if key not in IN_TABLE
  }
  verdicts = {row.name: _verdict(row, results[row.name]) for row in rows}
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
    # The numbers that documents draw over commits.
    history={row.name: _main_number(row, metrics) for row in rows},
  )
  print(', '.join(f'{n} {answer}' for answer, n in counts.items()) + '.')
  if exceeded:
    print('Exceeded: ' + ', '.join(exceeded) + '.', file=sys.stderr)
    raise SystemExit(1)


def _main_number(
  row: measure.Row, metrics: Mapping[str, float]
) -> float | None:
  """Returns the first finite number of a row that has a bound, or is usual."""
  names = [*row.bounds, 'wall', 'temporary', 'time_exponent']
  numbers = [metrics.get(f'{row.name}/{name}', math.nan) for name in names]
  return next(filter(math.isfinite, numbers), None)


def _path(options: harness.Options, name: str) -> pathlib.Path:
  folder = pathlib.Path(options.workdir) / 'rows'
  return folder / f'{name.replace("/", "+")}.json'


def _write(path: pathlib.Path, record: Mapping[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_text(path, json.dumps(record, default=float) + '\n')


def _read(options: harness.Options, name: str) -> dict[str, Any]:
  """Reads a row; {} if it is missing or damaged, and so measured again."""
  path = _path(options, name)
  try:
    return dict(json.loads(path.read_text(encoding='utf-8')))
  except FileNotFoundError:
    pass
  except (ValueError, TypeError) as error:
    what = f'{path} is damaged ({error}): its row is measured again'
    files.put_aside(path, what, path.parent)
  return {}


def _verdict(row: measure.Row, record: Mapping[str, Any]) -> str:
  if 'metrics' not in record:
    return 'not measured'
  return measure.judge(record['metrics'], row.bounds)


def _line(row: measure.Row, record: Mapping[str, Any]) -> str:
  """Formats a row in a line."""
  if 'missing' in record:
    return f'not measured: {record["missing"]}'
  cells = _row(row, record)
  parts = [f'{k} {v}' for k, v in cells.items() if v and k not in DESCRIPTIVE]
  return ', '.join(parts)


def _row(row: measure.Row, record: Mapping[str, Any]) -> dict[str, str]:
  """Returns the cells of a row."""
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
  """Returns the flags of the same options for another process."""
  values = {'preset': options.preset, 'workdir': options.workdir}
  # Compile times would include those of a cached program.
  values['compile_cache'] = compile_cache.OFF
  if options.data_dir:
    values['data_dir'] = options.data_dir
  values |= dataclasses.asdict(options.settings)
  return [f'--{k}={settings.as_text(v)}' for k, v in values.items()]


def _commit() -> str:
  """Returns the commit, with + if files differ from it."""
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
  """Returns the name of the processor and the number of available cores."""
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
