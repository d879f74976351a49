"""Binaries as processes that are forked after all imports.

Imports take most of the time of a small run. `multiprocessing` forks each
process from a server that has imported the binaries but not started XLA.
"""

import multiprocessing
import os
import pathlib
import sys
import time
from multiprocessing import process as process_lib

ROOT = pathlib.Path(__file__).parents[2]
NAMES = [
  '.'.join(path.relative_to(ROOT).with_suffix('').parts)
  for path in sorted((ROOT / 'experiments').rglob('*.py'))
  if '\nSTUDY = ' in path.read_text(encoding='utf-8')
]
_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload([*NAMES, __name__])


def start(
  name: str, workdir: pathlib.Path, *arguments: str
) -> process_lib.BaseProcess:
  """Starts a binary with the preset `smoke`.

  Args:
    name: name of its module.
    workdir: its workdir; what it prints goes to a file beside it.
    *arguments: mode and further flags.

  Returns:
    The process.
  """
  flags = ('--preset=smoke', '--save_seconds=1', f'--workdir={workdir}')
  process = _CONTEXT.Process(
    target=_run, args=(name, [*flags, *arguments], log(workdir))
  )
  process.start()
  return process


def log(workdir: pathlib.Path) -> pathlib.Path:
  """Returns the file of what the last process has printed."""
  return workdir.with_name(f'{workdir.name}.log')


def finish(
  name: str, workdir: pathlib.Path, *arguments: str
) -> tuple[int | None, str, float]:
  """Runs a binary; see `start`.

  Returns:
    Exit status, what it has printed, and the time that it took, s.
  """
  since = time.monotonic()
  process = start(name, workdir, *arguments)
  process.join(900)
  seconds = time.monotonic() - since
  process.kill()
  return process.exitcode, log(workdir).read_text(errors='replace'), seconds


def _run(name: str, arguments: list[str], file: pathlib.Path) -> None:
  """Runs a binary like `python -m`."""
  descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  for stream in (1, 2):
    os.dup2(descriptor, stream)
  from experiments import harness

  sys.argv = [name, *arguments]
  harness.run(sys.modules[name].STUDY)
