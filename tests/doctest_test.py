"""The examples in docstrings run, and every public function has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import bilevel_jax as bj

MODULES = sorted(
  {bj.__name__}
  | {m.name for m in pkgutil.walk_packages(bj.__path__, f'{bj.__name__}.')}
)
FUNCTIONS = [
  name
  for name in bj.__all__
  if inspect.isfunction(inspect.unwrap(getattr(bj, name)))
]


@pytest.mark.parametrize('name', MODULES)
def test_examples_run(name):
  module = importlib.import_module(name)
  found = doctest.DocTestFinder(exclude_empty=True).find(module, name)
  runner = doctest.DocTestRunner(
    optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
  )
  report = []
  for example in found:
    runner.run(example, out=report.append)
  assert not runner.summarize(verbose=False).failed, ''.join(report)


def test_the_examples_are_found():
  module = importlib.import_module('bilevel_jax.solvers._pbgd')
  found = doctest.DocTestFinder().find(module)
  assert sum(bool(test.examples) for test in found) >= 2


@pytest.mark.parametrize('name', FUNCTIONS)
def test_every_public_function_has_an_example(name):
  text = inspect.getdoc(getattr(bj, name)) or ''
  assert 'Example:' in text and '>>> ' in text, (
    f'bj.{name} has no Example in its docstring.'
  )


def test_functions_are_found():
  assert {'v_pbgd', 'apply_updates', 'values'} <= set(FUNCTIONS)
  assert 'BilevelParams' not in FUNCTIONS and 'Loss' not in FUNCTIONS
