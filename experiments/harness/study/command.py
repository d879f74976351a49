"""Runs commands in processes of their own, each until it has finished once."""

import json
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

from experiments.harness.store import files
from experiments.harness.study import claim
from experiments.harness.study.declared import ROOT, Command

_SECONDS_TO_SAVE = 60
_SECONDS_TO_SAY = 0.5


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
      cwd=ROOT,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
    )
    try:
      status = process.wait(timeout)
    except subprocess.TimeoutExpired:
      line = _last_line(folder / 'log.txt', position)
      failure = f'took more than {timeout:g} s, after: {line}'
      process.send_signal(signal.SIGUSR1)  # Into the log: where it is.
      time.sleep(_SECONDS_TO_SAY)
    except (SystemExit, KeyboardInterrupt):
      _end(process)
      ended('was ended from outside')
      raise
    else:
      if status:
        line = _last_line(folder / 'log.txt', position)
        failure = f'exit status {status}: {line}'
    finally:
      _end(process)
  return ended(failure)


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
    results = claim.read_results(folder / 'results.json')
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
  texts = [line.strip() for line in lines if line.strip()]
  return texts[-1][:300] if texts else 'it printed nothing'
