"""Imports point one way, and importing changes nothing."""

import ast
import configparser
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Fields, which papers share, and the other fields that each may import.
FIELDS = {
  'lm': (),
  'rl': (),
  'speech': ('lm',),
  'tracking': (),
  'vision': (),
}
LIBRARY = {'bilevel_jax', 'jax', 'optax', 'chex', 'numpy'}


def imported(path):
  """Full names of what a module imports, at any depth of its code."""
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path} has a relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def broken(folder, allowed, root=ROOT):
  """By module, imports that are not allowed."""
  return {
    str(path.relative_to(root)): wrong
    for path in sorted((root / folder).rglob('*.py'))
    if (wrong := [n for n in imported(path) if not allowed(path, n)])
  }


def broken_experiments(root=ROOT):
  """By module of the experiments, imports of tests, or of another paper."""

  def allowed(path, name):
    first, _, rest = name.partition('.')
    folder, *deeper = path.relative_to(root / 'experiments').parts
    fields = {} if folder == 'harness' else FIELDS
    shared = {'harness', folder, *fields.get(folder, fields)}
    if not deeper:
      # What stands above the papers is a tool: it may use another one.
      shared = {'harness', 'tables'}
    elif folder == 'benchmarks':
      # Measures what papers have, and none of them imports it.
      shared |= {'bl_just', 'tracklet'}
    return first != 'tests' and (
      first != 'experiments' or rest.partition('.')[0] in shared
    )

  return broken('experiments', allowed, root)


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


def test_packages_of_the_harness_import_one_way():
  order = ('app', 'store', 'data', 'train', 'study')
  place = lambda name: order.index(name) if name in order else -1

  def allowed(path, name):
    package = path.relative_to(ROOT / 'experiments/harness').parts[0]
    # The package itself only collects names.
    inner = name.removeprefix('experiments.harness.').partition('.')[0]
    return package == '__init__.py' or place(inner) <= place(package)

  assert not broken('experiments/harness', allowed)


def test_experiments_import_no_tests_and_no_other_paper():
  assert not broken_experiments()


def test_fields_are_for_papers_and_import_none(tmp_path):
  """On a tree that is made up: who imports what, and whether it may."""
  for module, imports, fine in (
    ('pbgd/a', 'from experiments.rl import ppo', True),
    ('pbgd/b', 'import experiments.lm.decoder', True),
    ('pbgd/c', 'from experiments.moco import toy', False),
    ('rl/d', 'from experiments import harness', True),
    ('rl/e', 'from experiments.rl import ppo', True),
    ('rl/f', 'from experiments.lm import decoder', False),
    ('lm/g', 'from experiments.pbgd import toy', False),
    ('speech/g', 'from experiments.lm import decoder', True),
    ('speech/g', 'from experiments import bl_just', False),
    ('tracking/g', 'import experiments.speech.audio', False),
    ('harness/g', 'from experiments import vision', False),
    ('lm/h', 'import tests.problems', False),
  ):
    path = tmp_path / 'experiments' / f'{module}.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(imports)
    assert (not broken_experiments(tmp_path)) == fine
    path.unlink()


IMPORTS = """
import importlib, os, pkgutil, signal, sys, threading

def state():
  handlers = [signal.getsignal(n) for n in signal.valid_signals()]
  hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
  return os.environ.get('XLA_FLAGS'), handlers, hooks

sys.argv = ['-m']
before = state()
import experiments
for module in pkgutil.walk_packages(experiments.__path__, 'experiments.'):
  # These run where the packages are that benchmarks compare with.
  if not module.name.startswith('experiments.benchmarks.peers.'):
    importlib.import_module(module.name)
assert state() == before, (before, state())
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""


def test_importing_experiments_changes_nothing():
  """No flag of XLA, no signal handler, no hook, and XLA does not start."""
  pytest.importorskip('jinja2', reason='needs the extra llm')
  done = subprocess.run(
    [sys.executable, '-c', IMPORTS],
    cwd=ROOT,
    env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert not done.returncode, done.stderr


def runs_data(tree):
  """What of a module may run code that data hold."""
  modules = {'pickle', 'marshal', 'shelve', 'dill', 'cloudpickle', 'joblib'}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module or '']
    else:
      names = []
    yield from (n for n in names if n.partition('.')[0] in modules)
    if (
      isinstance(node, ast.keyword)
      and node.arg == 'allow_pickle'
      and not (isinstance(node.value, ast.Constant) and not node.value.value)
    ) or (
      isinstance(node, ast.Call)
      and ast.unparse(node.func) in ('np.load', 'numpy.load')
      and len(node.args) > 2
    ):
      yield 'allow_pickle'


def test_no_data_is_run():
  """Ruff's rules S102, S301, S302 and S307 refuse calls; these the ways to."""
  found = {
    str(path.relative_to(ROOT)): names
    for folder in ('bilevel_jax', 'experiments', 'tests')
    for path in sorted((ROOT / folder).rglob('*.py'))
    if (names := list(runs_data(ast.parse(path.read_text(encoding='utf-8')))))
  }
  # Utterances go to other processes; a payload is refused.
  assert found == {
    'tests/experiments/speech/loaders_test.py': ['pickle'],
  }
  for line in (
    'np.load(x, allow_pickle=True)',
    'np.load(x, allow_pickle=y)',
    'np.load(x, None, True)',
  ):
    assert list(runs_data(ast.parse(line))) == ['allow_pickle']
  assert not list(runs_data(ast.parse('np.load(x, allow_pickle=False)')))


@pytest.mark.parametrize('folder', ['bilevel_jax', 'experiments', 'tests'])
def test_ruff_refuses_calls_that_run_data(folder):
  pytest.importorskip('ruff', reason='needs the extra test')
  code = 'import marshal, pickle\n' + ''.join(
    f'{call}\n'
    for call in (
      "exec('')",
      "pickle.loads(b'')",
      "marshal.loads(b'')",
      "eval('')",
    )
  )
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'ruff', 'check', '--output-format=concise'),
      f'--stdin-filename={folder}/a/b.py',
    ],
    input=code,
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  for rule in ('S102', 'S301', 'S302', 'S307'):
    assert f': {rule} ' in done.stdout, done.stdout + done.stderr


def test_tests_have_every_extra():
  """What an extra lacks, its tests would be skipped without."""
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  extras = setup['options.extras_require']
  (given,) = re.findall(r'bilevel_jax\[(.*)\]', extras['test'])
  # The command in the README names these two.
  assert {'experiments', 'test', *given.split(',')} == set(extras)
