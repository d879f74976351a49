"""The flags that every binary has, and what they resolve to.

A binary is a module with presets and a function of `Options`:

    PRESETS = {'quick': Settings(), 'paper': Settings(steps=100_000)}

    if __name__ == '__main__':
      harness.run(main, PRESETS, paper='pbgd', binary='toy')

Flags are defined by `run`, not at import: any number of binaries can be
imported by one process.
"""

import dataclasses
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from absl import app, flags, logging

from experiments.harness import (
  compile_cache,
  errors,
  memory,
  processes,
  termination,
)
from experiments.harness import settings as settings_lib

# The folder of data sets in presets other than those that read packaged data.
DATA_VARIABLE = 'BILEVEL_JAX_DATA'


class Options(NamedTuple):
  """What the flags of a run say.

  Attributes:
    paper: name of the paper's folder.
    binary: name of the binary.
    preset: name of the preset.
    settings: the preset, a frozen dataclass, with the flags of its fields
      applied.
    workdir: folder of the run.
    data_dir: folder of data sets, or None for packaged data.
    seeds: the seeds.
    save_seconds: for `train`.
  """

  paper: str
  binary: str
  preset: str
  settings: Any
  workdir: str
  data_dir: str | None
  seeds: tuple[int, ...]
  save_seconds: float = 10.0


def run(
  main: Callable[[Options], Any],
  presets: Mapping[str, Any],
  *,
  paper: str,
  binary: str,
  check: Callable[[Any], None] | None = None,
  modes: Mapping[str, Callable[..., Any]] | None = None,
) -> None:
  """Runs a binary: defines the flags, parses them and calls `main`.

  SIGTERM saves and exits with `termination.EXIT_STATUS`; an error of `errors`
  is shown in one line and exits with 1. SIGUSR1 shows where all threads are.

  Args:
    main: takes the `Options`.
    presets: a frozen dataclass instance by name; the first is the default.
      Their numbers are checked as `settings.check` says.
    paper: name of the paper's folder.
    binary: name of the binary.
    check: takes the settings, before any work, and raises SettingsError for
      values that do not go together.
    modes: what else the binary does, by the word that asks for it: a function
      of the `Options` and of the files named after the word, one for each
      further parameter. The word `train`, or none, calls `main`.
  """
  termination.exit_on_sigterm()
  termination.show_on_sigusr1()
  define(presets, paper=paper, binary=binary)

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
      mode, files = _mode(main, modes, argv[1:])
      options = resolve(presets, paper=paper, binary=binary)
      if check is not None:
        check(options.settings)
      memory.keep_freed()
      if flags.FLAGS.distributed:
        processes.join()
      compile_cache.use(flags.FLAGS.compile_cache)
      mode(options, *files)
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
    try:
      return flags.FLAGS(argv)
    except flags.Error as error:
      leave(f'{error} --help shows all flags.')

  app.run(start, flags_parser=parse)


def _mode(
  main: Callable[[Options], Any],
  modes: Mapping[str, Callable[..., Any]] | None,
  words: Sequence[str],
) -> tuple[Callable[..., Any], list[str]]:
  """What the words of a command line ask for: a function, and its files."""
  if not words:
    return main, []
  known = {'train': main, **modes} if modes else {}
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


# So that they are the flags of the binary: `--help` shows those of no other.
flags.disclaim_key_flags()

_COMMON = (
  'preset',
  'workdir',
  'data_dir',
  'seeds',
  'save_seconds',
  'distributed',
  'compile_cache',
)
# More would not fit into any memory.
_SEEDS = 10**6
# What they read is a part of them, whatever machine they run on.
_PACKAGED = ('smoke', 'quick')


def define(
  presets: Mapping[str, Any],
  *,
  paper: str,
  binary: str,
  values: flags.FlagValues = flags.FLAGS,
) -> None:
  """Defines the common flags, and one for each field of the settings.

  Args:
    presets: a frozen dataclass instance by name; the first is the default.
    paper: name of the paper's folder.
    binary: name of the binary.
    values: where to define the flags.
  """
  common = {'flag_values': values}
  flags.DEFINE_enum(
    'preset', next(iter(presets)), list(presets), 'Which settings.', **common
  )
  flags.DEFINE_string(
    'workdir',
    None,
    'Folder of the run; the same command resumes from it. By default '
    f'runs/{paper}/{binary}/<preset>.',
    **common,
  )
  flags.DEFINE_string(
    'data_dir',
    None,
    f'Folder of data sets. By default what {DATA_VARIABLE} says; the presets '
    f'{" and ".join(_PACKAGED)} read packaged data.',
    **common,
  )
  flags.DEFINE_integer(
    'seeds',
    None,
    'Number of seeds.',
    lower_bound=1,
    upper_bound=_SEEDS,
    **common,
  )
  flags.DEFINE_float(
    'save_seconds',
    10.0,
    'Least time between two checkpoints; 0 saves after each chunk.',
    lower_bound=0,
    **common,
  )
  flags.DEFINE_bool(
    'distributed',
    False,
    'Whether this is one of several processes that run together and share the '
    'workdir; the first writes.',
    **common,
  )
  flags.DEFINE_string(
    'compile_cache',
    None,
    'Folder that keeps compiled programs for later runs; '
    f'{compile_cache.OFF} keeps none. By default what '
    f'{compile_cache.VARIABLE} says, else a folder in ~/.cache.',
    **common,
  )
  first = next(iter(presets.values()))
  words = settings_lib.words_of(first)
  for field, kind in settings_lib.types_of(first).items():
    if field not in _COMMON:
      text = f"Replaces the preset's; {settings_lib.kind_name(kind)}."
      if field in words:
        text = f'{words[field][:1].upper()}{words[field][1:]} {text}'
      flags.DEFINE_string(field, None, text, **common)


def resolve(
  presets: Mapping[str, Any],
  *,
  paper: str,
  binary: str,
  values: flags.FlagValues = flags.FLAGS,
) -> Options:
  """What the parsed flags say; see `define` for the arguments.

  Returns:
    The options. Seeds come from `--seeds`, else from the preset's field
    `seeds` (their number), else there is one.

  Raises:
    SettingsError: if the value of a field's flag is of a wrong type, or out of
      range.
  """
  settings = presets[values.preset]
  given = {
    field: values[field].value
    for field in settings_lib.types_of(settings)
    if field not in _COMMON and values[field].value is not None
  }
  settings = settings_lib.override(settings, given)
  if values.seeds is not None and hasattr(settings, 'seeds'):
    settings = dataclasses.replace(settings, seeds=values.seeds)
  settings_lib.check(settings)
  seeds = values.seeds or getattr(settings, 'seeds', 1)
  data_dir = values.data_dir
  if data_dir is None and values.preset not in _PACKAGED:
    data_dir = os.environ.get(DATA_VARIABLE)
  default = os.path.join('runs', paper, binary, values.preset)
  return Options(
    paper=paper,
    binary=binary,
    preset=values.preset,
    settings=settings,
    workdir=values.workdir or default,
    data_dir=data_dir or None,
    seeds=tuple(range(seeds)),
    save_seconds=values.save_seconds,
  )
