"""The page of `--help`: what a binary does, and its flags in groups."""

import textwrap

from experiments.harness.app import flags as flags_lib
from experiments.harness.app import settings as settings_lib
from experiments.harness.study import study as study_lib

FLAGS = ('--help', '-h', '-help', '--helpshort', '--helpfull')
_WIDTH, _INDENT = 80, ' ' * 6


def text(docstring: str, study: study_lib.Study, preset: str) -> str:
  """Formats the page.

  Args:
    docstring: docstring of the binary.
    study: the study of the binary.
    preset: preset whose values are shown.
  """
  presets, modes = study.presets, study.modes
  lines = [docstring.strip(), '', 'Flags of every run:']
  lines += _flag('preset', preset, f'Which settings: {", ".join(presets)}.')
  for name, description in flags_lib.COMMON.items():
    if name != 'preset':
      lines += _flag(name, None, description)
  if modes:
    names = ', '.join(('train', *modes))
    lines += ['', f'A mode may stand before the flags: {names}.']
  current = None
  fields = settings_lib.flatten(presets[preset])
  # Fields without a group come first.
  for name, field in sorted(fields.items(), key=lambda item: '.' in item[0]):
    if name in flags_lib.COMMON:
      continue
    group = name.rpartition('.')[0]
    if group != current:
      title = group.capitalize() or 'Settings'
      lines += ['', f'{title}, with values of the preset {preset}:']
      current = group
    kind = settings_lib.kind_name(field.kind)
    for limit in field.limits:
      if isinstance(limit, settings_lib.Among):
        names = ', '.join(limit.known)
        kind = kind.replace('a text', f'one of {names}')
    if field.description:
      kind = f'{field.description} Takes {kind}'
    lines += _flag(name, settings_lib.as_text(field.value), f'{kind}.')
  return '\n'.join(lines) + '\n'


def _flag(name: str, value: str | None, description: str) -> list[str]:
  head = f'  --{name}' + ('' if value is None else f'={value}')
  wrap = textwrap.TextWrapper(
    _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT
  )
  return [head, *wrap.wrap(description[:1].upper() + description[1:])]
