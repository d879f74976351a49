"""Stores results in the folder of their paper, for the documents."""

import dataclasses
import datetime
import importlib
import json
import pathlib
import re
import shlex
from collections.abc import Mapping
from typing import Any

from experiments.harness.app import flags
from experiments.harness.store import files
from experiments.harness.study import claim, report
from experiments.harness.study.declared import ROOT

LARGEST = 100_000  # Maximum bytes of a stored file.
# A list of plain values, which is written in one line.
_LIST = re.compile(r'\[\s[^\[\]{}]*\]')
_DROPPED = ('metrics', 'method_seconds', 'history')
_FOLDERS = re.compile(r'(?<![\w/])/(?:[^\s/]+/)+(?=[^\s/])')


def store(folder: files.Path, root: pathlib.Path = ROOT) -> pathlib.Path:
  """Stores the results and the table of a run.

  Args:
    folder: workdir of the run, or its `results.json`.
    root: root of the repository.

  Returns:
    The file, `<paper>/results/<name of the run>.json`.

  Raises:
    ValueError: if the run has no results, is not declared by its paper, or has
      too large results.
  """
  folder = pathlib.Path(folder)
  folder = folder.parent if folder.name == 'results.json' else folder
  results = claim.read_results(folder / 'results.json')
  paper, binary = results['paper'], results['binary']
  name, run = declared(results)
  command = [f'experiments.{paper}.{binary}', *run.words(run.preset)]
  if results.get('data_dir'):
    command.append(f'--data_dir={results["data_dir"]}')
  content = {k: v for k, v in results.items() if k not in _DROPPED}
  content |= {
    'command': shlex.join(['python', '-m', *command]),
    'metrics': {k: _short(x) for k, x in results['metrics'].items()},
    'per_seed': {
      name: [_short(x) for x in values]
      for name, values in results.get('per_seed', {}).items()
    },
    # Paths depend on the machine.
    'data': _FOLDERS.sub('', results.get('data') or ''),
  }
  written = (folder / 'results.json').stat().st_mtime
  day = datetime.datetime.fromtimestamp(written, datetime.UTC)
  content.setdefault('date', day.date().isoformat())
  if (folder / 'table.md').exists():
    content['table'] = _parse((folder / 'table.md').read_text(encoding='utf-8'))
  text = (
    json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + '\n'
  )
  text = _LIST.sub(lambda x: ' '.join(x[0].split()), text)
  if len(text.encode()) > LARGEST:
    raise ValueError(
      f'{folder}: {len(text.encode()):,} bytes are too many to store (at most '
      f'{LARGEST:,}): leave metrics out of results.json.'
    )
  path = result_path(f'{paper}/{name}', root)
  files.write_text(path, text)
  if results.get('history'):
    _remember(path, content, results['history'])
  return path


def declared(results: Mapping[str, Any]) -> tuple[str, claim.Run]:
  """Finds the declared run of results, and its name.

  Without a `claims.py`, a run has the name of its binary.

  Args:
    results: the content of a `results.json`.

  Raises:
    ValueError: if there is no such run; says what to declare.
  """
  paper, binary, preset = (results[k] for k in ('paper', 'binary', 'preset'))
  if not (ROOT / 'experiments' / paper / 'claims.py').exists():
    return binary, claim.Run(binary, preset=preset)
  runs = importlib.import_module(f'experiments.{paper}.claims').RUNS
  study = importlib.import_module(f'experiments.{paper}.{binary}').STUDY
  mode, folder = results.get('mode') or '', results.get('data_dir') or ''
  wanted = _with_current_names(results['settings'], study.renamed)
  wanted.pop('seeds', None)
  for name, run in runs.items():
    if (run.binary, run.preset, run.mode) != (binary, preset, mode):
      continue
    settings = report.plain(
      flags.settings_by(study.presets, preset, run.flags, study.renamed)
    )
    seeds = settings.pop('seeds', None)
    if settings == wanted and run.data in ('', folder):
      number = results['settings'].get('seeds')
      more = () if number == seeds else (f'--seeds={number}',)
      return name, dataclasses.replace(run, flags=(*run.flags, *more))
  raise ValueError(
    f'no run in experiments/{paper}/claims.py has these settings: add a '
    f'harness.Run({binary!r}, preset={preset!r}, flags=...) to its RUNS.'
  )


def _with_current_names(
  settings: Mapping[str, Any], renamed: Mapping[str, str], group: str = ''
) -> dict[str, Any]:
  """Settings of stored results under the current names of their fields."""
  current = {}
  for key, value in settings.items():
    name = group + key
    if isinstance(value, Mapping):
      # A group may have the former name of a field.
      current[key] = _with_current_names(value, renamed, f'{name}.')
    else:
      current[renamed.get(name, name).removeprefix(group)] = value
  return current


def _remember(
  path: pathlib.Path, results: Mapping[str, Any], numbers: Mapping[str, Any]
) -> None:
  """Adds a line to the history of a run, one per commit and processor."""
  line = {k: results[k] for k in ('commit', 'date', 'processor', 'versions')}
  line['numbers'] = {
    k: _short(x, 4) for k, x in numbers.items() if x is not None
  }
  same = lambda other: all(other[k] == line[k] for k in ('commit', 'processor'))
  lines = [old for old in _history(path) if not same(old)] + [line]
  texts = [json.dumps(one, allow_nan=False) for one in lines]
  files.write_text(path.with_suffix('.history'), '\n'.join(texts) + '\n')


def _history(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines of the history of a stored run, the oldest first."""
  path = path.with_suffix('.history')
  if not path.exists():
    return []
  return list(map(json.loads, path.read_text(encoding='utf-8').splitlines()))


def curves(name: str, results: Mapping[str, Any], root: pathlib.Path) -> dict:
  """Returns the curves of a run, or its history on the same processor."""
  lines = [
    line['numbers']
    for line in _history(result_path(name, root))
    if line['processor'] == results.get('processor')
  ]
  rows = dict.fromkeys(row for line in lines for row in line)
  return {row: [line.get(row) for line in lines] for row in rows} or (
    results.get('curves') or {}
  )


def _short(value: float | None, digits: int = 6) -> float | None:
  """Rounds to significant digits."""
  return None if value is None else float(f'{value:.{digits}g}')


def result_path(name: str, root: pathlib.Path) -> pathlib.Path:
  """Returns the file of a stored run, `paper/name`."""
  paper, _, run = name.partition('/')
  return root / 'experiments' / paper / 'results' / f'{run}.json'


def read(name: str, root: pathlib.Path) -> dict[str, Any]:
  """Returns the stored results of a run; raises ValueError if missing."""
  path = result_path(name, root)
  if not path.exists():
    known = ', '.join(sorted(p.stem for p in path.parent.glob('*.json')))
    raise ValueError(f'no stored result {name}; stored: {known or "none"}.')
  return json.loads(path.read_text(encoding='utf-8'))


def _parse(table: str) -> dict[str, Any]:
  header, rule, *rows = map(split_row, table.strip().splitlines())
  return {
    'columns': header,
    'numeric': [cell.endswith(':') for cell in rule],
    'rows': rows,
  }


def split_row(line: str) -> list[str]:
  """Splits a row of a Markdown table into cells."""
  inner = line.strip().removeprefix('|').removesuffix('|')
  return [cell.strip() for cell in inner.split('|')]
