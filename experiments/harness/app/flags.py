"""The flags of every binary, and the options that they resolve to.

`define` defines the flags, not the import: one process can import several
binaries.
"""

import dataclasses
import functools
import math
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments.harness.app import compile_cache, errors, processes
from experiments.harness.app import settings as settings_lib

# Environment variable with the folder of data sets.
DATA_VARIABLE = 'BILEVEL_JAX_DATA'


class Options(NamedTuple):
  """The options of a run, from its flags.

  Attributes:
    paper: name of the paper's folder.
    binary: name of the binary.
    preset: name of the preset.
    settings: the settings of the preset, a frozen dataclass, with flags
      applied.
    workdir: folder of the run.
    data_dir: folder of data sets, or None for packaged data.
    seeds: the seeds.
    save_seconds: see `Training`.
  """

  paper: str
  binary: str
  preset: str
  settings: Any
  workdir: str
  data_dir: str | None
  seeds: tuple[int, ...]
  save_seconds: float = 10.0


# Help texts of the flags of every binary.
COMMON = {
  'preset': 'Name of the settings.',
  'workdir': 'Folder of the run; the same command resumes it. Default: '
  'runs/<paper>/<binary>/<preset>.',
  'data_dir': 'Folder of data sets. Default: the environment variable '
  f'{DATA_VARIABLE}; the presets smoke and quick read packaged data.',
  'seeds': 'Number of seeds.',
  'save_seconds': 'Minimum seconds between two checkpoints; 0 saves after each '
  'chunk.',
  'distributed': 'Whether this is one of several processes that share the run '
  'and the workdir; the first one writes.',
  'heartbeat_timeout': 'Seconds without a sign of life after which one of '
  'several processes counts as lost.',
  'compile_cache': 'Folder of compiled programs, reused by later runs; '
  f'{compile_cache.OFF} for none. Default: the environment variable '
  f'{compile_cache.VARIABLE}, else a folder in ~/.cache.',
}
_MAX_SEEDS = 10**6
# Presets that read packaged data, so that they give the same on any machine.
_PACKAGED = ('smoke', 'quick')


def define(
  presets: Mapping[str, Any],
  *,
  renamed: Mapping[str, str] = types.MappingProxyType({}),
  values: flags.FlagValues = flags.FLAGS,
) -> None:
  """Defines the common flags, and one for each field of the settings.

  Args:
    presets: frozen dataclass instances by name; the first is the default.
    renamed: current names of fields by former names, which remain flags.
    values: where to define the flags.
  """
  text = functools.partial(flags.DEFINE_string, flag_values=values)
  names = list(presets)
  flags.DEFINE_enum(
    'preset', names[0], names, COMMON['preset'], flag_values=values
  )
  bounds = {'lower_bound': 1, 'upper_bound': _MAX_SEEDS}
  flags.DEFINE_integer(
    'seeds', None, COMMON['seeds'], flag_values=values, **bounds
  )
  seconds = 'save_seconds', 10.0, COMMON['save_seconds']
  flags.DEFINE_float(*seconds, lower_bound=0, flag_values=values)
  distributed = 'distributed', False, COMMON['distributed']
  flags.DEFINE_bool(*distributed, flag_values=values)
  timeout = 'heartbeat_timeout', processes.HEARTBEAT_TIMEOUT
  flags.DEFINE_integer(
    *timeout, COMMON[timeout[0]], lower_bound=1, flag_values=values
  )
  for name in ('workdir', 'data_dir', 'compile_cache'):
    text(name, None, COMMON[name])
  for name, field in _fields(presets).items():
    text(name, None, field.description)
  for other, name in _aliases(presets, renamed).items():
    text(other, None, f'Another name of --{name}.')


def shared_values(
  presets: Mapping[str, Any],
  *,
  renamed: Mapping[str, str] = types.MappingProxyType({}),
  values: flags.FlagValues = flags.FLAGS,
) -> dict[str, Any]:
  """Returns parsed flags that all processes of a run share; see `define`.

  Folders of data and of compiled programs may differ.

  Returns:
    Values by flag, `--name`.
  """
  own = ('data_dir', 'compile_cache')
  names = (*COMMON, *_fields(presets), *_aliases(presets, renamed))
  return {f'--{name}': values[name].value for name in names if name not in own}


def _aliases(
  presets: Mapping[str, Any], renamed: Mapping[str, str]
) -> dict[str, str]:
  """Former names, and unique short names such as `steps` for `grid.steps`."""
  fields = _fields(presets)
  by_last: dict[str, list[str]] = {}
  for name in fields:
    group, _, last = name.rpartition('.')
    if group and last not in (*fields, *COMMON):
      by_last.setdefault(last, []).append(name)
  short = {last: names[0] for last, names in by_last.items() if not names[1:]}
  return short | dict(renamed)


def renamed_flags(
  renamed: Mapping[str, str], values: flags.FlagValues = flags.FLAGS
) -> list[str]:
  """Returns a sentence for each former flag in use, with its current name.

  Args:
    renamed: see `define`.
    values: the parsed flags.
  """
  return [
    f'--{former} is now --{name}; the former name will be removed.'
    for former, name in renamed.items()
    if values[former].present
  ]


def _fields(presets: Mapping[str, Any]) -> dict[str, settings_lib.Field]:
  fields = settings_lib.flatten(next(iter(presets.values())))
  return {name: x for name, x in fields.items() if name not in COMMON}


def settings_by(
  presets: Mapping[str, Any],
  preset: str,
  texts: Sequence[str],
  renamed: Mapping[str, str] = types.MappingProxyType({}),
) -> Any:
  """Returns the settings of a preset with flags applied.

  Args:
    presets: frozen dataclass instances by name.
    preset: name of the preset.
    texts: flags of its fields, such as '--steps=10'.
    renamed: see `define`.

  Returns:
    The settings.
  """
  values = flags.FlagValues()
  define(presets, renamed=renamed, values=values)
  values(['', f'--preset={preset}', *texts])
  names = {'paper': '', 'binary': ''}
  return resolve(presets, renamed=renamed, values=values, **names).settings


def resolve(
  presets: Mapping[str, Any],
  *,
  paper: str,
  binary: str,
  renamed: Mapping[str, str] = types.MappingProxyType({}),
  values: flags.FlagValues = flags.FLAGS,
) -> Options:
  """Returns the options from parsed flags; see `define` for the arguments.

  Returns:
    The options. The number of seeds is `--seeds`, else the preset's field
    `seeds`, else 1.

  Raises:
    SettingsError: if the value of a field's flag has a wrong type or is out of
      range.
  """
  settings = presets[values.preset]
  texts = {}
  names = {name: name for name in _fields(presets)}
  for flag, name in (names | _aliases(presets, renamed)).items():
    if values[flag].value is None:
      continue
    if name in texts:
      raise errors.SettingsError(f'--{flag} and --{name} are the same flag.')
    texts[name] = values[flag].value
  settings = settings_lib.override(settings, texts)
  if values.seeds is not None and hasattr(settings, 'seeds'):
    settings = dataclasses.replace(settings, seeds=values.seeds)
  settings_lib.check(settings)
  if not math.isfinite(values.save_seconds):
    raise errors.SettingsError(
      f'--save_seconds={values.save_seconds}: save_seconds must be finite.'
    )
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
