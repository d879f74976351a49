"""What `--help` shows: what a binary is for, and its flags in groups."""

import textwrap

from experiments.harness.app import flags as flags_lib
from experiments.harness.app import settings as settings_lib
from experiments.harness.study import study as study_lib

FLAGS = ('--help', '-h', '-help', '--helpshort', '--helpfull')
_WIDTH = 80


def text(about: str, study: study_lib.Study, preset: str) -> str:
  """The page.

  Args:
    about: the docstring of the binary.
    study: what the binary is.
    preset: whose values are shown.
  """
  presets, modes = study.presets, study.modes
  lines = [about.strip(), '', 'Flags of every run:']
  lines += _flag('preset', preset, f'Which settings: {", ".join(presets)}.')
  for name, words in flags_lib.COMMON.items():
    if name != 'preset':
      lines += _flag(name, None, words)
  if modes:
    words = ', '.join(('train', *modes))
    lines += ['', f'A word before the flags says what to do: {words}.']
  group = None
  fields = settings_lib.fields_of(presets[preset])
  # What is in no group stands before the groups, also that of a subclass.
  for name, field in sorted(fields.items(), key=lambda item: '.' in item[0]):
    if name in flags_lib.COMMON:
      continue
    of = name.rpartition('.')[0]
    if of != group:
      title = f'{of.capitalize()}' if of else 'Settings'
      lines += ['', f'{title}, as of the preset {preset}:']
      group = of
    kind = settings_lib.kind_name(field.kind)
    for note in field.notes:
      if isinstance(note, settings_lib.Among):
        words = ', '.join(note.known)
        kind = kind.replace('a value of type str', f'one of {words}')
    words = f'{field.words} Takes {kind}.' if field.words else f'{kind}.'
    lines += _flag(name, settings_lib.text_of(field.value), words)
  return '\n'.join(lines) + '\n'


def _flag(name: str, value: str | None, words: str) -> list[str]:
  head = f'  --{name}' + ('' if value is None else f'={value}')
  words = f'{words[:1].upper()}{words[1:]}'
  indent = ' ' * 6
  wrap = textwrap.TextWrapper(
    _WIDTH, initial_indent=indent, subsequent_indent=indent
  )
  return [head, *wrap.wrap(words)]
