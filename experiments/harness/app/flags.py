"""The flags that every binary has, and what they resolve to.

Flags are defined by `define`, not at import: any number of binaries can be
imported by one process.
"""

import dataclasses
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments.harness.app import compile_cache, errors
from experiments.harness.app import settings as settings_lib

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


# The flags of every binary, in words.
COMMON = {
  'preset': 'Which settings.',
  'workdir': 'Folder of the run; the same command resumes from it. By default '
  'runs/<paper>/<binary>/<preset>.',
  'data_dir': 'Folder of data sets. By default what the environment variable '
  f'{DATA_VARIABLE} says; the presets smoke and quick read packaged data.',
  'seeds': 'Number of seeds.',
  'save_seconds': 'Least time between two checkpoints; 0 saves after each '
  'chunk.',
  'distributed': 'Whether this is one of several processes that run together '
  'and share the workdir; the first writes.',
  'compile_cache': 'Folder that keeps compiled programs for later runs; '
  f'{compile_cache.OFF} keeps none. By default what the environment variable '
  f'{compile_cache.VARIABLE} says, else a folder in ~/.cache.',
}
# More would not fit into any memory.
_SEEDS = 10**6
# What they read is a part of them, whatever machine they run on.
_PACKAGED = ('smoke', 'quick')


def define(
  presets: Mapping[str, Any],
  *,
  renamed: Mapping[str, str] = types.MappingProxyType({}),
  values: flags.FlagValues = flags.FLAGS,
) -> None:
  """Defines the common flags, and one for each field of the settings.

  Args:
    presets: a frozen dataclass instance by name; the first is the default.
    renamed: names of fields by former names, which are flags too.
    values: where to define the flags.
  """
  common = {'flag_values': values}
  flags.DEFINE_enum(
    'preset', next(iter(presets)), list(presets), COMMON['preset'], **common
  )
  flags.DEFINE_integer(
    'seeds',
    None,
    COMMON['seeds'],
    lower_bound=1,
    upper_bound=_SEEDS,
    **common,
  )
  flags.DEFINE_float(
    'save_seconds', 10.0, COMMON['save_seconds'], lower_bound=0, **common
  )
  flags.DEFINE_bool('distributed', False, COMMON['distributed'], **common)
  for name in ('workdir', 'data_dir', 'compile_cache'):
    flags.DEFINE_string(name, None, COMMON[name], **common)
  for name, field in _fields(presets).items():
    flags.DEFINE_string(name, None, field.words, **common)
  for other, name in _other_names(presets, renamed).items():
    flags.DEFINE_string(
      other, None, f'{name}, as that is called now.', **common
    )


def _other_names(
  presets: Mapping[str, Any], renamed: Mapping[str, str]
) -> dict[str, str]:
  """Former names of fields, and last parts of names that one field has."""
  fields = _fields(presets)
  found: dict[str, list[str]] = {}
  for name in fields:
    group, _, last = name.rpartition('.')
    if group and last not in (*fields, *COMMON):
      found.setdefault(last, []).append(name)
  short = {last: names[0] for last, names in found.items() if len(names) == 1}
  return short | dict(renamed)


def _fields(presets: Mapping[str, Any]) -> dict[str, settings_lib.Field]:
  fields = settings_lib.fields_of(next(iter(presets.values())))
  return {name: x for name, x in fields.items() if name not in COMMON}


def settings_by(
  presets: Mapping[str, Any],
  preset: str,
  texts: Sequence[str],
  renamed: Mapping[str, str] = types.MappingProxyType({}),
) -> Any:
  """The settings of a preset with flags applied.

  Args:
    presets: a frozen dataclass instance by name.
    preset: which of them.
    texts: flags of its fields, such as '--steps=10'.
    renamed: see `define`.

  Returns:
    The settings.
  """
  values = flags.FlagValues()
  about: dict[str, Any] = {'renamed': renamed, 'values': values}
  define(presets, **about)
  values(['', f'--preset={preset}', *texts])
  return resolve(presets, paper='', binary='', **about).settings


def resolve(
  presets: Mapping[str, Any],
  *,
  paper: str,
  binary: str,
  renamed: Mapping[str, str] = types.MappingProxyType({}),
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
  given = {}
  names = {name: name for name in _fields(presets)}
  for flag, name in (names | _other_names(presets, renamed)).items():
    if values[flag].value is None:
      continue
    if name in given:
      raise errors.SettingsError(f'--{flag} and --{name} are the same flag.')
    given[name] = values[flag].value
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
