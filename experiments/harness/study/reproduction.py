"""Makes the runs of papers, and reports their claims."""

import functools
import os
import pathlib
import platform
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from experiments.harness.app import errors
from experiments.harness.store import files
from experiments.harness.study import command as command_lib
from experiments.harness.study import declared, jobs, report, stored
from experiments.harness.study.claim import Claim, judge
from experiments.harness.study.command import Ended
from experiments.harness.study.declared import Command

COLUMNS = (
  *('claim', 'published', 'result', 'bound', 'verdict'),
  *('data', 'time', 'command'),
)
_PENDING = 'not run yet'
_ONE_BY_ONE = jobs.Plan()


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


def _execute(
  item: tuple[str, Command], *, workdir: str, timeout: float | None
) -> Ended:
  """Runs a command; the job of an engine, which prints into its log."""
  line, command = item
  print(line, flush=True)
  return command_lib.execute(command, workdir, timeout=timeout)


def _run_all(
  commands: Mapping[Command, str],
  *,
  workdir: files.Path,
  timeout: float | None,
  plan: jobs.Plan,
) -> Iterator[tuple[Command, Ended]]:
  """Gives the ends of commands: of those that will not run, then of jobs.

  Args:
    commands: extras by command.
    workdir: as of `reproduce`.
    timeout: as of `reproduce`.
    plan: as of `reproduce`.
  """
  items = []
  for i, (command, extra) in enumerate(commands.items(), 1):
    line = f'{i}/{len(commands)} python {shlex.join(command.words)}'
    run = command_lib.read_finished(command, workdir)
    if why := declared.why_missing(extra):
      run = Ended('', 0.0, {}, why)
    if run is None:
      items.append((line, command))
    else:
      print(line, flush=True)
      yield command, run
  # Other machines may start in another folder.
  absolute = os.path.abspath(workdir)
  run_one = functools.partial(_execute, workdir=absolute, timeout=timeout)
  plan = plan._replace(folder=os.path.join(absolute, 'jobs'))
  calls = jobs.run(run_one, items, plan, stop=command_lib.end_running)
  for (_, command), job in calls:
    try:
      yield command, job.result()
    except errors.UserError:
      raise
    except Exception as error:
      # A machine was lost: only its own commands fail.
      yield command, Ended(jobs.describe(error), 0.0, {})


def reproduce(
  *,
  preset: str,
  workdir: files.Path,
  papers: Sequence[str] = (),
  only: Sequence[str] = (),
  data_dir: str | None = None,
  timeout: float | None = None,
  store: bool = False,
  plan: jobs.Plan = _ONE_BY_ONE,
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
    plan: engine and number of jobs; each command is a job.

  Returns:
    Whether every command succeeded and has the metrics of its claims.
  """
  known = declared.load(papers)
  commands = declared.commands(
    known, preset=preset, data_dir=data_dir, only=only
  )
  judged = declared.judged_in(known, commands, preset)
  path = files.make_folder(workdir) / 'report.md'
  extras = {c: known[c.paper].runs[c.name].extra for c in commands.values()}
  runs: dict[Command, Ended] = {}
  fine = True
  write_report(path, judged, runs, preset=preset)
  for command, run in _run_all(
    extras, workdir=workdir, timeout=timeout, plan=plan
  ):
    runs[command] = run
    failure = run.failure or missing_metrics(
      [claim for claim, own in judged if own == command], run.results
    )
    fine &= not failure
    outcome = failure or (run.skipped and f'not run: {run.skipped}') or 'done'
    name = f'{command.paper}/{command.name}: ' if plan.jobs > 1 else ''
    print(f'  {name}{outcome}, {_duration(run.seconds)}', flush=True)
    # The same order for any number of jobs.
    ordered = {c: runs[c] for c in extras if c in runs}
    write_report(path, judged, ordered, preset=preset)
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
