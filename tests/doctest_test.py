"""The examples in docstrings run, and every public function has one."""

import doctest
import importlib
import inspect
import pkgutil

import bilevel_jax as bj
from tests import memory

MODULES = sorted(
  {bj.__name__}
  | {m.name for m in pkgutil.walk_packages(bj.__path__, f'{bj.__name__}.')}
)
NAMESPACES = tuple(
  getattr(bj, name)
  for name in bj.__all__
  if inspect.ismodule(getattr(bj, name))
)


def public_functions():
  """By full name."""
  return {
    f'{module.__name__}.{name}': found
    for module in (bj, *NAMESPACES)
    for name in getattr(module, '__all__', dir(module))
    if not name.startswith('_')
    and inspect.isfunction(found := inspect.unwrap(getattr(module, name)))
    and found.__module__.startswith(bj.__name__)
  }


def test_examples_run():
  flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
  runner = doctest.DocTestRunner(optionflags=flags)
  finder = doctest.DocTestFinder(exclude_empty=True)
  report, examples = [], 0
  for name in MODULES:
    module = importlib.import_module(name)
    for test in finder.find(module, name):
      runner.run(test, out=report.append)
      examples += bool(test.examples)
    memory.release()
  assert not runner.summarize(verbose=False).failed, ''.join(report)
  assert examples > 50  # They are found at all.


def test_every_public_function_has_an_example():
  functions = public_functions()
  assert {
    'bilevel_jax.v_pbgd',
    'bilevel_jax.solvers.stocbio',
    'bilevel_jax.projections.affine_set',
  } <= set(functions)
  lacking = [
    name
    for name, function in functions.items()
    if 'Example:' not in (text := inspect.getdoc(function) or '')
    or '>>> ' not in text
  ]
  assert not lacking, f'no Example in the docstrings of {lacking}'
