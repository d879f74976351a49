"""The flags that every binary has, and what they resolve to.

A binary is a module with presets and a function of `Options`:

    PRESETS = {'quick': Settings(), 'paper': Settings(steps=100_000)}

    if __name__ == '__main__':
      harness.run(main, PRESETS, paper='pbgd', binary='toy')

Flags are defined by `run`, not at import: any number of binaries can be
imported by one process.
"""

import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging

from experiments.harness import errors, memory, termination

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
    data_dir: folder of data sets, or None.
    seeds: the seeds.
  """

  paper: str
  binary: str
  preset: str
  settings: Any
  workdir: str
  data_dir: str | None
  seeds: tuple[int, ...]


def run(
  main: Callable[[Options], Any],
  presets: Mapping[str, Any],
  *,
  paper: str,
  binary: str,
) -> None:
  """Runs a binary: defines the flags, parses them and calls `main`.

  SIGTERM saves and exits with `termination.EXIT_STATUS`; an error of `errors`
  is shown in one line and exits with 1.

  Args:
    main: takes the `Options`.
    presets: a frozen dataclass instance by name; the first is the default.
    paper: name of the paper's folder.
    binary: name of the binary.
  """
  termination.exit_on_sigterm()
  define(presets, paper=paper, binary=binary)

  def start(argv: Sequence[str]) -> None:
    if not flags.FLAGS['verbosity'].present:
      # jax and orbax inform at length about what they do.
      logging.set_verbosity(logging.WARNING)
    if argv[1:]:
      raise app.UsageError(f'unknown arguments: {" ".join(argv[1:])}')
    try:
      options = resolve(presets, paper=paper, binary=binary)
    except ValueError as error:
      raise app.UsageError(str(error)) from error
    memory.keep_freed()
    try:
      if flags.FLAGS.distributed:
        join_processes()
      main(options)
    except errors.UserError as error:
      sys.exit(f'{paper}/{binary}: {error}')
    finally:
      termination.ignore()

  app.run(start)


def join_processes(environment: Mapping[str, str] = os.environ) -> None:
  """Joins this process to the others of the run, for one mesh of all devices.

  SLURM, Open MPI and Kubernetes are detected by jax. Elsewhere each process
  is told by JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES
  and JAX_PROCESS_ID.

  Args:
    environment: environment variables.

  Raises:
    SettingsError: if jax cannot tell which processes there are.
  """
  given = {
    name: int(environment[variable])
    for name, variable in (
      ('num_processes', 'JAX_NUM_PROCESSES'),
      ('process_id', 'JAX_PROCESS_ID'),
    )
    if variable in environment
  }
  # Processors talk to each other by gloo; accelerators have their own way.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(**given)
  except ValueError as error:
    raise errors.SettingsError(
      f'--distributed found no other processes ({error}). Start it by SLURM, '
      'Open MPI or Kubernetes, or set JAX_COORDINATOR_ADDRESS, '
      'JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process.'
    ) from error


_COMMON = ('preset', 'workdir', 'data_dir', 'seeds', 'distributed')


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
    os.environ.get(DATA_VARIABLE) or None,
    f'Folder of data sets; by default what {DATA_VARIABLE} says.',
    **common,
  )
  flags.DEFINE_integer(
    'seeds', None, 'Number of seeds.', lower_bound=1, **common
  )
  flags.DEFINE_bool(
    'distributed',
    False,
    'Whether this is one of several processes that run together and share the '
    'workdir; the first writes.',
    **common,
  )
  for field, kind in _types(next(iter(presets.values()))).items():
    if field not in _COMMON:
      text = f"Replaces the preset's; {_kind_name(kind)}."
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
    ValueError: if the value of a field's flag is of a wrong type.
  """
  settings = presets[values.preset]
  given = {
    field: values[field].value
    for field in _types(settings)
    if field not in _COMMON and values[field].value is not None
  }
  settings = override(settings, given)
  if values.seeds is not None and hasattr(settings, 'seeds'):
    settings = dataclasses.replace(settings, seeds=values.seeds)
  seeds = values.seeds or getattr(settings, 'seeds', 1)
  default = os.path.join('runs', paper, binary, values.preset)
  return Options(
    paper=paper,
    binary=binary,
    preset=values.preset,
    settings=settings,
    workdir=values.workdir or default,
    data_dir=values.data_dir,
    seeds=tuple(range(seeds)),
  )


def override(settings: Any, texts: Mapping[str, str]) -> Any:
  """Replaces fields of a dataclass instance.

  Args:
    settings: a dataclass instance with annotated fields.
    texts: values by field, as texts; a tuple is written 1,2,3.

  Returns:
    A new instance.

  Raises:
    ValueError: if a value is not of its field's type.
  """
  known = _types(settings)
  changes = {}
  for name, text in texts.items():
    try:
      changes[name] = _parse(text.strip(), known[name])
    except (ValueError, KeyError):
      raise ValueError(
        f'--{name}={text}: {name} takes {_kind_name(known[name])}.'
      ) from None
  return dataclasses.replace(settings, **changes)


def _types(settings: Any) -> dict[str, Any]:
  hints = typing.get_type_hints(type(settings))
  return {f.name: hints[f.name] for f in dataclasses.fields(settings)}


def _kind_name(kind: Any) -> str:
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple:
    return f'a list, commas between, each {_kind_name(arguments[0])}'
  if origin is typing.Literal:
    return f'one of {", ".join(map(str, arguments))}'
  if origin in (typing.Union, types.UnionType):
    return ' or '.join(
      'None' if choice is type(None) else _kind_name(choice)
      for choice in arguments
    )
  return f'a value of type {kind.__name__}'


def _parse(text: str, kind: Any) -> Any:
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    for choice in sorted(arguments, key=lambda a: a is str):
      try:
        return _parse(text, choice)
      except (ValueError, KeyError):
        continue
    raise ValueError(text)
  if origin is typing.Literal:
    return {str(choice): choice for choice in arguments}[text]
  if origin is tuple:
    pieces = [piece.strip() for piece in text.split(',')] if text else []
    return tuple(_parse(piece, arguments[0]) for piece in pieces)
  if kind is type(None):
    return {'None': None}[text]
  if kind is bool:
    return {'true': True, 'false': False}[text.lower()]
  return kind(text.replace('_', '') if kind is int else text)
