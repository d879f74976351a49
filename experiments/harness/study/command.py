"""Runs commands in separate processes, and skips finished ones."""

import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.harness.store import files
from experiments.harness.study import claim
from experiments.harness.study.declared import ROOT, Command

_SECONDS_TO_SAVE = 60
_SECONDS_TO_PRINT = 0.5
# Processes of all threads.
_running: set[subprocess.Popen] = set()


class Ended(NamedTuple):
  """The end of a command.

  Attributes:
    failure: reason of a failure in one line, or ''.
    seconds: wall time of all attempts, with start and compilation.
    results: content of `results.json`, {} after a failure.
    skipped: why it was not run, or ''.
  """

  failure: str
  seconds: float
  results: dict[str, Any]
  skipped: str = ''


def read_finished(command: Command, workdir: files.Path) -> Ended | None:
  """Reads the end of a command that has finished; None if it is to run."""
  folder = pathlib.Path(workdir) / command.folder
  record = _read_record(folder / 'command.json')
  if record.get('finished') and record.get('words') == command.words:
    run = _finished(folder, record['seconds'])
    # With results missing or damaged, it resumes from its checkpoints.
    return None if run.failure else run
  return None


def end_running() -> None:
  """Ends the commands that other threads execute, with time to save."""
  running = list(_running)
  for process in running:
    process.terminate()
  deadline = time.monotonic() + _SECONDS_TO_SAVE
  for process in running:
    try:
      process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      process.kill()


def execute(
  command: Command, workdir: files.Path, *, timeout: float | None = None
) -> Ended:
  """Runs a command in a process, unless it has finished before.

  Args:
    command: the command.
    workdir: parent of its folder, which gets `log.txt` with its output and
      `command.json` with its end.
    timeout: seconds after which it is ended as a failure; None for no limit.

  Returns:
    An `Ended`.
  """
  folder = files.make_folder(pathlib.Path(workdir) / command.folder)
  record = folder / 'command.json'
  words = [sys.executable, *command.words, f'--workdir={folder}']
  if run := read_finished(command, workdir):
    return run
  before = _read_record(record)
  # Removes the results of a failed attempt.
  (folder / 'results.json').unlink(missing_ok=True)
  start = time.monotonic()

  def ended(failure):
    """Writes `command.json`."""
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

  try:
    failure = run_logged(words, folder / 'log.txt', timeout=timeout)
  except (SystemExit, KeyboardInterrupt):
    ended('was ended from outside')
    raise
  return ended(failure)


def run_logged(
  words: Sequence[str], path: pathlib.Path, *, timeout: float | None = None
) -> str:
  """Runs a program at the top of the repository.

  Args:
    words: its command line.
    path: log to which its output is appended; its folder exists.
    timeout: seconds after which it is ended; None for no limit.

  Returns:
    The reason of a failure in one line, or ''.
  """
  with files.writing(path.parent), path.open('ab') as log:
    position = log.tell()
    process = subprocess.Popen(
      words,
      cwd=ROOT,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
    )
    _running.add(process)
    try:
      status = process.wait(timeout)
    except subprocess.TimeoutExpired:
      line = _last_line(path, position)
      process.send_signal(signal.SIGUSR1)  # Prints its stacks into the log.
      time.sleep(_SECONDS_TO_PRINT)
      return f'took more than {timeout:g} s, after: {line}'
    finally:
      _running.discard(process)
      _end(process)
  return f'exit status {status}: {_last_line(path, position)}' if status else ''


def _end(process: subprocess.Popen) -> None:
  """Ends a process if it still runs, with time to save."""
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
  """Returns the last line of a log, shortened for a table."""
  with path.open('rb') as file:
    file.seek(max(position, path.stat().st_size - 10_000))
    lines = file.read().decode(errors='replace').split('\n')
  texts = [line.strip() for line in lines if line.strip()]
  return texts[-1][:300] if texts else 'it printed nothing'
