"""The notebooks run from top to bottom and are committed without outputs."""

import ast
import base64
import importlib.util
import json
import os
import pathlib
import re

import jax
import matplotlib.pyplot as plt
import nbclient
import nbformat
import pytest

import bilevel_jax as bj
from tests import packaged

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'colabs').glob('*.ipynb'))
SOURCE = 'bilevel_jax'  # What the first cell installs.
SECONDS = 300  # Far above what they take: for a kernel that hangs.
# They train least. The others take 6 to 10 s of a processor each.
QUICK = ('aipod', 'pbgd', 'seal')

each = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """The wheel, and an interpreter that sees all but the package."""
  folder = tmp_path_factory.mktemp('package')
  wheel = packaged.build_wheel(folder)
  return wheel, packaged.environment(folder, dependencies=True)


@pytest.fixture
def kernel(installed, tmp_path, monkeypatch):
  """The name of a kernel of that interpreter."""
  _, python = installed
  folder = tmp_path / 'kernels' / 'without_package'
  folder.mkdir(parents=True)
  command = [str(python), '-m', 'ipykernel_launcher']
  spec = {
    'argv': [*command, '-f', '{connection_file}'],
    'display_name': 'without_package',
    'language': 'python',
  }
  (folder / 'kernel.json').write_text(json.dumps(spec))
  monkeypatch.setenv('JUPYTER_PATH', str(tmp_path))
  monkeypatch.delenv('PYTHONPATH', raising=False)
  # Each notebook installs the package itself.
  packaged.run(python, '-m', 'pip', 'uninstall', '-q', '-y', 'bilevel_jax')
  return 'without_package'


@pytest.fixture
def float_width():
  """Some notebooks change it for their whole process."""
  before = jax.config.jax_enable_x64
  yield
  jax.config.update('jax_enable_x64', before)


@pytest.mark.parametrize('name', QUICK)
def test_cells_run_and_draw(name, monkeypatch, float_width):
  """In this process: a kernel of its own costs seconds to start."""
  figures = []
  monkeypatch.setattr(plt, 'show', lambda: figures.extend(plt.get_fignums()))
  notebook = nbformat.read(ROOT / 'colabs' / f'{name}.ipynb', as_version=4)
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  names = {'__name__': '__main__'}
  for cell in cells[1:]:  # The first one installs the package.
    exec(compile(cell.source, name, 'exec'), names)  # noqa: S102
  plt.close('all')
  assert figures


@each
def test_names_of_the_library_exist(path):
  """What a notebook takes from `bj`, at any depth."""
  notebook = nbformat.read(path, as_version=4)
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  paths = {
    ast.unparse(node)
    for cell in cells[1:]
    for node in ast.walk(ast.parse(cell.source))
    if isinstance(node, ast.Attribute)
  }
  paths = {path for path in paths if re.fullmatch(r'bj(\.\w+)+', path)}
  assert paths
  for name in paths:
    found = bj
    for part in name.split('.')[1:]:
      found = getattr(found, part)


@pytest.mark.slow
@each
def test_installs_runs_and_draws(path, installed, kernel, tmp_path):
  """From an empty folder outside the checkout, with the wheel as SOURCE."""
  wheel, _ = installed
  notebook = nbformat.read(path, as_version=4)
  notebook.cells[1].source = notebook.cells[1].source.replace(
    f'SOURCE = {SOURCE!r}', f'SOURCE = {str(wheel)!r}'
  )
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  nbclient.NotebookClient(
    notebook,
    timeout=SECONDS,
    kernel_name=kernel,
    resources={'metadata': {'path': str(elsewhere)}},
  ).execute()
  outputs = [
    output for cell in notebook.cells for output in cell.get('outputs', [])
  ]
  pictures = [
    output['data']['image/png']
    for output in outputs
    if 'image/png' in output.get('data', {})
  ]
  assert pictures
  warned = [
    output['text']
    for cell in notebook.cells[2:]
    for output in cell.get('outputs', [])
    if output.get('name') == 'stderr'
  ]
  assert not warned
  if folder := os.environ.get('BILEVEL_JAX_GALLERY'):
    picture = pathlib.Path(folder) / f'{path.stem}.png'
    picture.write_bytes(base64.b64decode(max(pictures, key=len)))


@each
def test_is_committed_clean(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  for cell in cells:
    assert not cell.outputs
    assert cell.execution_count is None
  assert '%pip install' in cells[0].source
  assert notebook.cells[0].source.startswith('# ')
  text = '\n'.join(cell.source for cell in notebook.cells)
  assert not re.search(r'https?://', text)


def install(source, known, monkeypatch):
  """Runs a first cell; returns what it installs, without installing it."""
  installs, answers = [], iter(known)
  source = source.replace('%pip install -q {SOURCE}', 'pip(SOURCE) #')
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: next(answers))
  exec(source, {'pip': installs.append})  # noqa: S102 - Of the notebook.
  return installs


@each
def test_first_cell_installs_what_is_missing(path, monkeypatch):
  source = nbformat.read(path, as_version=4).cells[1].source
  assert source.count(f'SOURCE = {SOURCE!r}') == 1
  assert install(source, ['there'], monkeypatch) == []
  assert install(source, [None, 'there'], monkeypatch) == [SOURCE]
  with pytest.raises(SystemExit, match='set SOURCE to a wheel'):
    install(source, [None, None], monkeypatch)


def test_there_is_one():
  assert 'pbgd' in {path.stem for path in NOTEBOOKS}
