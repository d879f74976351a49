"""A run whose system calls fail: starts its worker, and judges what is left."""

import contextlib
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from experiments.harness.store import files, loading
from tests.faults import syscalls

ROOT = pathlib.Path(__file__).parents[2]


class Lab:
  """A worker, and undisturbed runs that others are compared with.

  Attributes:
    calls: the calls of the worker.
    process: the worker.
    folder: folder of all runs.
  """

  def __init__(self, folder: pathlib.Path, *mode: str):
    self.folder = folder
    self.calls = syscalls.Calls(folder)
    end = self.calls.child.fileno()
    self.process = subprocess.Popen(
      [sys.executable, '-m', 'tests.faults.worker', str(end), *mode],
      cwd=ROOT,
      pass_fds=[end],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    try:
      self.calls.watch(self.process)
    except OSError as error:
      pytest.skip(f'no seccomp notifications on this machine ({error})')

  def order(
    self, do: str, workdir: pathlib.Path, **settings: float
  ) -> dict[str, str]:
    """Gives an order to the worker; returns its answer."""
    self.send(do, workdir, **settings)
    return self.answer()

  def send(self, do: str, workdir: pathlib.Path, **settings: float) -> None:
    """Gives an order to the worker."""
    line = json.dumps({'do': do, 'workdir': str(workdir), **settings})
    print(line, file=self.process.stdin, flush=True)

  def answer(self) -> dict[str, str]:
    """Waits for the answer to an order."""
    return json.loads(self.process.stdout.readline())

  def judge(self, workdir: pathlib.Path, answer: dict[str, str]) -> list[str]:
    """Finishes a run that was disturbed; returns what is wrong with it.

    Args:
      workdir: folder of the run.
      answer: how it ended.

    Returns:
      Faults; [] if what was written can be read, and the same command then has
      all of the results of an undisturbed run.
    """
    faults = []
    if answer['end'] == 'traceback' or '\n' in answer['text']:
      faults.append(answer['text'])
    read = self.order('read', workdir)
    if read['end'] != 'read' or read['warnings']:
      faults.append(f'reading: {read}')
    again = self.order('attempt', workdir)
    if again['end'] != 'finished':
      return [*faults, f'again: {again}']
    content, whole = contents(workdir), contents(self.whole())
    return faults + [
      f'{name}: {content[name]!r} instead of {whole[name]!r}'
      for name in whole
      if content[name] != whole[name]
    ]

  def whole(self, **settings: float) -> pathlib.Path:
    """Returns the folder of an undisturbed run."""
    folder = self.folder / f'whole{"".join(map(str, settings.values()))}'
    if not folder.exists():
      answer = self.order('attempt', folder, **settings)
      assert answer == {'end': 'finished', 'text': '', 'warnings': ''}, answer
    return folder


@contextlib.contextmanager
def lab(folder: pathlib.Path, *mode: str) -> Iterator[Lab]:
  """Starts a worker, which is ended afterwards.

  Args:
    folder: folder of the runs.
    *mode: 'fork' for a process per order.

  Yields:
    The lab.
  """
  made = Lab(folder, *mode)
  with made.process:
    try:
      yield made
    finally:
      made.process.kill()


def contents(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what a run leaves, without times.

  An older checkpoint may be left where its deletion has failed.
  """
  results = json.loads((workdir / 'results.json').read_text())
  for name in [*results]:
    if name == 'date' or name.endswith('seconds'):
      del results[name]
  run = workdir / 'run'
  newest = list(loading.saved_steps(run / 'checkpoints').items())[:2]
  abouts = {
    step: files.unseal((folder / 'about' / 'metadata').read_text())['leaves']
    for step, folder in newest
  }
  unfinished = [
    path for path in run.glob('checkpoints/*') if not path.name.isdigit()
  ]
  return {
    'results.json': results,
    'metrics.jsonl': (run / 'metrics.jsonl').read_bytes(),
    'settings.json': (run / 'settings.json').read_bytes(),
    'table.md': (workdir / 'table.md').read_bytes(),
    'score.png': (workdir / 'score.png').read_bytes(),
    'checkpoints': abouts,
    'list of files': {x.name for x in (*workdir.iterdir(), *unfinished)},
  }


def fresh(folder: pathlib.Path) -> pathlib.Path:
  """Returns the path of an empty workdir."""
  shutil.rmtree(folder / 'run', ignore_errors=True)
  return folder / 'run'
