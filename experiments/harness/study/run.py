"""Runs a binary: parses its flags, writes its files, reports its errors."""

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

_TIMES = 'seconds.json'


def run(study: study_lib.Study) -> None:
  """Parses the flags of a binary and runs it.

  SIGTERM saves and exits with `termination.EXIT_STATUS`. An error of `errors`
  is printed in one line, with exit status 1. SIGUSR1 prints the stacks of all
  threads.

  Args:
    study: the declaration of the binary.
  """
  thunks.one_by_one()
  termination.exit_on_sigterm()
  termination.show_on_sigusr1()
  paper, binary = study.paper, study.binary
  flags_lib.define(study.presets, renamed=study.renamed)

  def leave(reason: str) -> NoReturn:
    # One line, also if the name of a file has line breaks.
    message = f'{paper}/{binary}: {" ".join(reason.split())}'
    processes.leave_if_joined(message)
    sys.exit(message)

  def start(argv: Sequence[str]) -> None:
    if not flags.FLAGS['verbosity'].present:
      # jax and orbax log a lot.
      logging.set_verbosity(logging.WARNING)
    for sentence in flags_lib.renamed_flags(study.renamed):
      print(f'{paper}/{binary}: {sentence}', file=sys.stderr)
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
        leave(f'out of memory ({error}): choose smaller sizes.')
      processes.leave_if_joined(traceback.format_exc())
      raise
    finally:
      termination.ignore()

  def parse(argv: Sequence[str]) -> list[str]:
    words = [word for word in argv if word not in help_lib.FLAGS]
    try:
      rest = flags.FLAGS(words)
    except flags.Error as error:
      leave(f'{error} --help shows all flags.')
    if len(words) < len(argv):
      docstring = inspect.getmodule(study.main).__doc__ or ''
      print(help_lib.text(docstring, study, flags.FLAGS.preset), end='')
      sys.exit(0)
    return rest

  app.run(start, flags_parser=parse)


def execute(
  mode: Callable[..., study_lib.Report | None],
  options: flags_lib.Options,
  *files: str,
) -> study_lib.Report | None:
  """Calls `main` or another mode, and writes its report.

  The report has the time of all attempts in its folder.

  Args:
    mode: a function of a `Study`.
    options: the options.
    *files: further arguments of the mode.

  Returns:
    The result of the mode.
  """
  folder = pathlib.Path(options.workdir)
  clocks = (time.monotonic, time.process_time)
  start = [clock() for clock in clocks]

  def times():
    now = [clock() for clock in clocks]
    return np.add(_earlier(folder), np.subtract(now, start)).round(3).tolist()

  try:
    result = mode(options, *files)
    if isinstance(result, study_lib.Report):
      folder /= result.folder
      own = options._replace(workdir=str(folder))
      study_lib.write(own, result, *times())
  finally:
    # Counts attempts that end by a signal or an error, too.
    if folder.is_dir() and files_lib.is_writer():
      files_lib.write_text(folder / _TIMES, f'{json.dumps(times())}\n')
  return result


def _earlier(folder: pathlib.Path) -> list[float]:
  """Returns wall and CPU time of earlier attempts, 0 if unknown."""
  try:
    wall, cpu = json.loads((folder / _TIMES).read_text(encoding='utf-8'))
    return [max(0.0, float(wall)), max(0.0, float(cpu))]
  except (OSError, ValueError, TypeError):
    return [0.0, 0.0]


def _mode(
  study: study_lib.Study, words: Sequence[str]
) -> tuple[Callable[..., Any], list[str]]:
  """Returns the function of a mode, and its files, from the command line."""
  if not words:
    return study.main, []
  known = {'train': study.main, **study.modes} if study.modes else {}
  name, *files = words
  if name not in known:
    hint = f'; the modes are {", ".join(known)}' if known else ''
    raise errors.SettingsError(f'unknown arguments: {" ".join(words)}{hint}.')
  signature = inspect.signature(known[name])
  try:
    signature.bind(None, *files)
  except TypeError:
    _, *parameters = signature.parameters.values()
    usage = ' '.join(
      p.name.upper() + '...' * (p.kind == p.VAR_POSITIONAL) for p in parameters
    )
    raise errors.SettingsError(
      f'{name} takes {usage or "no files"}, got {len(files)}.'
    ) from None
  for file in files:
    if not os.path.exists(file):
      raise errors.MissingDataError(f'there is no file {file}.')
  return known[name], files
