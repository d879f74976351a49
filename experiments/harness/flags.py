"""The flags that every binary has, and what they resolve to.

A binary is a module with presets and a function of `Options`:

    PRESETS = {'quick': Settings(), 'paper': Settings(steps=100_000)}

    if __name__ == '__main__':
      harness.run(main, PRESETS, paper='pbgd', binary='toy')

Flags are defined by `run`, not at import: any number of binaries can be
imported by one process.
"""

import ast
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import app, flags, logging

from experiments.harness import errors

DATA_VARIABLE = 'BILEVEL_JAX_DATA'


class Options(NamedTuple):
  """What the flags of a run say.

  Attributes:
    paper: name of the paper's folder.
    binary: name of the binary.
    preset: name of the preset.
    settings: the preset, a frozen dataclass, with `--set` applied.
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

  Args:
    main: takes the `Options`.
    presets: a frozen dataclass instance by name; the first is the default.
    paper: name of the paper's folder.
    binary: name of the binary.
  """
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
    try:
      main(options)
    except errors.UserError as error:
      sys.exit(f'{paper}/{binary}: {error}')

  app.run(start)


def define(
  presets: Mapping[str, Any],
  *,
  paper: str,
  binary: str,
  values: flags.FlagValues = flags.FLAGS,
) -> None:
  """Defines `--preset`, `--set`, `--workdir`, `--data_dir` and `--seeds`.

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
  fields = ', '.join(_types(next(iter(presets.values()))))
  flags.DEFINE_multi_string(
    'set', [], f'field=value over the preset; fields: {fields}.', **common
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
    ValueError: if a `--set` names no field or has a value of a wrong type.
  """
  overrides = list(values.set)
  settings = override(presets[values.preset], overrides)
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


def override(settings: Any, assignments: Sequence[str]) -> Any:
  """Replaces fields of a dataclass instance.

  Args:
    settings: a dataclass instance with annotated fields.
    assignments: texts `field=value`; a tuple is written 1,2,3.

  Returns:
    A new instance.

  Raises:
    ValueError: if there is no such field, or the value has another type.
  """
  known = _types(settings)
  changes = {}
  for assignment in assignments:
    name, equals, text = assignment.partition('=')
    name = name.strip()
    if not equals:
      raise ValueError(f'--set takes field=value, got {assignment!r}.')
    if name not in known:
      raise ValueError(
        f'--set {assignment}: no field {name!r}; known: {", ".join(known)}.'
      )
    try:
      changes[name] = _parse(text.strip(), known[name])
    except (ValueError, SyntaxError, KeyError):
      expected = known[name]
      expected = getattr(expected, '__name__', None) or str(expected)
      if typing.get_origin(known[name]):
        expected = str(known[name])
      raise ValueError(
        f'--set {assignment}: {name} is of type {expected}.'
      ) from None
  return dataclasses.replace(settings, **changes)


def _types(settings: Any) -> dict[str, Any]:
  hints = typing.get_type_hints(type(settings))
  return {f.name: hints[f.name] for f in dataclasses.fields(settings)}


def _parse(text: str, kind: Any) -> Any:
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    if type(None) in arguments and text == 'None':
      return None
    for choice in arguments:
      try:
        return _parse(text, choice)
      except (ValueError, SyntaxError, KeyError):
        continue
    raise ValueError(text)
  if origin is typing.Literal:
    return {str(choice): choice for choice in arguments}[text]
  if kind is str:
    return text
  if kind is bool:
    return {'true': True, 'false': False}[text.lower()]
  return _convert(ast.literal_eval(text), kind)


def _convert(value: Any, kind: Any) -> Any:
  if kind is Any:
    return value
  if kind is float and type(value) in (int, float):
    return float(value)
  if typing.get_origin(kind) is tuple or kind is tuple:
    value = value if isinstance(value, tuple | list) else (value,)
    arguments = typing.get_args(kind)
    if not arguments:
      return tuple(value)
    if arguments[-1] is ...:
      arguments = arguments[:1] * len(value)
    return tuple(_convert(v, k) for v, k in zip(value, arguments, strict=True))
  if type(value) is kind:
    return value
  raise ValueError(value)
