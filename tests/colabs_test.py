"""The notebooks run from top to bottom and are committed without outputs."""

import ast
import importlib.util
import json
import pathlib
import re
import sys

import jax
import matplotlib.pyplot as plt
import nbclient
import nbformat
import pytest

import bilevel_jax as bj

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'colabs').glob('*.ipynb'))
SECONDS = 300  # Far above what they take: for a kernel that hangs.
# They train least. The others take 6 to 10 s of a processor each.
QUICK = ('aipod', 'pbgd', 'seal')

each = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
  """The name of a kernel that is this interpreter."""
  folder = tmp_path / 'kernels' / 'here'
  folder.mkdir(parents=True)
  words = [sys.executable, '-m', 'ipykernel_launcher']
  spec = {
    'argv': [*words, '-f', '{connection_file}'],
    'display_name': 'here',
    'language': 'python',
  }
  (folder / 'kernel.json').write_text(json.dumps(spec))
  monkeypatch.setenv('JUPYTER_PATH', str(tmp_path))
  return 'here'


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
def test_runs_and_draws(path, kernel):
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(
    notebook,
    timeout=SECONDS,
    kernel_name=kernel,
    resources={'metadata': {'path': str(ROOT)}},
  ).execute()
  outputs = [
    output for cell in notebook.cells for output in cell.get('outputs', [])
  ]
  assert any('image/png' in output.get('data', {}) for output in outputs)
  warned = [o['text'] for o in outputs if o.get('name') == 'stderr']
  assert not warned


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


@each
def test_installs_from_the_checkout_or_says_what_to_do(
  path, tmp_path, monkeypatch
):
  """In a folder of the checkout, and in one that is none."""
  source = nbformat.read(path, as_version=4).cells[1].source
  installs = []
  source = re.sub(r'%pip install -q .*', 'installs.append(root)', source)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  monkeypatch.chdir(ROOT / 'colabs')
  exec(source, {'installs': installs})  # noqa: S102 - Of the notebook.
  assert installs == [ROOT]
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit, match='no checkout of it: copy'):
    exec(source, {'installs': installs})  # noqa: S102


def test_there_is_one():
  assert 'pbgd' in {path.stem for path in NOTEBOOKS}
