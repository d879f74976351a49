"""The package's metadata is true, and its wheel works where nothing else is."""

import configparser
import pathlib
import re

import pytest
import yaml

import bilevel_jax as bj
from tests import packaged

ROOT = packaged.ROOT


def read_setup():
  """`setup.cfg`, with lists as lists of lines."""
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  return parser


def test_version_is_the_same_everywhere():
  version = read_setup()['metadata']['version']
  assert bj.__version__ == version
  for name in ('CITATION.cff', 'MODULE.bazel', 'docs/citation.md'):
    assert version in (ROOT / name).read_text(encoding='utf-8'), name
  changes = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
  assert re.search(rf'^## (Unreleased|{re.escape(version)})', changes, re.M)


def test_every_dependency_has_a_lowest_version():
  setup = read_setup()
  lists = [setup['options']['install_requires']]
  lists += setup['options.extras_require'].values()
  for line in '\n'.join(lists).split():
    assert '>=' in line or line.startswith('bilevel_jax['), line


def test_upper_bounds_have_a_reason():
  above = ''
  for line in (ROOT / 'setup.cfg').read_text(encoding='utf-8').splitlines():
    if re.match(r'\s+[\w\[\]-]+.*<\d', line):
      assert above.strip().startswith('#'), line
    above = line


def test_citation_and_workflows_can_be_read():
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text('utf-8'))
  assert {'cff-version', 'message', 'title', 'authors'} <= set(citation)
  workflows = list(ROOT.glob('.github/workflows/*.yml'))
  assert workflows
  for path in [*workflows, *ROOT.glob('.github/ISSUE_TEMPLATE/*.yml')]:
    assert yaml.safe_load(path.read_text(encoding='utf-8'))
  commands = '\n'.join(path.read_text('utf-8') for path in workflows)
  for name in re.findall(r'\.ci/\w+', commands):
    assert (ROOT / name).stat().st_mode & 0o100, name
  assert 'mkdocs build --strict' in commands


@pytest.mark.slow
def test_wheel_runs_the_readme_in_an_empty_environment(tmp_path):
  wheel = packaged.build_wheel(tmp_path)
  assert list(wheel.parent.glob('*.tar.gz'))
  python = packaged.environment(tmp_path)
  packaged.run(python, '-m', 'pip', 'install', '-q', wheel)
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  code = 'import bilevel_jax.testing; print(bilevel_jax.testing.__file__)'
  place = pathlib.Path(packaged.run(python, '-c', code, cwd=elsewhere).strip())
  assert tmp_path in place.parents
  assert (place.parents[1] / 'py.typed').exists()
  # The README's example takes its data from scikit-learn.
  packaged.run(python, '-m', 'pip', 'install', '-q', 'scikit-learn')
  readme = (ROOT / 'README.md').read_text(encoding='utf-8')
  blocks = re.findall(r'```python\n(.*?)```', readme, re.DOTALL)
  printed = packaged.run(python, '-c', '\n'.join(blocks), cwd=elsewhere)
  assert float(printed.splitlines()[0]) == pytest.approx(-5.10, abs=0.05)


@pytest.mark.slow
def test_type_checkers_find_an_editable_install(tmp_path):
  source = packaged.copy_sources(tmp_path / 'source')
  python = packaged.environment(tmp_path)
  packaged.run(python, '-m', 'pip', 'install', '-q', '--no-deps', '-e', source)
  (lines,) = tmp_path.glob('env/lib/*/site-packages/*bilevel_jax*.pth')
  assert lines.read_text(encoding='utf-8').strip() == str(source)
