"""The flags that every binary has, and what they resolve to.

Flags are defined by `define`, not at import: any number of binaries can be
imported by one process.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

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


# So that they are the flags of the binary: `--help` shows those of no other.
flags.disclaim_key_flags()

_COMMON = (
  'preset',
  'workdir',
  'data_dir',
  'seeds',
  'save_seconds',
  'distributed',
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
  first = next(iter(presets.values()))
  words = settings_lib.words_of(first)
  for field, kind in settings_lib.types_of(first).items():
    if field not in _COMMON:
      text = f"Replaces the preset's; {settings_lib.kind_name(kind)}."
      if field in words:
        text = f'{words[field][:1].upper()}{words[field][1:]} {text}'
      flags.DEFINE_string(field, None, text, **common)


def settings_by(
  presets: Mapping[str, Any], preset: str, texts: Sequence[str]
) -> Any:
  """The settings of a preset with flags applied.

  Args:
    presets: a frozen dataclass instance by name.
    preset: which of them.
    texts: flags of its fields, such as '--steps=10'.

  Returns:
    The settings.
  """
  values = flags.FlagValues()
  about = {'paper': '', 'binary': '', 'values': values}
  define(presets, **about)
  values(['', f'--preset={preset}', *texts])
  return resolve(presets, **about).settings


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
