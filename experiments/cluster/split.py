r"""Splits a comparison into jobs, and merges them by the same command.

    python -m experiments.cluster.split --over=methods --jobs=4 -- \
      python -m experiments.stsa.bilevel_zoo --preset=quick --workdir=runs/zoo

Each value of the list `methods` is a job: the same program with this value
only, in the same workdir. Then the given command runs as it is. It finds the
runs of the jobs in the workdir, trains what is missing, and writes the report.
So the report is that of one process, also if a job failed; the same command
resumes.

`--over` may name any list in the settings whose values have runs of their own,
such as methods or problems. Points of a grid and seeds are members of one
compiled run: they are no jobs. `--engine=slurm` or `--engine=ray` makes the
jobs on machines that share the workdir, see docs/scale.md. Logs are in the
subfolder `jobs` of the workdir.
"""

import argparse
import functools
import importlib
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import absl.flags

from experiments.harness.app import errors, flags, termination
from experiments.harness.store import files
from experiments.harness.study import command as command_lib
from experiments.harness.study import declared, jobs


def resolve(module: str, words: Sequence[str]) -> flags.Options:
  """Returns the options of a program.

  Args:
    module: the program, such as experiments.stsa.bilevel_zoo.
    words: its flags.

  Returns:
    The options.

  Raises:
    SettingsError: if there is no such program, or it refuses a flag.
  """
  try:
    study = importlib.import_module(module).STUDY
  except (ImportError, AttributeError) as error:
    raise errors.SettingsError(
      f'{module} is no program with a `STUDY` ({error}): give one such as '
      'experiments.stsa.bilevel_zoo.'
    ) from error
  values = absl.flags.FlagValues()
  flags.define(study.presets, renamed=study.renamed, values=values)
  try:
    values(['', *words])
  except absl.flags.Error as error:
    raise errors.SettingsError(f'{module}: {error}') from error
  return flags.resolve(
    study.presets,
    paper=study.paper,
    binary=study.binary,
    renamed=study.renamed,
    values=values,
  )


def list_values(settings: Any, over: str) -> tuple[Any, ...]:
  """Returns the values of a list in settings, given as `list` or `group.list`.

  Raises:
    SettingsError: if there is no such list, or it is empty.
  """
  values = settings
  for name in over.split('.'):
    values = getattr(values, name, None)
  if not isinstance(values, tuple) or not values:
    raise errors.SettingsError(
      f'--over={over}: the program has no such list in its settings, or it is '
      'empty; its --help shows all.'
    )
  return values


def _run(item: tuple[str, tuple[str, ...]], *, folder: str) -> str:
  """Runs a part; returns the reason of a failure, or ''."""
  name, words = item
  log = pathlib.Path(folder) / f'{name.replace("/", "_")}.txt'
  return command_lib.run_logged([sys.executable, *words], log)


def split(module: str, words: Sequence[str], over: str, plan: jobs.Plan) -> int:
  """Runs a program in parts, and then as it is.

  Args:
    module: the program.
    words: its flags.
    over: the list whose values are the parts.
    plan: engine and number of jobs.

  Returns:
    The exit status of the last command.

  Raises:
    SettingsError: as `resolve` and `list_values`.
  """
  options = resolve(module, words)
  # Other machines may start in another folder.
  workdir = os.path.abspath(options.workdir)
  command = ['-m', module, *words, f'--workdir={workdir}']
  folder = str(files.make_folder(pathlib.Path(workdir) / 'jobs'))
  items = [
    (f'{over}={value}', (*command, f'--{over}={value}'))
    for value in list_values(options.settings, over)
  ]
  calls = jobs.run(
    functools.partial(_run, folder=folder),
    items,
    plan._replace(folder=folder),
    stop=command_lib.end_running,
  )
  for i, ((name, _), job) in enumerate(calls, 1):
    try:
      failure = job.result()
    except errors.UserError:
      raise
    except Exception as error:
      failure = jobs.describe(error)
    print(f'{i}/{len(items)} {name}: {failure or "done"}', flush=True)
  print(f'python {shlex.join(command)}', flush=True)
  return subprocess.call([sys.executable, *command], cwd=declared.ROOT)


def main(argv: Sequence[str] | None = None) -> int:
  """Parses the flags and runs the program in parts."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.cluster.split',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--over', default='methods', help='the list')
  parser.add_argument('--engine', default='local', choices=jobs.ENGINES)
  parser.add_argument('--jobs', type=int, default=1, help='jobs at once')
  parser.add_argument('--engine_options', default='', metavar='NAME=VALUE,...')
  parser.add_argument('command', nargs='+', help='the command, after --')
  args = parser.parse_args(argv)
  termination.exit_on_sigterm(unwind=True)
  words = args.command[1:] if args.command[0] == 'python' else args.command
  if words[0] != '-m' or len(words) < 2:
    parser.error('give a command such as `-- python -m PROGRAM --workdir=W`')
  if args.jobs < 1:
    parser.error(f'--jobs must be at least 1, got {args.jobs}')
  try:
    options = jobs.parse_options(filter(None, args.engine_options.split(',')))
    plan = jobs.Plan(args.engine, args.jobs, options)
    return split(words[1], words[2:], args.over, plan)
  except errors.UserError as error:
    parser.error(str(error))


if __name__ == '__main__':
  sys.exit(main())
