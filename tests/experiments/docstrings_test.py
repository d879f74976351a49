"""Every binary says what it is for before anything else."""

import ast
import pathlib
import re

import pytest

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
  if (path.parent / 'claims.py').exists():
    assert rest.pop(0).startswith('Paper: ')
  command, expected = rest[:2]
  assert f'python -m {module}' in command
  assert expected.startswith('Expected: ')
  assert re.search(r'Time: .*(second|minute|hour)', expected, re.DOTALL)
