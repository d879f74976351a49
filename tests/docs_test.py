"""Code of documents runs, links lead on, public names are documented."""

import contextlib
import io
import re
import subprocess
import sys

import pytest
from site_builder import charts, documents, reference

ROOT = documents.ROOT
DOCS = ROOT / 'docs'
PAGES = sorted([ROOT / 'README.md', *DOCS.rglob('*.md')])
# A Python block, and the output that stands below it, indented.
BLOCK = re.compile(r'```python\n(.*?)```\n(\n(?: {4}[^\n]*\n)+)?', re.DOTALL)
# Their programs train for longer than two seconds.
LONG = ('README.md', 'tour.md', 'clean_labels.md', 'regularisation.md')


def name_of(path):
  return path.relative_to(ROOT).as_posix()


def assert_prints(printed, expected):
  """The same words, and numbers within rounding of another machine."""
  number = re.compile(r'(-?\d+\.?\d*(?:e[-+]?\d+)?)')
  for part, shown in zip(
    number.split(printed), number.split(expected), strict=True
  ):
    if number.fullmatch(shown):
      assert float(part) == pytest.approx(float(shown), rel=0.05, abs=0.02)
    else:
      assert part.split() == shown.split()


@pytest.mark.parametrize(
  'path',
  [
    pytest.param(
      path, id=name_of(path), marks=[pytest.mark.slow] * (path.name in LONG)
    )
    for path in PAGES
    if BLOCK.search(path.read_text(encoding='utf-8'))
  ],
)
def test_code_runs_and_prints_what_it_shows(path):
  names = {}
  for code, expected in BLOCK.findall(path.read_text(encoding='utf-8')):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      exec(compile(code, name_of(path), 'exec'), names)  # noqa: S102
    if expected:
      assert_prints(printed.getvalue().strip(), expected.strip())


def test_every_public_name_is_documented():
  assert len(reference.public_names()) > 250
  lacking = reference.undocumented()
  assert not lacking, f'no docstring, or comment at the assignment: {lacking}'


def test_every_public_name_has_a_page_and_is_listed():
  pages = reference.pages()
  for name in reference.public_names():
    module = name.paths[0].rpartition('.')[0].split('.')[1:]
    listed = pages['/'.join(['api', *module, 'index.md'])]
    assert f'](/{name.page})' in listed
    assert name.paths[0] in pages[name.page] or name.short in pages[name.page]


def test_names_without_documentation_are_found(monkeypatch):
  monkeypatch.setattr(reference, 'documentation', lambda name: '')
  assert 'bj.v_pbgd' in reference.undocumented()


def test_pages_are_in_the_navigation():
  listed = (ROOT / 'mkdocs.yml').read_text(encoding='utf-8')
  for path in set(DOCS.rglob('*.md')) - {DOCS / 'papers.md'}:  # Generated.
    assert f' {path.relative_to(DOCS).as_posix()}\n' in listed


def test_links_of_pages_are_found_and_rewritten():
  links = documents.Links()
  for path in PAGES:
    text = path.read_text(encoding='utf-8')
    place = path.relative_to(DOCS if DOCS in path.parents else ROOT).as_posix()
    links.rewrite(text, name_of(path), place)
  for source, place in links.pages.items():
    if source.endswith('.md') and (ROOT / source).exists():
      text = (ROOT / source).read_text(encoding='utf-8')
      links.rewrite(text, source, place)
  assert (
    links.rewrite('[a](../experiments/pbgd/README.md#x)', 'docs/a.md', 'a.md')
    == '[a](papers/pbgd.md#x)'
  )
  assert (
    links.rewrite(
      '[![p](/gallery/a.png)](../colabs/pbgd.ipynb)', 'docs/a.md', 'x/a.md'
    )
    == '[![p](../gallery/a.png)](../notebooks/pbgd.md)'
  )
  with pytest.raises(ValueError, match='leads to no file'):
    links.rewrite('[a](missing.md)', 'docs/a.md', 'a.md')


def test_tables_of_stored_results_get_their_curves():
  text = (DOCS / 'methods.md').read_text(encoding='utf-8')
  drawn = charts.with_charts(text)
  assert drawn.count('<svg') >= 4
  assert 'nan' not in ''.join(re.findall(r'd="[^"]*"', drawn))


def test_every_paper_and_notebook_has_a_page():
  pages = documents.included().values()
  # Ten papers, and the field of reinforcement learning.
  assert len(documents.papers()) == 11
  for paper in documents.papers():
    assert f'papers/{paper}.md' in pages
  for path in documents.notebooks():
    assert f'notebooks/{path.stem}.md' in pages
    assert (DOCS / 'gallery' / f'{path.stem}.png').exists()
    assert '```python' in documents.notebook_page(path, None)


def test_docstrings_become_markdown():
  docstrings = pytest.importorskip('site_builder.docstrings')
  text = docstrings.to_markdown(
    'One.\n\n.. math::\n  a &= b \\\\\n  c &= d\n\n:math:`x`, `A\n<u>`_.\n\n'
    'Returns:\n  A pair: two.\n\nExample:\n  >>> 1\n'
  )
  assert r'\begin{split} a &= b \\ c &= d \end{split}' in text
  assert '$x$, [A](u).' in text
  assert '**Returns**\n\nA pair: two.' in text
  assert text.endswith('Examples:\n  >>> 1')


def test_sections_of_docstrings_can_be_read(caplog):
  griffe = pytest.importorskip('griffe', reason='the extra docs is missing')
  for name in reference.public_names():
    caplog.clear()
    griffe.Docstring(reference.documentation(name)).parse('google')
    lines = [record.getMessage() for record in caplog.records]
    lacking = [line for line in lines if "'exception: description'" in line]
    assert not lacking, f'{name.paths[0]}: {lacking}'


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
  pytest.importorskip('mkdocs', reason='the extra docs is not installed')
  command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet']
  run = subprocess.run(
    [*command, '--site-dir', tmp_path / 'site'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr[-2000:]
  pages = {p.parent.name for p in (tmp_path / 'site').rglob('index.html')}
  assert {'v_pbgd', 'pbgd', 'choosing', 'methods', 'alright'} <= pages
  text = (tmp_path / 'site/api/v_pbgd/index.html').read_text(encoding='utf-8')
  assert '<math' in text and 'arithmatex' not in text
  # No page asks another host for a script, a style or a font.
  for path in (tmp_path / 'site').rglob('*.html'):
    page = path.read_text(encoding='utf-8')
    assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="http', page)


def test_documents_have_short_lines():
  """Outside tables and comments that ask for numbers."""
  for path in [*PAGES, *ROOT.glob('experiments/*/README.md')]:
    for number, line in enumerate(path.read_text('utf-8').splitlines(), 1):
      plain = re.sub(r'<!--.*?-->', '', line)
      if not plain.lstrip().startswith('|'):
        assert len(plain) <= 200, f'{name_of(path)}:{number}'
