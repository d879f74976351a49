"""The page of `--help`: what a binary does, and its flags in groups.

Presets are described by their differences and by the time of stored runs,
names of methods by their meanings or the docstrings of the library.
"""

import json
import pathlib
import re
import textwrap
from collections.abc import Mapping
from typing import Any

import bilevel_jax as bj
from experiments.harness.app import flags as flags_lib
from experiments.harness.app import settings as settings_lib
from experiments.harness.study import declared
from experiments.harness.study import study as study_lib

FLAGS = ('--help', '-h', '-help', '--helpshort', '--helpfull')
# Other presets are described in the docstring of their binary.
PRESETS = {
  'quick': 'shows the result; its time is above.',
  'smoke': 'small sizes, about a minute: shows that it runs, not a result.',
  'paper': 'the published sizes; where there are none, more seeds and steps.',
  'user': 'sizes for your own files.',
}
_WIDTH, _INDENT = 80, ' ' * 6
_MAX_DIFFERENCES = 6


def text(
  docstring: str,
  study: study_lib.Study,
  preset: str,
  root: pathlib.Path = declared.ROOT,
) -> str:
  """Formats the page.

  Args:
    docstring: docstring of the binary.
    study: the study of the binary.
    preset: preset whose values are shown.
    root: root of the repository, with stored results.
  """
  presets, modes = study.presets, study.modes
  lines = [docstring.strip(), '', 'Flags of every run:']
  lines += _flag('preset', preset, 'Which settings:')
  for name in presets:
    lines += _item(name, describe_preset(study, name, root))
  for name, description in flags_lib.COMMON.items():
    if name != 'preset':
      lines += _flag(name, None, description)
  if modes:
    names = ', '.join(('train', *modes))
    lines += ['', f'A mode may stand before the flags: {names}.']
  current, listed = None, set()
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
    lines += _describe_field(name, field, listed)
  return '\n'.join(lines) + '\n'


def _describe_field(
  name: str, field: settings_lib.Field, listed: set[str]
) -> list[str]:
  """Formats a flag; names that are not in `listed` yet get their meanings."""
  kind, items = settings_lib.kind_name(field.kind), []
  for limit in field.limits:
    if isinstance(limit, settings_lib.Among):
      known = list(limit.known)
      names = ', '.join(known)
      meanings = {name: meaning(name, limit) for name in known}
      if any(meanings.values()) and not listed.issuperset(known):
        names = 'these:'
        items = [line for pair in meanings.items() for line in _item(*pair)]
        listed.update(known)
      kind = kind.replace('a text', f'one of {names}')
  if field.description:
    kind = f'{field.description} Takes {kind}'
  value = settings_lib.as_text(field.value)
  return _flag(name, value, f'{kind.removesuffix(":")}.') + items


def meaning(name: str, among: settings_lib.Among) -> str:
  """Returns the meaning of an allowed name, '' if unknown.

  Args:
    name: the name.
    among: the allowed names. If neither its meanings nor its titles explain the
      name, the first line of the library's docstring does.
  """
  if name in among.meanings:
    return among.meanings[name]
  title = among.known[name] if isinstance(among.known, Mapping) else ''
  if isinstance(title, str) and title and _letters(title) != _letters(name):
    return title
  for package in (bj.solvers, bj.aggregators):
    if name in package.__all__:
      return getattr(package, name).__doc__.strip().splitlines()[0]
  return ''


def _letters(name: str) -> str:
  return re.sub(r'\W|_', '', name.lower())


def describe_preset(
  study: study_lib.Study, name: str, root: pathlib.Path = declared.ROOT
) -> str:
  """Describes a preset: its use, its differences to the first, its time.

  Args:
    study: the study of the binary.
    name: name of the preset.
    root: root of the repository, with stored results.
  """
  first, *_ = study.presets
  of = lambda preset: settings_lib.flatten(study.presets[preset])
  before = {field: x.value for field, x in of(first).items()}
  changed = [
    _setting(field, x.value)
    for field, x in of(name).items()
    if x.value != before[field]
  ]
  more = len(changed) - _MAX_DIFFERENCES
  sentences = [PRESETS.get(name, 'see above.')]
  if changed:
    end = f' and {more} more' if more > 0 else ''
    sentences.append(f'Sets {", ".join(changed[:_MAX_DIFFERENCES])}{end}.')
  elif name != first:
    sentences.append(f'The settings of {first}.')
  if minutes := _stored_minutes(study, name, root):
    low, high = (_duration(end(minutes)) for end in (min, max))
    took = low if low == high else f'{low} to {high}'
    sentences.append(f'Stored runs took {took}.')
  return ' '.join(sentences)


def _setting(field: str, value: Any) -> str:
  """Formats a setting; a long list by its number of entries."""
  text = f'{field}={settings_lib.as_text(value)}'
  return text if len(text) < _WIDTH // 2 else f'{len(value)} {field}'


def _stored_minutes(
  study: study_lib.Study, preset: str, root: pathlib.Path
) -> list[float]:
  """Returns the wall times of the stored runs of a preset."""
  about = {'binary': study.binary, 'preset': preset}
  minutes = []
  folder = root / 'experiments' / study.paper / 'results'
  for path in sorted(folder.glob('*.json')):
    results: dict[str, Any] = json.loads(path.read_text(encoding='utf-8'))
    if {name: results.get(name) for name in about} == about:
      minutes.append(results['wall_seconds'] / 60)
  return minutes


def _duration(minutes: float) -> str:
  if minutes < 2:
    return f'{60 * minutes:.0f} s'
  return f'{minutes:.0f} min' if minutes < 120 else f'{minutes / 60:.0f} h'


def _flag(name: str, value: str | None, description: str) -> list[str]:
  """Formats a flag; its description starts in upper case, unless by a name."""
  head = f'  --{name}' + ('' if value is None else f'={value}')
  wrap = textwrap.TextWrapper(
    _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT
  )
  first = description.split(' ', 1)[0].strip(',.;:')
  if re.fullmatch('[a-z]+(-[a-z]+)*', first) and f'one of {first},' not in (
    description
  ):
    description = description[:1].upper() + description[1:]
  return [head, *wrap.wrap(description)]


def _item(name: str, description: str) -> list[str]:
  """Formats an entry of a list of names."""
  wrap = textwrap.TextWrapper(
    _WIDTH,
    initial_indent=_INDENT + '  ',
    subsequent_indent=_INDENT + '    ',
    break_long_words=False,
    break_on_hyphens=False,
  )
  return wrap.wrap(f'{name}: {description}' if description else name)
