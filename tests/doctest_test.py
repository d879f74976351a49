"""The examples in docstrings run, and every public function has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

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

# Their examples compile dozens of programs each.
LONG = (
  *('Lazy', 'a3c_td0', 'actor_critic', 'actor_critic_gradient', 'aligned_mtl'),
  *('bellman_gap', 'hypergradient_distance', 'suggest', 'td_actor_critic'),
  *('td_fixed_point', 'v_pbsgd', 'zero_sum_responses'),
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


def run_examples(chosen):
  """Runs the examples of objects with these names; gives their number."""
  flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
  runner = doctest.DocTestRunner(optionflags=flags)
  finder = doctest.DocTestFinder(exclude_empty=True)
  report, examples = [], 0
  for name in MODULES:
    module = importlib.import_module(name)
    for test in finder.find(module, name):
      if chosen(test.name.rpartition('.')[-1]):
        runner.run(test, out=report.append)
        examples += bool(test.examples)
    memory.release()
  assert not runner.summarize(verbose=False).failed, ''.join(report)
  return examples


def test_examples_run():
  assert run_examples(lambda name: name not in LONG) > 50  # They are found.


@pytest.mark.slow
def test_long_examples_run():
  assert run_examples(lambda name: name in LONG) == len(LONG)


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
