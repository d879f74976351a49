"""Makes every measured table and number of the documents from stored results.

    python -m experiments.tables                               # writes them
    python -m experiments.tables --check                       # or compares
    python -m experiments.tables --store runs/pbgd/toy/quick   # keeps a run

Results are kept in experiments/<paper>/results, a small file for each of the
`RUNS` in the paper's claims.py, by its name: metrics with their values per
seed, table, curves, seeds, settings, versions, time, date and command. A
Markdown file asks for them by comments, which no reader sees:

    <!-- table: pbgd/toy | solver | mean steps = steps | penalty == 10 -->
    <!-- end -->

is the run's own table, here two columns, one under another name, of the rows
whose penalty is 10; without columns it is the whole table. The column `curve`
is a picture of the run's curve that has the name of the row's first cell, or of
its first two. Of a run that keeps a history, it is how the number of the row
has changed over the stored commits, on the same processor.

    **<!-- number: pbgd/toy gap_exponent/known_value .2f -->-2.16**

is a metric alone in a format; without one it comes with its interval.
A table of all papers with their headline claims stands between
`<!-- papers -->` and `<!-- end -->`. `run a - b` is the difference of two
metrics with its paired t interval. A line cannot start with this comment:
Markdown would take it for HTML. A number in a table is one of these two, or
stands between `<!-- by hand -->`, a sentence that says where it is from, and
`<!-- end -->`; or its cell says that it was measured before results were
stored.
"""

import argparse
import dataclasses
import datetime
import importlib
import json
import math
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import harness
from experiments.harness.app import flags
from experiments.harness.store import files
from experiments.harness.study import report

ROOT = pathlib.Path(__file__).parents[1]
LARGEST = 100_000  # Bytes of a stored file.
# A list of plain values, which stands in one line.
_LIST = re.compile(r'\[\s[^\[\]{}]*\]')
_DROPPED = ('metrics', 'method_seconds', 'history')
_TABLE = re.compile(r'(<!-- table: (.*?) -->\n)(.*?)(<!-- end -->)', re.DOTALL)
_PAPERS = re.compile(r'(<!-- papers -->\n)(.*?)(<!-- end -->)', re.DOTALL)
_VALUE = r'[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?%?'
_NUMBER = re.compile(
  rf'(<!-- number: (\S+) (\S+(?: - \S+)?)(?: (\S+))? -->)'
  rf'(?:{_VALUE}(?: ± {_VALUE}'
  rf'| \({_VALUE} to {_VALUE}\))?|(?=\D|$))'
)
_BY_HAND = re.compile(r'<!-- by hand -->\n\s*[^|\s].*?<!-- end -->', re.DOTALL)
# Columns that say what a row is, or what somebody else measured.
_GIVEN = (
  *('paper', 'claim', 'method', 'published', 'published or derived'),
  'which statement',
)
_OLD = 'before results were stored'
_FOLDERS = re.compile(r'(?<![\w/])/(?:[^\s/]+/)+(?=[^\s/])')
_BARS = '▁▂▃▄▅▆▇█'


def pages(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
  """The documents that may ask for results."""
  patterns = ('README.md', 'docs/*.md', 'experiments/*/README.md')
  return [path for p in patterns for path in sorted(root.glob(p))]


def store(folder: files.Path, root: pathlib.Path = ROOT) -> pathlib.Path:
  """Keeps the results of a run, and its table, for the documents.

  Args:
    folder: the workdir of the run, or its `results.json`.
    root: of the repository.

  Returns:
    The file, `<paper>/results/<name of the run>.json`.

  Raises:
    ValueError: if the run has no results, is none of those that its paper
      declares, or has results too large to keep.
  """
  folder = pathlib.Path(folder)
  folder = folder.parent if folder.name == 'results.json' else folder
  results = harness.read_results(folder / 'results.json')
  paper, binary = results['paper'], results['binary']
  name, run = declared(results)
  command = [f'experiments.{paper}.{binary}', *run.words(run.preset)]
  if results.get('data_dir'):
    command.append(f'--data_dir={results["data_dir"]}')
  kept = {k: v for k, v in results.items() if k not in _DROPPED}
  kept |= {
    'command': shlex.join(['python', '-m', *command]),
    'metrics': {k: _short(x) for k, x in results['metrics'].items()},
    'per_seed': {
      name: [_short(x) for x in values]
      for name, values in results.get('per_seed', {}).items()
    },
    # Where a folder lies is of one machine.
    'data': _FOLDERS.sub('', results.get('data') or ''),
  }
  written = (folder / 'results.json').stat().st_mtime
  day = datetime.datetime.fromtimestamp(written, datetime.UTC)
  kept.setdefault('date', day.date().isoformat())
  if (folder / 'table.md').exists():
    kept['table'] = _parse((folder / 'table.md').read_text(encoding='utf-8'))
  text = json.dumps(kept, indent=1, allow_nan=False, ensure_ascii=False) + '\n'
  text = _LIST.sub(lambda x: ' '.join(x[0].split()), text)
  if len(text.encode()) > LARGEST:
    raise ValueError(
      f'{folder}: {len(text.encode()):,} bytes are too many to keep, at most '
      f'{LARGEST:,}: leave metrics out of results.json.'
    )
  path = root / 'experiments' / paper / 'results' / f'{name}.json'
  files.write_text(path, text)
  if results.get('history'):
    _remember(path, kept, results['history'])
  return path


def declared(results: Mapping[str, Any]) -> tuple[str, harness.Run]:
  """The run of its paper that results are of, with its name.

  Where there is no `claims.py`, a run has the name of its binary.

  Args:
    results: the content of a `results.json`.

  Raises:
    ValueError: if there is none; says what to declare.
  """
  paper, binary, preset = (results[k] for k in ('paper', 'binary', 'preset'))
  if not (ROOT / 'experiments' / paper / 'claims.py').exists():
    return binary, harness.Run(binary, preset=preset)
  runs = importlib.import_module(f'experiments.{paper}.claims').RUNS
  study = importlib.import_module(f'experiments.{paper}.{binary}').STUDY
  mode, folder = results.get('mode') or '', results.get('data_dir') or ''
  wanted = {k: v for k, v in results['settings'].items() if k != 'seeds'}
  for name, run in runs.items():
    if (run.binary, run.preset, run.mode) != (binary, preset, mode):
      continue
    settings = report.plain(
      flags.settings_by(study.presets, preset, run.flags, study.renamed)
    )
    seeds = settings.pop('seeds', None)
    if settings == wanted and run.data in ('', folder):
      given = results['settings'].get('seeds')
      more = () if given == seeds else (f'--seeds={given}',)
      return name, dataclasses.replace(run, flags=(*run.flags, *more))
  raise ValueError(
    f'no run in experiments/{paper}/claims.py has these settings: add a '
    f'harness.Run({binary!r}, preset={preset!r}, flags=...) to its RUNS.'
  )


def render(text: str, root: pathlib.Path = ROOT) -> str:
  """Fills in what a document asks for.

  Args:
    text: of the document.
    root: of the repository, for the stored results.

  Returns:
    The text with its tables and numbers anew.

  Raises:
    ValueError: if a result, a column or a metric is not stored; names it.
  """

  def table(match):
    return match[1] + _table(match[2], root) + match[4]

  def number(match):
    return match[1] + _number(*match.groups()[1:], root)

  def papers(match):
    return match[1] + _papers(root) + match[3]

  text = _PAPERS.sub(papers, text)
  return _NUMBER.sub(number, _TABLE.sub(table, text))


def unstored(text: str) -> list[str]:
  """Rows of tables with a measured number that is from no stored result."""
  text = _BY_HAND.sub('', _PAPERS.sub('', _TABLE.sub('', text)))
  text = _NUMBER.sub('', text)
  found, header = [], None
  for line in text.splitlines():
    if not line.startswith('|'):
      header = None
      continue
    cells = _cells(line)
    if header is None:
      header = cells
      continue
    # The first cell says what the row is.
    for name, cell in zip(header[1:], cells[1:]):
      said = re.sub(r'`[^`]*`', '', cell).strip('* ')
      if (
        name not in _GIVEN
        and _OLD not in cell
        and (
          re.search(r'\d\.\d|\d ±', said) or re.fullmatch(r'[-\d,]*\d', said)
        )
      ):
        found.append(line)
        break
  return found


def sparkline(values: Sequence[float | None], low: float, high: float) -> str:
  """A curve as bars between two bounds; a dot where it is not finite."""
  span = (high - low) or 1.0

  def bar(value):
    if value is None or not math.isfinite(value):
      return '·'
    place = (value - low) / span * (len(_BARS) - 1)
    return _BARS[min(max(round(place), 0), len(_BARS) - 1)]

  return ''.join(map(bar, values))


def _remember(
  path: pathlib.Path, results: Mapping[str, Any], numbers: Mapping[str, Any]
) -> None:
  """Adds a line to the history of a run, one a commit and processor."""
  line = {k: results[k] for k in ('commit', 'date', 'processor', 'versions')}
  line['numbers'] = {
    k: _short(x, 4) for k, x in numbers.items() if x is not None
  }
  same = lambda other: all(other[k] == line[k] for k in ('commit', 'processor'))
  lines = [old for old in _history(path) if not same(old)] + [line]
  texts = [json.dumps(one, allow_nan=False) for one in lines]
  files.write_text(path.with_suffix('.history'), '\n'.join(texts) + '\n')


def _history(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of the history of a stored run, the oldest first."""
  path = path.with_suffix('.history')
  if not path.exists():
    return []
  return list(map(json.loads, path.read_text(encoding='utf-8').splitlines()))


def _curves(name: str, results: Mapping[str, Any], root: pathlib.Path) -> dict:
  """The curves of a run, or its history on the processor it ran on."""
  lines = [
    line['numbers']
    for line in _history(_path(name, root))
    if line['processor'] == results.get('processor')
  ]
  rows = dict.fromkeys(row for line in lines for row in line)
  return {row: [line.get(row) for line in lines] for row in rows} or (
    results.get('curves') or {}
  )


def _short(value: float | None, digits: int = 6) -> float | None:
  """Some digits of a number."""
  return None if value is None else float(f'{value:.{digits}g}')


def _path(name: str, root: pathlib.Path) -> pathlib.Path:
  paper, _, run = name.partition('/')
  return root / 'experiments' / paper / 'results' / f'{run}.json'


def _read(name: str, root: pathlib.Path) -> dict[str, Any]:
  path = _path(name, root)
  if not path.exists():
    known = ', '.join(sorted(p.stem for p in path.parent.glob('*.json')))
    raise ValueError(f'no stored result {name}; stored: {known or "none"}.')
  return json.loads(path.read_text(encoding='utf-8'))


def _parse(table: str) -> dict[str, Any]:
  header, rule, *rows = map(_cells, table.strip().splitlines())
  return {
    'columns': header,
    'numeric': [cell.endswith(':') for cell in rule],
    'rows': rows,
  }


def _cells(line: str) -> list[str]:
  inner = line.strip().removeprefix('|').removesuffix('|')
  return [cell.strip() for cell in inner.split('|')]


def _number(name, metric, form, root) -> str:
  results = _read(name, root)
  metrics = results['metrics']
  first, _, second = metric.partition(' - ')
  for one in filter(None, (first, second)):
    if one not in metrics:
      raise ValueError(f'the stored result {name} has no metric {one}.')
  if second:
    interval = harness.paired_interval(results, first, second)
    if interval is None:
      raise ValueError(
        f'the stored result {name} lacks the values per seed of {first} or '
        f'{second}: run it again and store it.'
      )
    return f'{interval.mean:{form}}' if form else str(interval)
  value, half = metrics[metric], metrics.get(f'{metric}/half_width')
  if value is None:
    raise ValueError(f'{metric} of {name} is not finite: say so in words.')
  if form:
    return f'{value:{form}}'
  if f'{metric}/low' in metrics:
    ends = (value, metrics[f'{metric}/low'], metrics[f'{metric}/high'])
    return '{:.3f} ({:.3f} to {:.3f})'.format(*ends)
  return str(harness.Interval(value, math.nan if half is None else half, 1, 1))


def _table(spec: str, root: pathlib.Path) -> str:
  name, *fields = (field.strip() for field in spec.split('|'))
  if not _path(name, root).exists():
    # A table may wait for its run; a number in a sentence may not.
    return f'*Not measured yet: there is no stored result `{name}`.*\n'
  results = _read(name, root)
  table = results.get('table')
  if table is None:
    raise ValueError(f'the stored result {name} has no table.')
  columns, rows, asked = table['columns'], table['rows'], {}

  def at(column):
    if column not in columns:
      raise ValueError(
        f'the table of {name} has no column {column!r}; it has '
        f'{", ".join(columns)}.'
      )
    return columns.index(column)

  curves = _pictures(_curves(name, results, root))
  for field in fields:
    if ' == ' in field:
      column, _, value = field.partition(' == ')
      rows = [row for row in rows if row[at(column)] == value]
      continue
    column, _, title = field.partition(' = ')
    if column != 'curve':
      at(column)
    asked[title or column] = column
  asked = asked or {column: column for column in columns}
  asked = {t: c for t, c in asked.items() if c != 'curve' or curves}
  numeric = [c != 'curve' and table['numeric'][at(c)] for c in asked.values()]
  lines = [list(asked), ['--:' if right else '---' for right in numeric]]
  lines += [
    [
      curves.get('/'.join(row[:2]), curves.get(row[0], ''))
      if c == 'curve'
      else row[at(c)]
      for c in asked.values()
    ]
    for row in rows
  ]
  body = ''.join(f'| {" | ".join(line)} |\n' for line in lines)
  return f'{body}\n{_caption(results)}\n'


def _papers(root: pathlib.Path) -> str:
  """Rows of all papers: solvers, headline claims as judged, and a link."""
  lines = ['| paper | solvers | result | |', '| --- | --- | --- | --- |']
  for path in sorted(root.glob('experiments/*/claims.py')):
    folder = path.parent.name
    module = importlib.import_module(f'experiments.{folder}.claims')
    said = []
    for metric, words in module.PAPER.headlines.items():
      # Of several claims with this number, the first.
      for claim in [c for c in module.CLAIMS if c.metric == metric][:1]:
        judged = harness.judge(claim, _read(f'{folder}/{claim.run}', root))
        # On other data: the page of the paper says on which.
        *other, verdict = judged.verdict.removesuffix(' there').split('): ')
        verdict, *notes = verdict.split(', ')
        notes += ['other data'] if other else []
        verdict += f' ({", ".join(notes)})' if notes else ''
        said.append(f'{words.format(judged.ours)}: {verdict}')
    solvers = ', '.join(f'`{name}`' for name in module.PAPER.solvers)
    page = f'[more](experiments/{folder}/README.md)'
    cells = module.PAPER.title, solvers, '<br>'.join(said), page
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join([*lines, '', ''])


def _caption(results: Mapping[str, Any]) -> str:
  """Where a table is from."""
  minutes = results['wall_seconds'] / 60
  cores = results['hardware']['cores']
  processor = results.get('processor', f'{cores} core{"s" * (cores != 1)}')
  seeds = len(results['seeds'])
  said = [
    f'{seeds} seed{"s" if seeds > 1 else ""}',
    f'{minutes:.0f} min' if minutes >= 2 else f'{60 * minutes:.0f} s',
    f'{processor}, {results["date"]}: `{results["command"]}`',
  ]
  if results.get('substituted'):
    said.insert(1, results['substituted'])
  return f'({", ".join(said)})'


def _pictures(curves: Mapping[str, list]) -> dict[str, str]:
  """Curves on one scale, a logarithm where they span two decades."""
  known = [v for c in curves.values() for v in c if v is not None]
  if not known:
    return {}
  change = lambda value: value
  if min(known) > 0 and max(known) > 100 * min(known):
    change = lambda value: None if value is None else math.log(value)
  low, high = change(min(known)), change(max(known))
  return {
    name: sparkline(list(map(change, values)), low, high)
    for name, values in curves.items()
  }


def main(argv: Sequence[str] | None = None) -> int:
  """Stores, writes or checks; gives the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.tables',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--store',
    nargs='+',
    default=[],
    metavar='RUN',
    help='workdirs of finished runs, whose results are kept',
  )
  parser.add_argument(
    '--check',
    action='store_true',
    help='writes no document; exit status 1 if one differs from the results',
  )
  given = parser.parse_args(argv)
  wrong = []
  try:
    for run in given.store:
      print(store(run))
  except (ValueError, harness.UserError) as error:
    wrong.append(str(error))
  for path in pages():
    text = path.read_text(encoding='utf-8')
    name = path.relative_to(ROOT)
    try:
      made = render(text)
      if not given.check and made != text:
        files.write_text(path, made)
        print(f'wrote {name}')
    except (ValueError, harness.UserError) as error:
      # What one page lacks keeps no other from being written.
      wrong.append(f'{name}: {error}')
      continue
    if given.check and made != text:
      wrong.append(f'{name} differs from the stored results.')
    if re.search(r'^ *<!-- number', made, re.MULTILINE):
      wrong.append(f'{name}: a line starts with the comment of a number.')
    if rows := unstored(made):
      wrong.append(f'{name}: {len(rows)} rows are from no stored result:')
      wrong += rows[:3]
  print('\n'.join(wrong), end='\n' if wrong else '', file=sys.stderr)
  if given.check and not wrong:
    print('All documents agree with the stored results.')
  return 1 if wrong else 0


if __name__ == '__main__':
  sys.exit(main())
