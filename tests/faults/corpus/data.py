"""Makes broken files for all loaders except those of language models.

    python -m tests.faults.corpus.data FOLDER

writes each case into a folder of its own. `--try` also reads it and prints
what the loader says, in a process of its own.
"""

import argparse
import contextlib
import multiprocessing
import pathlib
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from experiments import harness
from tests.faults.corpus import (
  data_arrays,
  data_audio,
  data_case,
  data_rl,
  data_speech,
  data_tables,
  data_tracking,
)

_MODULES = (
  data_tables,
  data_arrays,
  data_tracking,
  data_audio,
  data_speech,
  data_rl,
)
CASES = {case.name: case for module in _MODULES for case in module.cases()}
# Bytes that reading a broken file may take, and seconds before a test gives up.
MEMORY, SECONDS = 2**29, 60
# Words that begin a remedy.
_REMEDY = re.compile(
  r'\b(add|choose|convert|copy|correct|give|get|make|multiply|name|pack|put|'
  r'remove|replace|save|set|split|take|train|unpack|decompress|write)\b',
  re.IGNORECASE,
)


class _LateError(BaseException):
  """A loader takes too long; no loader catches it."""


@contextlib.contextmanager
def limited(memory: int = MEMORY, seconds: float = SECONDS) -> Iterator[None]:
  """Bounds the further memory and the time of a block of this process."""

  def stop(*_):
    raise _LateError(f'more than {seconds} seconds')

  with open('/proc/self/status', encoding='ascii') as file:
    used = 1024 * int(re.search(r'VmData:\s+(\d+)', file.read())[1])
  former = resource.getrlimit(resource.RLIMIT_DATA)
  handler = signal.signal(signal.SIGALRM, stop)
  resource.setrlimit(resource.RLIMIT_DATA, (used + memory, former[1]))
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_DATA, former)


def check(case: data_case.Case, folder: pathlib.Path) -> str:
  """Makes and reads a broken file.

  Args:
    case: the case.
    folder: an empty folder.

  Returns:
    The error of the loader.

  Raises:
    AssertionError: if the loader accepts the file, or the error is not one line
      with the file, the place and a remedy, or stems from a lack of memory.
  """
  case.make(folder)
  try:
    with limited():
      result = case.read(folder)
  except harness.UserError as error:
    text = str(error)
    cause: Any = error
    while cause is not None:
      assert not isinstance(cause, MemoryError), f'lack of memory: {text}'
      cause = cause.__cause__ or cause.__context__
  else:
    raise AssertionError(f'accepted: {str(result)[:200]}')
  assert text.isprintable(), f'unprintable: {text!r}'
  assert len(text) < 1_000, f'{len(text)} characters: {text[:200]}'
  below = text.replace(str(folder), '')
  file = pathlib.PurePath(case.file).name
  if case.place == data_case.FOLDER:
    below, file = text, str(folder)
  assert file in below, f'no file: {text}'
  assert re.search(case.place, below), f'no {case.place}: {text}'
  after = below[below.index(file) + len(file) :]
  assert _REMEDY.search(after), f'no remedy: {text}'
  return text


def _try(case, path):
  try:
    text = f'ok       {check(case, path)}'
  except AssertionError as error:
    text = f'FAILED   {error}'
  except BaseException as error:
    text = f'RAISED   {type(error).__name__}: {error}'
  print(f'{case.name:<36} {" ".join(text.split())[:300]}', flush=True)


def main() -> None:
  """Writes all cases, or reads them as well."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('folder', nargs='?')
  parser.add_argument('--try', action='store_true', dest='read')
  parser.add_argument(
    '--only', default='', help='starts of the names, with commas between'
  )
  flags = parser.parse_args()
  root = pathlib.Path(flags.folder or tempfile.mkdtemp())
  context = multiprocessing.get_context('fork')
  for i, case in enumerate(CASES.values()):
    if not case.name.startswith(tuple(flags.only.split(','))):
      continue
    folder = root / f'{i:03d}'
    folder.mkdir(parents=True)
    if not flags.read:
      case.make(folder)
      continue
    process = context.Process(target=_try, args=(case, folder))
    begin = time.monotonic()
    process.start()
    process.join(2 * SECONDS)
    if process.exitcode is None:
      process.kill()
      process.join()
    if process.exitcode:
      print(f'{case.name:<36} DIED     {process.exitcode}', flush=True)
    if (seconds := time.monotonic() - begin) > 10:
      print(f'{case.name:<36} took {seconds:.0f} s', flush=True)
  print(f'{len(CASES)} cases in {root}', file=sys.stderr)


if __name__ == '__main__':
  main()
