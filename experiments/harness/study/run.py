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

import bilevel_jax
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
from experiments.harness.store import identity
from experiments.harness.study import help as help_lib
from experiments.harness.study import report
from experiments.harness.study import study as study_lib

_TIMES = 'seconds.json'
_EXPERIMENTS = pathlib.Path(__file__).parents[2]


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

  def leave_others(message: str) -> None:
    timeout = flags.FLAGS['heartbeat_timeout'].value
    processes.leave_if_joined(message, timeout)

  def leave(reason: str) -> NoReturn:
    # One line, also if the name of a file has line breaks.
    message = f'{paper}/{binary}: {" ".join(reason.split())}'
    leave_others(message)
    sys.exit(message)

  def start(argv: Sequence[str]) -> None:
    if not flags.FLAGS['verbosity'].present:
      # jax and orbax log a lot.
      logging.set_verbosity(logging.WARNING)
    for sentence in flags_lib.renamed_flags(study.renamed):
      print(f'{paper}/{binary}: {sentence}', file=sys.stderr)
    try:
      memory.keep_freed()
      if flags.FLAGS.distributed:
        # First: a check of settings may start XLA, as an import of gymnax does.
        processes.join(flags.FLAGS.heartbeat_timeout)
      compile_cache.use(flags.FLAGS.compile_cache)
      if flags.FLAGS.distributed:
        values = flags_lib.shared_values(study.presets, renamed=study.renamed)
        processes.compare('flags', {'the mode': argv[1:]} | values)
        processes.compare('code', _describe_code(study))
      mode, files = _mode(study, argv[1:])
      options = flags_lib.resolve(
        study.presets, paper=paper, binary=binary, renamed=study.renamed
      )
      if study.check is not None:
        study.check(options.settings)
      if mode is study.main:
        files_lib.check_writable(options.workdir)
      execute(mode, options, *files)
    except errors.UserError as error:
      leave(str(error))
    except Exception as error:
      if memory.is_exceeded(error):
        reason = str(error) or type(error).__name__
        leave(f'out of memory ({reason[:300]}): choose smaller sizes.')
      leave_others(traceback.format_exc())
      raise
    finally:
      termination.ignore()

  def parse(argv: Sequence[str]) -> list[str]:
    words = [word for word in argv if word not in help_lib.FLAGS]
    try:
      rest = flags.FLAGS(words)
    except flags.Error as error:
      leave(f'{str(error).rstrip(".")}. --help shows all flags.')
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


def _describe_code(study: study_lib.Study) -> dict[str, str]:
  """Returns versions, and digests of the sources of a study."""
  paths = [pathlib.Path(bilevel_jax.__file__).parent, _EXPERIMENTS]
  own = study.main.__globals__.get('__file__')
  if own is not None and not pathlib.Path(own).is_relative_to(_EXPERIMENTS):
    paths.append(pathlib.Path(own))
  digests = {f'code {x.name}': identity.digest_sources(x) for x in paths}
  return report.versions() | digests


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
  known = {'train': study.main, **study.modes} if study.modes else {}
  needed = inspect.signature(study.main).parameters.values()
  if sum(p.default is p.empty for p in needed) > 1:
    known, words = {study.binary: study.main}, [study.binary, *words]
  if not words:
    return study.main, []
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
