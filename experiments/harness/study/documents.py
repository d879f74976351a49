"""Fills documents with tables and numbers from stored results."""

import math
import pathlib
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.harness.study import stored
from experiments.harness.study.claim import judge, paired_interval
from experiments.harness.study.declared import ROOT, claims_module, discover
from experiments.harness.study.report import Interval

_TABLE = re.compile(r'(<!-- table: (.*?) -->\n)(.*?)(<!-- end -->)', re.DOTALL)
_PAPERS = re.compile(r'(<!-- papers -->\n)(.*?)(<!-- end -->)', re.DOTALL)
_VALUE = r'[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?%?'
_NUMBER = re.compile(
  rf'(<!-- number: (\S+) (\S+(?: - \S+)?)(?: (\S+))? -->)'
  rf'(?:{_VALUE}(?: ± {_VALUE}'
  rf'| \({_VALUE} to {_VALUE}\))?|(?=\D|$))'
)
# Tables with words on their source, and tables of a file next to the page.
_BY_HAND = re.compile(r'<!-- by hand -->\n\s*[^|\s].*?<!-- end -->', re.DOTALL)
_FROM_FILE = re.compile(r'<!-- from [^>]+ -->\n.*?<!-- end -->', re.DOTALL)
# Columns without our measurements.
_DESCRIPTIVE = (
  *('paper', 'claim', 'method', 'published', 'published or derived'),
  'which statement',
)
_OLD = 'before results were stored'
_WIDTH = 118  # Of the lines of a document, in characters.
_BARS = '▁▂▃▄▅▆▇█'


def pages(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
  """Returns the documents that may contain tags."""
  patterns = ('README.md', 'docs/**/*.md', 'experiments/*/*.md')
  return [path for p in patterns for path in sorted(root.glob(p))]


def render(text: str, root: pathlib.Path = ROOT) -> str:
  """Fills in the tables and numbers of a document.

  Args:
    text: text of the document.
    root: root of the repository.

  Returns:
    The new text.

  Raises:
    ValueError: if a result, a column or a metric is missing.
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
  """Returns the table rows with a number that is from no stored result."""
  text = _BY_HAND.sub('', _PAPERS.sub('', _TABLE.sub('', text)))
  text = _NUMBER.sub('', _FROM_FILE.sub('', text))
  rows, header = [], None
  for line in text.splitlines():
    if not line.startswith('|'):
      header = None
      continue
    cells = stored.split_row(line)
    if header is None:
      header = cells
      continue
    # The first cell is the name of the row.
    for name, cell in zip(header[1:], cells[1:]):
      plain = re.sub(r'`[^`]*`', '', cell).strip('* ')
      if (
        name not in _DESCRIPTIVE
        and _OLD not in cell
        and (
          re.search(r'\d\.\d|\d ±', plain) or re.fullmatch(r'[-\d,]*\d', plain)
        )
      ):
        rows.append(line)
        break
  return rows


def sparkline(values: Sequence[float | None], low: float, high: float) -> str:
  """Draws a curve as bars between two bounds; a dot for a non-finite value."""
  span = (high - low) or 1.0

  def bar(value):
    if value is None or not math.isfinite(value):
      return '·'
    place = (value - low) / span * (len(_BARS) - 1)
    return _BARS[min(max(round(place), 0), len(_BARS) - 1)]

  return ''.join(map(bar, values))


def _number(name, metric, form, root) -> str:
  results = stored.read(name, root)
  metrics = results['metrics']
  first, _, second = metric.partition(' - ')
  for one in filter(None, (first, second)):
    if one not in metrics:
      raise ValueError(f'the stored result {name} has no metric {one}.')
  if second:
    interval = paired_interval(results, first, second)
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
  return str(Interval(value, math.nan if half is None else half, 1, 1))


def _table(spec: str, root: pathlib.Path) -> str:
  name, *fields = (field.strip() for field in spec.split('|'))
  if not stored.result_path(name, root).exists():
    # A missing run is no error for a table, only for a number in a sentence.
    return f'*Not measured yet: there is no stored result `{name}`.*\n'
  results = stored.read(name, root)
  table = results.get('table')
  if table is None:
    raise ValueError(f'the stored result {name} has no table.')
  columns, rows, titles = table['columns'], table['rows'], {}

  def at(column):
    if column not in columns:
      raise ValueError(
        f'the table of {name} has no column {column!r}; it has '
        f'{", ".join(columns)}.'
      )
    return columns.index(column)

  curves = _pictures(stored.curves(name, results, root))
  for field in fields:
    if ' == ' in field:
      column, _, value = field.partition(' == ')
      rows = [row for row in rows if row[at(column)] == value]
      continue
    column, _, title = field.partition(' = ')
    if column != 'curve':
      at(column)
    titles[title or column] = column
  titles = titles or {column: column for column in columns}
  titles = {t: c for t, c in titles.items() if c != 'curve' or curves}
  numeric = [c != 'curve' and table['numeric'][at(c)] for c in titles.values()]
  lines = [list(titles), ['--:' if right else '---' for right in numeric]]
  lines += [
    [
      curves.get('/'.join(row[:2]), curves.get(row[0], ''))
      if c == 'curve'
      else row[at(c)]
      for c in titles.values()
    ]
    for row in rows
  ]
  body = ''.join(f'| {" | ".join(line)} |\n' for line in lines)
  return f'{body}\n{_caption(results)}\n'


def _papers(root: pathlib.Path) -> str:
  """Formats the table of papers: solvers, judged headline claims, a link."""
  lines = ['| paper | solvers | result | |', '| --- | --- | --- | --- |']
  for folder in discover(root):
    module = claims_module(folder)
    if module.PAPER is None:
      continue
    results = []
    for metric, words in module.PAPER.headlines.items():
      # Uses the first claim about this metric.
      for claim in [c for c in module.CLAIMS if c.metric == metric][:1]:
        judged = judge(claim, stored.read(f'{folder}/{claim.run}', root))
        # The page of the paper names substituted data.
        *other, verdict = judged.verdict.removesuffix(' there').split('): ')
        verdict, *notes = verdict.split(', ')
        notes += ['other data'] if other else []
        verdict += f' ({", ".join(notes)})' if notes else ''
        results.append(f'{words.format(judged.result)}: {verdict}')
    solvers = ', '.join(f'`{name}`' for name in module.PAPER.solvers)
    page = f'[more](experiments/{folder}/README.md)'
    cells = module.PAPER.title, solvers, '<br>'.join(results), page
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join([*lines, '', ''])


def _caption(results: Mapping[str, Any]) -> str:
  """Formats the caption of a table: seeds, time, machine, date and command."""
  minutes = results['wall_seconds'] / 60
  cores = results['hardware']['cores']
  processor = results.get('processor', f'{cores} core{"s" * (cores != 1)}')
  seeds = len(results['seeds'])
  parts = [
    f'{seeds} seed{"s" if seeds > 1 else ""}',
    f'{minutes:.0f} min' if minutes >= 2 else f'{60 * minutes:.0f} s',
    f'{processor}, {results["date"]}: `{results["command"]}`',
  ]
  if results.get('substituted'):
    parts.insert(1, results['substituted'])
  # A name of many methods stays whole, so lines may exceed the width.
  return textwrap.fill(
    f'({", ".join(parts)})',
    _WIDTH,
    break_long_words=False,
    break_on_hyphens=False,
  )


def _pictures(curves: Mapping[str, list]) -> dict[str, str]:
  """Draws curves on a common scale, logarithmic above two decades."""
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
