"""Commands that documents and docstrings state are understood."""

import pathlib
import re
import runpy
import shlex
import sys

import pytest
from absl import flags

from experiments import harness
from experiments.harness.app import flags as flags_lib

ROOT = pathlib.Path(harness.__file__).parents[2]
COMMAND = re.compile(r'python -m (experiments\.[\w.]+)([^`#)\n]*)')


def commands() -> dict[str, set[str]]:
  """The arguments of all commands, by module."""
  places = [*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md')]
  places += [*ROOT.glob('experiments/**/*.md')]
  places += [*ROOT.glob('experiments/**/*.py'), *ROOT.glob('colabs/*.ipynb')]
  found: dict[str, set[str]] = {}
  for path in places:
    # A command may go on behind a backslash, or in a line with its flags.
    text = path.read_text(encoding='utf-8')
    text = re.sub(r'\\\n\s*|\n(?: {8,})?(?=--\w)', ' ', text)
    for module, arguments in COMMAND.findall(text):
      found.setdefault(module, set()).add(arguments.strip())
  return found


FOUND = commands()
# Modules that the reader of a recipe writes.
WRITTEN = ('corridor:',)
# Commands of stored results keep their flags.
STORED = [
  path.read_text(encoding='utf-8')
  for path in ROOT.glob('experiments/*/results/*.json')
]


def binary_of(module: str) -> bool:
  """Whether a module takes the common flags."""
  path = ROOT.joinpath(*module.split('.'))
  path = path / '__main__.py' if path.is_dir() else path.with_suffix('.py')
  text = path.read_text(encoding='utf-8')
  return re.search(r'^  harness\.run\(', text, re.MULTILINE) is not None


def test_there_are_commands_and_all_are_of_modules():
  assert len(FOUND) > 35
  for module in FOUND:
    path = ROOT.joinpath(*module.split('.'))
    assert path.with_suffix('.py').exists() or path.is_dir(), module


@pytest.mark.parametrize('module', sorted(filter(binary_of, FOUND)))
def test_commands_are_understood(module, monkeypatch):
  found = []
  monkeypatch.setattr(harness, 'run', found.append)
  monkeypatch.delitem(sys.modules, module, raising=False)
  monkeypatch.delitem(sys.modules, f'{module}.__main__', raising=False)
  try:
    runpy.run_module(module, run_name='__main__')
  except ImportError as error:
    pytest.skip(f'an extra is not installed: {error}')
  (study,) = found
  about = {'renamed': study.renamed}
  for arguments in sorted(FOUND[module]):
    if any(name in arguments for name in WRITTEN):
      continue
    values = flags.FlagValues()
    flags_lib.define(study.presets, **about, values=values)
    try:
      words = [word for word in shlex.split(arguments) if word != '--help']
      values(['binary', *words])
      options = flags_lib.resolve(
        study.presets, paper='a', binary='b', **about, values=values
      )
      if study.check:
        study.check(options.settings)
      former = flags_lib.renamed_flags(study.renamed, values)
      stored = any(arguments in line for line in STORED)
      assert stored or not former, f'{arguments}: {former}'
    except (flags.Error, harness.SettingsError) as error:
      pytest.fail(f'python -m {module} {arguments}: {error}')
