"""Imports point one way: experiments, then harness, then the library."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = {'bilevel_jax', 'jax', 'optax', 'chex', 'numpy'}


def modules(folder):
  return sorted((ROOT / folder).rglob('*.py'))


def imported(path):
  """Full names of what a module imports, at any depth of its code."""
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path} has a relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def ids(path):
  return str(path.relative_to(ROOT))


@pytest.mark.parametrize('path', modules('bilevel_jax'), ids=ids)
def test_library_imports_its_four_dependencies_only(path):
  roots = {name.partition('.')[0] for name in imported(path)}
  assert roots <= LIBRARY | sys.stdlib_module_names


@pytest.mark.parametrize('path', modules('experiments/harness'), ids=ids)
def test_harness_imports_nothing_of_a_paper(path):
  ours = {n for n in imported(path) if n.startswith('experiments')}
  assert all(n.startswith('experiments.harness.') for n in ours), ours


@pytest.mark.parametrize('path', modules('experiments'), ids=ids)
def test_experiments_import_no_tests_and_no_other_paper(path):
  folder = path.relative_to(ROOT / 'experiments').parts[0]
  for name in imported(path):
    first, _, rest = name.partition('.')
    assert first != 'tests'
    if first == 'experiments':
      assert rest.partition('.')[0] in {'harness', folder}, name
