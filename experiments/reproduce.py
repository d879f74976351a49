"""Runs the claims of the papers and writes a report on them.

    python -m experiments.reproduce --preset=smoke --papers=pbgd

A paper's `RUNS` and `CLAIMS` are in experiments/<paper>/claims.py, found by
itself. Each run is made once, in a process and a workdir of its own:
a binary that crashes costs its own rows, which say so, and no others. The same
command goes on where a killed one was: finished runs are not run again, failed
ones are. `report.md` in the workdir has a row for each claim and is written
anew after each run. `--store` keeps the results for the tables of the READMEs,
see `tables`.

Presets: `smoke` takes about a minute a paper and needs no data folder; it shows
that everything runs, on sizes too small to judge a paper by. `quick` takes
minutes a binary, `paper` the published sizes. `--runs=pbgd/mlp,pbgd/fashion`
makes these alone, each by the preset that it declares. The exit status is 1 if
a command failed or a claim names a metric that its run does not have, else 0,
whether or not the claims are shown.
"""

import configparser
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import app, flags

from experiments import harness, tables
from experiments.harness.app import termination
from experiments.harness.store import files
from experiments.harness.study import claim as claim_lib

ROOT = pathlib.Path(__file__).parent
COLUMNS = (
  *('claim', 'published', 'ours', 'bound', 'verdict'),
  *('data', 'time', 'command'),
)
_PENDING = 'not run yet'
_SECONDS_TO_SAVE = 60
_SECONDS_TO_SAY = 0.5


class Declared(NamedTuple):
  """What a paper's folder declares.

  Attributes:
    runs: by name.
    claims: each of one of these runs.
  """

  runs: Mapping[str, harness.Run]
  claims: tuple[harness.Claim, ...]


class Command(NamedTuple):
  """A run of a paper by a preset.

  Attributes:
    paper: its folder.
    name: of the run.
    module: what runs.
    flags: all flags but the workdir.
  """

  paper: str
  name: str
  module: str
  flags: tuple[str, ...]

  @property
  def words(self) -> list[str]:
    """The command line, without the interpreter and the workdir."""
    return ['-m', self.module, *self.flags]

  @property
  def folder(self) -> str:
    """The workdir, in that of the report: one for each folder of data."""
    data = [f for f in self.flags if f.startswith('--data_dir=')]
    which = f'-data-{zlib.crc32(data[0].encode()):08x}' if data else ''
    return f'{self.paper}/{self.name}{which}'


class Ended(NamedTuple):
  """How a command ended.

  Attributes:
    failure: what went wrong, one line; '' if nothing did.
    seconds: wall time of all attempts, with start and compilation.
    results: the content of its `results.json`, {} if it failed.
    skipped: why it was not run at all; '' if it was.
  """

  failure: str
  seconds: float
  results: dict[str, Any]
  skipped: str = ''


def discover(root: pathlib.Path = ROOT) -> tuple[str, ...]:
  """Names of the papers' folders that declare claims, sorted."""
  return tuple(sorted(path.parent.name for path in root.glob('*/claims.py')))


def load(papers: Iterable[str] = ()) -> dict[str, Declared]:
  """Reads what papers declare.

  Args:
    papers: names of their folders; all if empty.

  Returns:
    Runs and claims by paper.

  Raises:
    SettingsError: if a paper is unknown; names the known.
  """
  known = discover()
  for paper in papers:
    if paper not in known:
      raise harness.SettingsError(
        f'no claims of {paper!r} (experiments/{paper}/claims.py); known: '
        f'{", ".join(known)}.'
      )
  modules = {
    paper: importlib.import_module(f'experiments.{paper}.claims')
    for paper in papers or known
  }
  return {name: Declared(x.RUNS, x.CLAIMS) for name, x in modules.items()}


def commands(
  papers: Mapping[str, Declared],
  *,
  preset: str,
  data_dir: str | None,
  only: Sequence[str] = (),
) -> dict[tuple[str, str], Command]:
  """The runs of a preset, by paper and name.

  Args:
    papers: what they declare.
    preset: smoke, quick or paper.
    data_dir: folder of data sets; None for packaged data.
    only: these runs alone, as `paper/name`, each by its own preset.

  Returns:
    The commands.

  Raises:
    SettingsError: if there is no such run; names those of the paper.
  """
  for name in only:
    paper, _, run = name.partition('/')
    if run not in (papers[paper].runs if paper in papers else {}):
      known = [f'{p}/{n}' for p, x in papers.items() for n in x.runs]
      raise harness.SettingsError(
        f'there is no run {name}; there are {", ".join(known)}.'
      )
  folder = None if data_dir is None else os.path.abspath(data_dir)
  return {
    (paper, name): Command(
      paper,
      name,
      f'experiments.{paper}.{run.binary}',
      run.words(run.preset if only else preset, folder),
    )
    for paper, declared in papers.items()
    for name, run in declared.runs.items()
    if (f'{paper}/{name}' in only if only else preset in run.presets)
  }


def judged_in(
  papers: Mapping[str, Declared],
  commands: Mapping[tuple[str, str], Command],
  preset: str,
) -> list[tuple[harness.Claim, Command]]:
  """The claims that a preset judges, with the commands that measure them."""
  found = []
  for paper, declared in papers.items():
    for claim in declared.claims:
      command = commands.get((paper, claim.run))
      if command and preset in claim.presets:
        found.append((claim, command))
  return found


def execute(
  command: Command, workdir: files.Path, *, timeout: float | None = None
) -> Ended:
  """Runs a command in a process, unless it is finished.

  Args:
    command: what to run.
    workdir: under which it gets its folder: with `log.txt`, all that it
      prints, and `command.json`, how it ended.
    timeout: seconds after which it is ended and has failed; None for none.

  Returns:
    An `Ended`.
  """
  folder = files.make_folder(pathlib.Path(workdir) / command.folder)
  record = folder / 'command.json'
  words = [sys.executable, *command.words, f'--workdir={folder}']
  before = _read_record(record)
  if before.get('finished') and before.get('words') == command.words:
    run = _finished(folder, before['seconds'])
    # One whose results are gone or damaged goes on from its checkpoints.
    if not run.failure:
      return run
  # What an earlier, failed attempt left must not pass for this one's.
  (folder / 'results.json').unlink(missing_ok=True)
  start = time.monotonic()
  failure = ''

  def ended(failure):
    """How it ended; kept also of an attempt that is cut short: it took time."""
    seconds = before.get('seconds', 0.0) + time.monotonic() - start
    run = Ended(failure, seconds, {}) if failure else _finished(folder, seconds)
    content = {
      'words': command.words,
      'finished': not run.failure,
      'failure': run.failure,
      'seconds': seconds,
    }
    files.write_text(record, json.dumps(content, indent=2) + '\n')
    return run

  with files.writing(folder), open(folder / 'log.txt', 'ab') as log:
    position = log.tell()
    process = subprocess.Popen(
      words,
      cwd=ROOT.parent,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
    )
    try:
      status = process.wait(timeout)
    except subprocess.TimeoutExpired:
      said = _last_line(folder / 'log.txt', position)
      failure = f'took more than {timeout:g} s, after: {said}'
      process.send_signal(signal.SIGUSR1)  # Into the log: where it is.
      time.sleep(_SECONDS_TO_SAY)
    except (SystemExit, KeyboardInterrupt):
      _end(process)
      ended('was ended from outside')
      raise
    else:
      if status:
        said = _last_line(folder / 'log.txt', position)
        failure = f'exit status {status}: {said}'
    finally:
      _end(process)
  return ended(failure)


def row(claim: harness.Claim, command: Command, run: Ended | None) -> dict:
  """The row of a claim; without a run, it is still to come."""
  cells = {
    'claim': claim.words,
    'published': claim.published,
    'ours': '-',
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
  cells['data'] = data_of(run.results)
  failure = run.failure
  if not failure:
    try:
      judged = harness.judge(claim, run.results)
    except ValueError as error:
      failure = str(error)
    else:
      cells |= {
        'ours': judged.ours,
        'bound': judged.bound,
        'verdict': judged.verdict,
      }
  if failure:
    cells['verdict'] = f'not shown: the run failed ({failure})'
  return {name: cell.replace('|', '\\|') for name, cell in cells.items()}


def data_of(results: Mapping[str, Any]) -> str:
  """The data that a run read, in words."""
  found = results.get('data') or 'no data'
  found = [found] if isinstance(found, str) else found
  # Of a source: its name, and what is said of it.
  texts = (x if isinstance(x, str) else f'{x[0]}: {x[1]}' for x in found)
  return '; '.join(texts)


def lacking(extra: str) -> str:
  """Why a run with this extra cannot run here; '' if it can."""
  if not extra:
    return ''
  setup = configparser.ConfigParser()
  setup.read(ROOT.parent / 'setup.cfg')
  asked = setup.get('options.extras_require', extra, fallback=None)
  if asked is None:
    return f'setup.cfg has no extra `{extra}`'
  for line in asked.split():
    try:
      importlib.metadata.version(re.split(r'[^\w.-]', line)[0])
    except importlib.metadata.PackageNotFoundError:
      return f'needs the extra `{extra}`'
  return ''


def missing_metrics(
  claims: Iterable[harness.Claim], results: Mapping[str, Any]
) -> str:
  """The metrics that claims name and a run does not have, in one line."""
  named = {x for c in claims for x in (c.metric, c.at_least, c.at_most)}
  found = results.get('metrics')
  lacking = sorted(
    name
    for name in named
    if isinstance(name, str) and found is not None and name not in found
  )
  return f'no metric {", ".join(lacking)}' if lacking else ''


def write_report(
  path: files.Path,
  judged: Sequence[tuple[harness.Claim, Command]],
  runs: Mapping[Command, Ended],
  *,
  preset: str,
) -> None:
  """Writes the report: a section for each paper, a row for each claim."""
  lines = [f'# Claims, preset `{preset}`\n']
  if preset == 'smoke':
    lines.append(
      'Everything ran, on sizes too small to judge a paper by: a verdict below '
      'says what these few steps say.\n'
    )
  cores = len(os.sched_getaffinity(0))
  total = sum(run.seconds for run in runs.values())
  lines.append(
    f'{cores} cores ({platform.machine()}), Python '
    f'{platform.python_version()}, {_duration(total)} in all. Times are of the '
    'whole command, which several claims may share, with its start and '
    'compilation. ± is a 95 % interval over seeds: `shown` is a claim that all '
    'of it is within, `mean only` one that the mean alone is.\n'
  )
  for paper in dict.fromkeys(command.paper for _, command in judged):
    rows = [
      row(claim, command, runs.get(command))
      for claim, command in judged
      if command.paper == paper
    ]
    lines += [f'## {paper}\n', harness.format_table(rows, COLUMNS)]
  claimed = {command for _, command in judged}
  others = [
    {
      'command': f'`{shlex.join(["python", *command.words])}`',
      'ended': run.failure or 'well',
      'time': _duration(run.seconds),
    }
    for command, run in runs.items()
    if command not in claimed
  ]
  if others:
    lines += [
      '## Without a claim here\n',
      harness.format_table(others),
    ]
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
  """Runs the claims and writes `report.md`.

  Args:
    preset: smoke, quick or paper.
    workdir: of the report and all runs; the same call resumes.
    papers: names of the papers' folders; all if empty.
    only: names of runs, `paper/name`, each by its own preset; all of the preset
      if empty.
    data_dir: folder of data sets, handed to the binaries.
    timeout: seconds that one command may take.
    store: whether results are kept for the tables of the READMEs.

  Returns:
    Whether every command ended well and had the metrics of its claims.
  """
  declared = load(papers)
  found = commands(declared, preset=preset, data_dir=data_dir, only=only)
  judged = judged_in(declared, found, preset)
  distinct = list(found.values())
  report = files.make_folder(workdir) / 'report.md'
  runs: dict[Command, Ended] = {}
  fine = True
  write_report(report, judged, runs, preset=preset)
  for i, command in enumerate(distinct, 1):
    line = f'{i}/{len(distinct)} python {shlex.join(command.words)}'
    print(line, flush=True)
    if why := lacking(declared[command.paper].runs[command.name].extra):
      run = Ended('', 0.0, {}, why)
    else:
      run = execute(command, workdir, timeout=timeout)
    runs[command] = run
    failure = run.failure or missing_metrics(
      [claim for claim, own in judged if own == command], run.results
    )
    fine &= not failure
    said = failure or (run.skipped and f'not run: {run.skipped}') or 'done'
    print(f'  {said}, {_duration(run.seconds)}', flush=True)
    write_report(report, judged, runs, preset=preset)
    if store and run.results:
      try:
        print(f'  {tables.store(pathlib.Path(workdir) / command.folder)}')
      except ValueError as error:
        print(f'  not stored: {error}')
        fine = False
  print(f'Report: {report}')
  return fine


def _end(process: subprocess.Popen) -> None:
  """Ends a process that is still there, with time to save."""
  if process.poll() is None:
    process.terminate()
    try:
      process.wait(_SECONDS_TO_SAVE)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


def _finished(folder: pathlib.Path, seconds: float) -> Ended:
  try:
    results = harness.read_results(folder / 'results.json')
  except ValueError as error:
    return Ended(str(error), seconds, {})
  return Ended('', seconds, results)


def _read_record(path: pathlib.Path) -> dict[str, Any]:
  try:
    record = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
  return record if isinstance(record, dict) else {}


def _last_line(path: pathlib.Path, position: int) -> str:
  """The last line that a process wrote, cut to a length for a table."""
  with path.open('rb') as file:
    file.seek(max(position, path.stat().st_size - 10_000))
    lines = file.read().decode(errors='replace').split('\n')
  said = [line.strip() for line in lines if line.strip()]
  return said[-1][:300] if said else 'it said nothing'


def _duration(seconds: float) -> str:
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {rest} s' if minutes else f'{rest} s'


def main(argv: Sequence[str]) -> None:
  """Reads the flags and reproduces."""
  values = flags.FLAGS
  if argv[1:]:
    raise app.UsageError(f'unknown arguments: {" ".join(argv[1:])}')
  termination.exit_on_sigterm(unwind=True)
  limit = values.timeout_minutes
  try:
    fine = reproduce(
      preset=values.preset,
      workdir=values.workdir or os.path.join('runs/reproduce', values.preset),
      papers=values.papers,
      only=values.runs,
      data_dir=values.data_dir,
      timeout=None if limit is None else 60 * limit,
      store=values.store,
    )
  except harness.UserError as error:
    sys.exit(f'reproduce: {error}')
  sys.exit(0 if fine else 1)


if __name__ == '__main__':
  flags.DEFINE_enum('preset', 'quick', claim_lib.PRESETS, 'Sizes of the runs.')
  flags.DEFINE_list(
    'papers', [], 'Which papers, commas between; by default all.'
  )
  flags.DEFINE_list(
    'runs',
    [],
    'Which runs alone, such as pbgd/mlp, each by its own preset; commas '
    'between.',
  )
  flags.DEFINE_string(
    'workdir',
    None,
    'Folder of the report and the runs; the same command resumes. By default '
    'runs/reproduce/<preset>.',
  )
  flags.DEFINE_string('data_dir', None, 'Folder of data sets.')
  flags.DEFINE_bool(
    'store', False, 'Keeps the results for the tables of the READMEs.'
  )
  flags.DEFINE_float(
    'timeout_minutes', None, 'Ends a command that takes longer.', lower_bound=0
  )
  app.run(main)
