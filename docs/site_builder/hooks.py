"""What mkdocs calls: adds the generated pages and finishes each page.

Run from the top of the repository, `python -m mkdocs build --strict`.
"""

import pathlib
import posixpath
import re
import sys

from mkdocs import exceptions
from mkdocs.structure import files as mkdocs_files

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'docs')]

from site_builder import charts, documents, maths, reference  # noqa: E402

_CODE = re.compile(
  r'(<(?:a|pre|h[1-6])\b.*?</(?:a|pre|h[1-6])>)'
  r'|<code>([\w.]+)</code>|<span title="([\w.]+)">\w+</span>',
  re.DOTALL,
)
# Pages of tables, alone in their section.
_WIDE = ('index.md', 'methods.md', 'benchmarks.md')

_links = documents.Links()
_sources: dict[str, str] = {}
_names: dict[str, str] = {}


def _add(files, config, place, text, source):
  """A page that is generated from `source`, a file of the repository."""
  files.append(mkdocs_files.File.generated(config, place, content=text))
  _sources[place] = source


def _names_of_pages() -> dict[str, str]:
  """Pages by what inline code may call them."""
  names = {}
  for name in reference.public_names():
    for path in name.paths:
      names[path] = names[path.replace('bilevel_jax', 'bj', 1)] = name.page
      names[path.replace('bilevel_jax.', '', 1)] = name.page
    # A bare name, if it is one name and no common word.
    last = name.short.rpartition('.')[2]
    method = name.short.startswith(('bj.solvers.', 'bj.aggregators.'))
    if method or re.search(r'_|\d|^[A-Z]', last):
      names.setdefault(last, name.page)
    elif name.short.count('.') == 1:
      names[last] = name.page
  for path in reference.namespaces():
    page = '/'.join(['api', *path.split('.')[1:], 'index.md'])
    if path != 'bilevel_jax':
      names[path] = names[path.replace('bilevel_jax', 'bj', 1)] = page
  return names


def _api_nav() -> list:
  """A section for each module, with its names."""
  sections = []
  for path in reference.namespaces():
    parts = path.split('.')[1:]
    folder = '/'.join(['api', *parts])
    members = [
      {name.short.rpartition('.')[2]: name.page}
      for name in sorted(
        reference.public_names(), key=lambda n: n.short.lower()
      )
      if name.paths[0].rpartition('.')[0] == path
    ]
    if path == 'bilevel_jax':
      sections = [f'{folder}/index.md', {'bj': members}]
    else:
      sections.append(
        {'.'.join(['bj', *parts]): [f'{folder}/index.md', *members]}
      )
  return sections


def on_config(config):
  """Lists generated pages in the navigation."""
  papers = ['papers.md']
  places = documents.included()
  for paper in documents.papers():
    path = ROOT / 'experiments' / paper / 'README.md'
    heading = documents.title(path.read_text(encoding='utf-8'))
    papers.append({heading: f'papers/{paper}.md'})
    if f'experiments/{paper}/NOTES.md' in places:
      papers.append({f'{heading}: notes': f'papers/{paper}_notes.md'})
  notebooks = [f'notebooks/{path.stem}.md' for path in documents.notebooks()]
  generated = {
    'API': _api_nav(),
    'Notebooks': ['notebooks/index.md', *notebooks],
    'Papers': papers,
  }
  config.nav = [
    {title: generated.get(title, pages) for title, pages in entry.items()}
    for entry in config.nav
  ]
  return config


def on_files(files, *, config):
  """Adds the pages that no file of docs/ has."""
  _links.files.clear()
  _names.update(_names_of_pages())
  for place, text in reference.pages().items():
    _add(files, config, place, text, f'docs/{place}')
  pictures = {}
  for path in documents.notebooks():
    picture = ROOT / 'docs' / 'gallery' / f'{path.stem}.png'
    if picture.exists():
      pictures[path.stem] = f'/gallery/{path.stem}.png'
    text = documents.notebook_page(path, pictures.get(path.stem))
    _add(
      files, config, f'notebooks/{path.stem}.md', text, f'colabs/{path.name}'
    )
  text = documents.gallery(pictures)
  _add(files, config, 'notebooks/index.md', text, 'docs/notebooks/index.md')
  for source, place in documents.included().items():
    path = ROOT / source
    if path.suffix == '.md' and place != 'index.md' and path.exists():
      _add(files, config, place, path.read_text(encoding='utf-8'), source)
  # Links are read here, so that files they ask for join before the build.
  for file in list(files.documentation_pages()):
    source = _sources.get(file.src_uri, f'docs/{file.src_uri}')
    try:
      _links.rewrite(file.content_string, source, file.src_uri)
    except ValueError as error:
      raise exceptions.PluginError(str(error)) from error
  for place, path in _links.files.items():
    if place.endswith('.md'):
      _add(files, config, place, documents.source_page(path), place)
    else:
      files.append(
        mkdocs_files.File.generated(config, place, abs_src_path=str(path))
      )
  return files


def on_page_markdown(markdown, *, page, config, files):
  """Fills in curves and links."""
  del config, files
  place = page.file.src_uri
  if place in _WIDE:
    page.meta['hide'] = ['navigation']
  if place.startswith('source/'):
    return markdown
  source = _sources.get(place, f'docs/{place}')
  markdown = charts.with_charts(markdown)
  markdown = documents.without_comments(markdown)
  markdown = markdown.replace('<!-- example -->', documents.readme_example())
  return _links.rewrite(markdown, source, place)


def on_page_content(content, *, page, config, files):
  """Links names of the library to their pages; formulas become MathML."""
  del config
  here = page.file.src_uri

  def link(match):
    target = _names.get(match[2] or match[3] or '')
    if target is None or target == here:
      return match[0]
    address = posixpath.relpath(
      files.get_file_from_path(target).url, page.url or '.'
    )
    return f'<a class="name" href="{address}/">{match[0]}</a>'

  return _CODE.sub(link, maths.to_mathml(content))
