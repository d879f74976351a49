"""Makes the runs of papers, and reports their claims."""

import os
import pathlib
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.harness.store import files
from experiments.harness.study import declared, report, stored
from experiments.harness.study.claim import Claim, judge
from experiments.harness.study.command import Ended, execute
from experiments.harness.study.declared import Command

COLUMNS = (
  *('claim', 'published', 'result', 'bound', 'verdict'),
  *('data', 'time', 'command'),
)
_PENDING = 'not run yet'


def row(claim: Claim, command: Command, run: Ended | None) -> dict:
  """Returns the table row of a claim; `run` is None before it is made."""
  cells = {
    'claim': claim.words,
    'published': claim.published,
    'result': '-',
    'bound': claim.bound(),
    'verdict': _PENDING,
    'data': '-',
    'time': '-',
    'command': f'`{shlex.join(["python", *command.words])}`',
  }
  if run is None:
    return cells
  if run.skipped:
    return cells | {'verdict': f'not run: {run.skipped}'}
  cells['time'] = _duration(run.seconds)
  cells['data'] = run.results.get('data') or 'no data'
  failure = run.failure
  if not failure:
    try:
      judged = judge(claim, run.results)
    except ValueError as error:
      failure = str(error)
    else:
      cells |= judged._asdict()
      del cells['holds']
  if failure:
    cells['verdict'] = f'not shown: the run failed ({failure})'
  return {name: cell.replace('|', '\\|') for name, cell in cells.items()}


def missing_metrics(claims: Iterable[Claim], results: Mapping[str, Any]) -> str:
  """Names the metrics of claims that the results lack, in one line."""
  if 'metrics' not in results:
    return ''
  values = {x for c in claims for x in (c.metric, c.at_least, c.at_most)}
  names = {name for name in values if isinstance(name, str)}
  missing = sorted(names - results['metrics'].keys())
  return f'no metric {", ".join(missing)}' if missing else ''


def write_report(
  path: files.Path,
  judged: Sequence[tuple[Claim, Command]],
  runs: Mapping[Command, Ended],
  *,
  preset: str,
) -> None:
  """Writes the report with a section per paper and a row per claim."""
  lines = [f'# Claims, preset `{preset}`\n']
  if preset == 'smoke':
    lines.append(
      'The preset smoke only shows that everything runs: its sizes are too '
      'small to judge a paper.\n'
    )
  cores = len(os.sched_getaffinity(0))
  total = sum(run.seconds for run in runs.values())
  lines.append(
    f'{cores} cores ({platform.machine()}), Python '
    f'{platform.python_version()}, {_duration(total)} in total. Times include '
    'start and compilation; several claims may share a command. ± is a 95 % '
    'interval over seeds: a claim is `shown` if the whole interval is within '
    'the bound, `mean only` if only the mean is.\n'
  )
  for paper in dict.fromkeys(command.paper for _, command in judged):
    rows = [
      row(claim, command, runs.get(command))
      for claim, command in judged
      if command.paper == paper
    ]
    lines += [f'## {paper}\n', report.format_table(rows, COLUMNS)]
  with_claims = {command for _, command in judged}
  others = [
    {
      'command': f'`{shlex.join(["python", *command.words])}`',
      'ended': run.failure or 'well',
      'time': _duration(run.seconds),
    }
    for command, run in runs.items()
    if command not in with_claims
  ]
  if others:
    lines += ['## Without a claim\n', report.format_table(others)]
  files.write_text(path, '\n'.join(lines))


def reproduce(
  *,
  preset: str,
  workdir: files.Path,
  papers: Sequence[str] = (),
  only: Sequence[str] = (),
  data_dir: str | None = None,
  timeout: float | None = None,
  store: bool = False,
) -> bool:
  """Makes the runs and writes `report.md`.

  Args:
    preset: smoke, quick or paper.
    workdir: folder of the report and all runs; the same call resumes.
    papers: folders of papers; all if empty.
    only: names of runs, `paper/name`, each with its own preset; all runs of the
      preset if empty.
    data_dir: folder of data sets for the binaries.
    timeout: seconds that a command may take, or None.
    store: whether to store results for the documents.

  Returns:
    Whether every command succeeded and has the metrics of its claims.
  """
  known = declared.load(papers)
  commands = declared.commands(
    known, preset=preset, data_dir=data_dir, only=only
  )
  judged = declared.judged_in(known, commands, preset)
  path = files.make_folder(workdir) / 'report.md'
  runs: dict[Command, Ended] = {}
  fine = True
  write_report(path, judged, runs, preset=preset)
  for i, command in enumerate(commands.values(), 1):
    line = f'{i}/{len(commands)} python {shlex.join(command.words)}'
    print(line, flush=True)
    extra = known[command.paper].runs[command.name].extra
    if why := declared.why_missing(extra):
      run = Ended('', 0.0, {}, why)
    else:
      run = execute(command, workdir, timeout=timeout)
    runs[command] = run
    failure = run.failure or missing_metrics(
      [claim for claim, own in judged if own == command], run.results
    )
    fine &= not failure
    outcome = failure or (run.skipped and f'not run: {run.skipped}') or 'done'
    print(f'  {outcome}, {_duration(run.seconds)}', flush=True)
    write_report(path, judged, runs, preset=preset)
    if store and run.results:
      try:
        print(f'  {stored.store(pathlib.Path(workdir) / command.folder)}')
      except ValueError as error:
        print(f'  not stored: {error}')
        fine = False
  print(f'Report: {path}')
  return fine


def _duration(seconds: float) -> str:
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {rest} s' if minutes else f'{rest} s'
