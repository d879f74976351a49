"""Runs a binary: flags in, files out, one line for each error."""

import inspect
import json
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
from absl import app, flags, logging

from experiments.harness.app import (
  compile_cache,
  errors,
  memory,
  processes,
  termination,
  thunks,
)
from experiments.harness.app import flags as flags_lib
from experiments.harness.store import files as files_lib
from experiments.harness.study import help as help_lib
from experiments.harness.study import study as study_lib

_SPENT = 'seconds.json'


def run(study: study_lib.Study) -> None:
  """Defines the flags of a binary, parses them, and does what they ask for.

  SIGTERM saves and exits with `termination.EXIT_STATUS`; an error of `errors`
  is shown in one line and exits with 1. SIGUSR1 shows where all threads are.
  XLA gets the flag of `thunks`.

  Args:
    study: what the binary is.
  """
  thunks.one_by_one()
  termination.exit_on_sigterm()
  termination.show_on_sigusr1()
  paper, binary = study.paper, study.binary
  flags_lib.define(study.presets, renamed=study.renamed)

  def leave(said: str) -> NoReturn:
    # In one line, whatever a flag or a file's name holds.
    said = f'{paper}/{binary}: {" ".join(said.split())}'
    processes.leave_if_joined(said)
    sys.exit(said)

  def start(argv: Sequence[str]) -> None:
    if not flags.FLAGS['verbosity'].present:
      # jax and orbax inform at length about what they do.
      logging.set_verbosity(logging.WARNING)
    try:
      mode, files = _mode(study, argv[1:])
      options = flags_lib.resolve(
        study.presets, paper=paper, binary=binary, renamed=study.renamed
      )
      if study.check is not None:
        study.check(options.settings)
      memory.keep_freed()
      if flags.FLAGS.distributed:
        processes.join()
      compile_cache.use(flags.FLAGS.compile_cache)
      execute(mode, options, *files)
    except errors.UserError as error:
      leave(str(error))
    except Exception as error:
      if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
        leave(f'too large for the memory ({error}): take smaller sizes.')
      processes.leave_if_joined(traceback.format_exc())
      raise
    finally:
      termination.ignore()

  def parse(argv: Sequence[str]) -> list[str]:
    asked = [word for word in argv[1:] if word in help_lib.FLAGS]
    try:
      left = flags.FLAGS([word for word in argv if word not in asked])
    except flags.Error as error:
      leave(f'{error} --help shows all flags.')
    if asked:
      about = inspect.getmodule(study.main).__doc__ or ''
      print(help_lib.text(about, study, flags.FLAGS.preset), end='')
      sys.exit(0)
    return left

  app.run(start, flags_parser=parse)


def execute(
  mode: Callable[..., study_lib.Report | None],
  options: flags_lib.Options,
  *files: str,
) -> study_lib.Report | None:
  """Calls `main`, or another mode, and writes the report that it gives.

  The time in it is that of all attempts in its folder.

  Args:
    mode: of a `Study`.
    options: what the flags say.
    *files: what the mode takes beside them.

  Returns:
    What the mode returns.
  """
  folder = pathlib.Path(options.workdir)
  clocks = (time.monotonic, time.process_time)
  start = [clock() for clock in clocks]

  def spent():
    now = [clock() for clock in clocks]
    return np.add(_spent(folder), np.subtract(now, start)).round(3).tolist()

  try:
    said = mode(options, *files)
    if isinstance(said, study_lib.Report):
      folder /= said.folder
      written = options._replace(workdir=str(folder))
      study_lib.write(written, said, *spent())
  finally:
    # Also of an attempt that is ended by a signal or an error.
    if folder.is_dir() and files_lib.is_writer():
      files_lib.write_text(folder / _SPENT, f'{json.dumps(spent())}\n')
  return said


def _spent(folder: pathlib.Path) -> list[float]:
  """Wall and processor time of earlier attempts; 0 where nothing says so."""
  try:
    wall, cpu = json.loads((folder / _SPENT).read_text(encoding='utf-8'))
    return [max(0.0, float(wall)), max(0.0, float(cpu))]
  except (OSError, ValueError, TypeError):
    return [0.0, 0.0]


def _mode(
  study: study_lib.Study, words: Sequence[str]
) -> tuple[Callable[..., Any], list[str]]:
  """What the words of a command line ask for: a function, and its files."""
  if not words:
    return study.main, []
  known = {'train': study.main, **study.modes} if study.modes else {}
  name, *files = words
  if name not in known:
    mend = f'; the modes are {", ".join(known)}' if known else ''
    raise errors.SettingsError(f'unknown arguments: {" ".join(words)}{mend}.')
  signature = inspect.signature(known[name])
  try:
    signature.bind(None, *files)
  except TypeError:
    _, *wanted = signature.parameters.values()
    usage = ' '.join(
      p.name.upper() + '...' * (p.kind == p.VAR_POSITIONAL) for p in wanted
    )
    raise errors.SettingsError(
      f'{name} takes {usage or "no files"}, got {len(files)}.'
    ) from None
  for file in files:
    if not os.path.exists(file):
      raise errors.MissingDataError(f'there is no file {file}.')
  return known[name], files
