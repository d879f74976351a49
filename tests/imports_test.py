"""Imports point one way: experiments, then harness, then the library."""

import ast
import pathlib
import sys

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


def broken(folder, allowed):
  """By module, imports that are not allowed."""
  return {
    str(path.relative_to(ROOT)): wrong
    for path in modules(folder)
    if (wrong := [n for n in imported(path) if not allowed(path, n)])
  }


def test_library_imports_its_four_dependencies_only():
  roots = LIBRARY | sys.stdlib_module_names
  assert not broken(
    'bilevel_jax', lambda path, name: name.partition('.')[0] in roots
  )


def test_no_solver_imports_another_one_s_module():
  assert not broken(
    'bilevel_jax/solvers',
    lambda path, name: (
      path.name == '__init__.py' or not name.startswith('bilevel_jax.solvers.')
    ),
  )


def test_harness_imports_nothing_of_a_paper():
  assert not broken(
    'experiments/harness',
    lambda path, name: (
      not name.startswith('experiments')
      or name.startswith('experiments.harness.')
    ),
  )


def test_experiments_import_no_tests_and_no_other_paper():
  def allowed(path, name):
    first, _, rest = name.partition('.')
    folder, *deeper = path.relative_to(ROOT / 'experiments').parts
    # What stands above the papers is a tool: it may use another one.
    known = {'harness', folder} if deeper else {'harness', '', 'tables'}
    return first != 'tests' and (
      first != 'experiments' or rest.partition('.')[0] in known
    )

  assert not broken('experiments', allowed)
