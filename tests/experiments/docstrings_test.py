"""Every binary says what it is for before anything else."""

import ast
import importlib
import pathlib
import re

import pytest

from experiments.harness.app import flags as flags_lib
from experiments.harness.app import settings as settings_lib
from experiments.harness.study import help as help_lib

EXPERIMENTS = pathlib.Path(__file__).parents[2] / 'experiments'
BINARIES = [
  path
  for path in sorted(EXPERIMENTS.rglob('*.py'))
  if '\nSTUDY = ' in path.read_text(encoding='utf-8')
]


@pytest.mark.parametrize('path', BINARIES, ids=lambda path: path.stem)
def test_starts_with_source_command_number_and_time(path):
  """One line; `Paper:`; the command; `Expected:` with `Time:`."""
  text = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))
  module = '.'.join(path.relative_to(EXPERIMENTS.parent).with_suffix('').parts)
  first, *rest = text.split('\n\n')
  assert first.endswith('.') and '\n' not in first
  claims = path.parent / 'claims.py'
  # A field declares claims without a paper.
  if claims.exists() and '\nPAPER = None' not in claims.read_text('utf-8'):
    assert rest.pop(0).startswith('Paper: ')
  command, expected = rest[:2]
  assert f'python -m {module}' in command
  assert expected.startswith('Expected: ')
  assert re.search(r'Time: .*(second|minute|hour)', expected, re.DOTALL)


@pytest.mark.parametrize('path', BINARIES, ids=lambda path: path.stem)
def test_help_explains_flags_presets_and_names(path):
  """Each flag by a sentence, each other preset by the docstring."""
  module = '.'.join(path.relative_to(EXPERIMENTS.parent).with_suffix('').parts)
  try:
    binary = importlib.import_module(module)
  except ImportError as error:
    pytest.skip(f'an extra is not installed: {error}')
  study = getattr(binary, 'STUDY', None)
  if study is None:
    pytest.skip('it declares no study')
  for preset in set(study.presets) - set(help_lib.PRESETS):
    assert f'`{preset}`' in binary.__doc__ or f'={preset}' in binary.__doc__
  fields = settings_lib.flatten(next(iter(study.presets.values())))
  for name, field in fields.items():
    if name in flags_lib.COMMON:
      continue
    assert len(field.description.split()) > 1, name
    assert not re.match(r'(of|to|with|as|per|from|their) ', field.description)
    for limit in field.limits:
      if isinstance(limit, settings_lib.Among):
        lacking = [n for n in limit.known if not help_lib.meaning(n, limit)]
        assert not lacking, f'{name} knows names without a meaning: {lacking}'
