"""Counts of faults tried and survived, and the page made of them.

    BILEVEL_JAX_FAULTS=/tmp/faults python -m pytest -m slow tests/faults
    python -m tests.faults.summary /tmp/faults

The first command leaves a file per kind of fault in the folder; the second one
merges them into docs/faults.json and rewrites docs/faults.md.
"""

import datetime
import json
import os
import pathlib
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.harness.study import report

VARIABLE = 'BILEVEL_JAX_FAULTS'
ROOT = pathlib.Path(__file__).parents[2]
PAGE, STORED = ROOT / 'docs/faults.md', ROOT / 'docs/faults.json'


def record(kind: str, where: str, faults: Sequence[Sequence[str]]) -> None:
  """Adds the outcomes of a kind of fault, and fails if one was not survived.

  Args:
    kind: name of the fault in the table.
    where: what it was tried on; the tests of a kind have different ones.
    faults: for each try, what went wrong; [] if it was survived.

  Raises:
    AssertionError: with the tries that were not survived.
  """
  survived = sum(not fault for fault in faults)
  if folder := os.environ.get(VARIABLE):
    content = {
      'kind': kind,
      'where': where,
      'tried': len(faults),
      'survived': survived,
    }
    name = ''.join(x if x.isalnum() else '_' for x in f'{kind} {where}')
    path = pathlib.Path(folder, f'{name}.json')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + '\n', encoding='utf-8')
  wrong = {number: fault for number, fault in enumerate(faults, 1) if fault}
  assert not wrong, f'{kind} of {where}: {json.dumps(wrong, indent=1)}'


_KILLS = 'SIGKILL or SIGTERM at a random moment'


def page(text: str, stored: Mapping[str, Any]) -> str:
  """Returns the page with the numbers of docs/faults.json in its tables."""
  kinds: dict[str, list[Mapping[str, Any]]] = {}
  for row in stored['faults']:
    kinds.setdefault(row['kind'], []).append(row)
  table = []
  for kind, tests in kinds.items():
    where = tests[0]['where'] if len(tests) == 1 else f'{len(tests)} binaries'
    table.append({'fault': kind, 'on': where, **_sums(tests)})
  table.append({'fault': 'All', 'on': '', **_sums(stored['faults'])})
  when = f'On {stored["date"]}, {stored["machine"]}.\n\n'
  binaries = [
    {'binary': f'`{row["where"]}`', **_sums([row])} for row in kinds[_KILLS]
  ]
  for name, content in (
    ('faults', when + report.format_table(table)),
    ('kills', report.format_table(binaries)),
  ):
    start, end = f'<!-- from faults.json: {name} -->\n', '<!-- end -->'
    before, _, rest = text.partition(start)
    text = f'{before}{start}\n{content}\n{end}{rest.partition(end)[2]}'
  return text


def _sums(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
  return {name: sum(x[name] for x in rows) for name in ('tried', 'survived')}


def main(folder: str) -> None:
  """Stores the counts in a folder, and rewrites the page."""
  faults = [
    json.loads(path.read_text(encoding='utf-8'))
    for path in sorted(pathlib.Path(folder).glob('*.json'))
  ]
  versions = report.versions()
  stored = {
    'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
    'machine': f'{platform.machine()} with Python {versions["python"]} and '
    f'jax {versions["jax"]}',
    'faults': sorted(faults, key=lambda x: (x['kind'], x['where'])),
  }
  STORED.write_text(f'{json.dumps(stored, indent=1)}\n', encoding='utf-8')
  text = PAGE.read_text(encoding='utf-8')
  PAGE.write_text(page(text, stored), encoding='utf-8')


if __name__ == '__main__':
  main(*sys.argv[1:])
