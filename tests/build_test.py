"""BUILD names every study and every file, and tests run by pytest."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = ('custom_problem', 'reproduce', 'tables')


def targets():
  """What BUILD makes, by name: Starlark is a subset of Python."""
  found = {}

  def rule(kind):
    def make(*, name, **fields):
      assert name not in found
      found[name] = fields | {'kind': kind}

    return make

  def glob(include, exclude=(), allow_empty=False):
    listed = {p for x in include for p in ROOT.glob(x) if p.is_file()}
    listed -= {p for x in exclude for p in ROOT.glob(x)}
    assert listed or allow_empty, include
    return sorted(path.relative_to(ROOT).as_posix() for path in listed)

  kinds = ('py_library', 'py_binary', 'py_test')
  names = {kind: rule(kind) for kind in kinds} | {
    'all_requirements': [],
    'glob': glob,
    'licenses': lambda of: None,
    'load': lambda *what: None,
    'package': lambda **fields: None,
  }
  text = (ROOT / 'BUILD').read_text(encoding='utf-8')
  exec(compile(text, 'BUILD', 'exec'), names)  # noqa: S102
  return found


@pytest.fixture(scope='module')
def found():
  return targets()


def test_every_file_is_a_source(found):
  sources = {x for fields in found.values() for x in fields['srcs']}
  files = {
    path.relative_to(ROOT).as_posix()
    for folder in ('bilevel_jax', 'docs', 'experiments', 'tests')
    for path in (ROOT / folder).rglob('*.py')
  }
  assert sources == files
  for fields in found.values():
    local = [x for x in fields.get('deps', ()) if x.startswith(':')]
    assert {x.removeprefix(':') for x in local} <= set(found)


def test_every_study_is_a_binary(found):
  binaries = {n for n, x in found.items() if x['kind'] == 'py_binary'}
  for path in sorted((ROOT / 'experiments').glob('*/*.py')):
    if '\nSTUDY = ' in path.read_text(encoding='utf-8'):
      assert f'{path.parent.name}.{path.stem}' in binaries
  assert set(PROGRAMS) <= binaries


def test_studies_depend_on_what_they_import(found):
  studies = {
    name: set(fields['deps'])
    for name, fields in found.items()
    if name.startswith('experiments.') and fields['kind'] == 'py_library'
  }
  studies.pop('experiments.shared')
  for study, deps in studies.items():
    for path in (ROOT / study.replace('.', '/')).rglob('*.py'):
      text = path.read_text(encoding='utf-8')
      imported = re.findall(r'from (experiments\.\w+)', text)
      others = (set(imported) & set(studies)) - {study}
      assert {f':{name}' for name in others} <= deps, path


def test_tests_run_by_pytest(found, tmp_path):
  tests = [x for x in found.values() if x['kind'] == 'py_test']
  assert len(tests) == len(list((ROOT / 'tests').rglob('*_test.py')))
  assert {x['main'] for x in tests} == {'tests/run.py'}
  for text, status in (('', 5), ('def test_it():\n  assert 0\n', 1)):
    path = tmp_path / 'one_test.py'
    path.write_text(text)
    run = subprocess.run(
      [sys.executable, ROOT / 'tests/run.py', path, '-q'],
      capture_output=True,
      check=False,
    )
    assert run.returncode == status


@pytest.mark.slow
def test_bazel_lists_every_target(found, tmp_path):
  """With empty rules in place of those that bazel would download."""
  if shutil.which('bazel') is None:
    pytest.skip(
      'bazel is not installed: on Debian, apt-get install bazel-bootstrap.'
    )
  root = tmp_path / 'root'
  root.mkdir()
  for path in ROOT.iterdir():
    if path.name not in ('MODULE.bazel', '.git', '.venv', 'runs'):
      (root / path.name).symlink_to(path)
  rule = 'def {0}(**fields):\n  native.{0}(**fields)\n'
  kinds = ('py_library', 'py_binary', 'py_test')
  stubs = {
    'rules_python/python/defs.bzl': '\n'.join(map(rule.format, kinds)),
    'rules_python/python/BUILD': '',
    'pypi/requirements.bzl': 'all_requirements = []\n',
    'pypi/BUILD': '',
    **{
      f'pypi/{name}/BUILD': (
        'package(default_visibility = ["//visibility:public"])\n'
        f'py_library(name = "{name}")\n'
      )
      for name in ('chex', 'jax', 'numpy', 'optax')
    },
  }
  for name, text in stubs.items():
    path = tmp_path / 'stubs' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  workspace = ''
  for name in ('rules_python', 'pypi'):
    (tmp_path / 'stubs' / name / 'WORKSPACE').touch()
    folder = tmp_path / 'stubs' / name
    workspace += f'local_repository(name = "{name}", path = "{folder}")\n'
  (root / 'WORKSPACE').write_text(workspace)
  query = subprocess.run(
    [
      *('bazel', '--batch', f'--output_user_root={tmp_path / "out"}'),
      *('query', '--noshow_progress', 'kind("py_.* rule", //...)'),
    ],
    cwd=root,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert query.returncode == 0, query.stderr
  assert set(query.stdout.split()) == {f'//:{name}' for name in found}
