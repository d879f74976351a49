"""Pages made of files outside docs/: papers, notebooks, sources."""

import json
import pathlib
import posixpath
import re
from collections.abc import Callable, Mapping

ROOT = pathlib.Path(__file__).parents[2]

_IMAGE = re.compile(r'(!\[[^\]]*\])\(([^)\s]+)\)')
# The text of a link may be an image.
_LINK = re.compile(r'((?<!!)\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)')
_FENCE = re.compile(r'^( *)(```|~~~).*?^\1\2\s*$', re.MULTILINE | re.DOTALL)
# What `experiments.tables` reads; a page shows what it wrote.
_COMMENT = re.compile(r'<!-- (?:table|number|validity|papers|end).*?-->\n?')
_IMAGES = ('.png', '.gif', '.svg', '.jpg')
_LANGUAGES = {'.py': 'python', '.json': 'json', '.cfg': 'ini', '.toml': 'toml'}


def papers() -> list[str]:
  """The folders of papers and of fields with claims, by name."""
  return sorted(p.parent.name for p in ROOT.glob('experiments/*/claims.py'))


def notebooks() -> list[pathlib.Path]:
  """The notebooks, by name."""
  return sorted((ROOT / 'colabs').glob('*.ipynb'))


def title(text: str) -> str:
  """The first heading of a Markdown text."""
  return re.search(r'^# (.*)$', text, re.MULTILINE)[1]


def included() -> dict[str, str]:
  """Files of the repository that are pages, with the place of the page."""
  pages = {
    'CHANGELOG.md': 'changelog.md',
    'CONTRIBUTING.md': 'contributing.md',
    'SECURITY.md': 'security.md',
    'README.md': 'index.md',
    'docs': 'index.md',
    'colabs': 'notebooks/index.md',
    'experiments': 'papers.md',
  }
  for paper in papers():
    folder = f'experiments/{paper}'
    pages[folder] = pages[f'{folder}/README.md'] = f'papers/{paper}.md'
    if (ROOT / folder / 'NOTES.md').exists():
      pages[f'{folder}/NOTES.md'] = f'papers/{paper}_notes.md'
  for path in notebooks():
    pages[f'colabs/{path.name}'] = f'notebooks/{path.stem}.md'
  return pages


def without_comments(text: str) -> str:
  """Leaves out the comments that only the tables' program reads."""
  return _COMMENT.sub('', text)


def outside_fences(change: Callable[[str], str], text: str) -> str:
  """Changes a Markdown text except its fenced code."""
  parts, at = [], 0
  for fence in _FENCE.finditer(text):
    parts += [change(text[at : fence.start()]), fence[0]]
    at = fence.end()
  return ''.join([*parts, change(text[at:])])


class Links:
  """Rewrites links between files to links between pages.

  Attributes:
    files: files that links ask for and that are no pages, by their place in the
      site: sources are shown as pages, images are copied.
  """

  def __init__(self):
    self.pages = included()
    self.files: dict[str, pathlib.Path] = {}

  def rewrite(self, text: str, source: str, page: str) -> str:
    """The text with its links.

    Args:
      text: Markdown.
      source: the file that it is from, within the repository.
      page: its place in the site.

    Returns:
      The text for the page.

    Raises:
      ValueError: if a link leads to no file.
    """

    def one(match):
      target, _, anchor = match[2].partition('#')
      if re.match(r'[a-z]+:', match[2]) or not target:
        return match[0]
      path = posixpath.normpath(
        posixpath.join(posixpath.dirname(source), target)
      )
      if target.startswith('/'):  # From the top of the site.
        place = target[1:]
      else:
        place = self._place(path, source)
      relative = posixpath.relpath(place, posixpath.dirname(page) or '.')
      return f'{match[1]}({relative}{"#" * bool(anchor)}{anchor})'

    return outside_fences(
      lambda part: _LINK.sub(one, _IMAGE.sub(one, part)), text
    )

  def _place(self, path: str, source: str) -> str:
    if path in self.pages:
      return self.pages[path]
    file = ROOT / path
    if not file.exists():
      raise ValueError(f'{source}: the link to {path} leads to no file.')
    if path.startswith('docs/') and file.is_file():
      return path.removeprefix('docs/')
    if file.suffix in _IMAGES:
      place = f'files/{path}'
    else:
      place = f'source/{path.replace(".", "_")}.md'
    self.files[place] = file
    return place


def source_page(path: pathlib.Path) -> str:
  """A page that shows a file, or lists a folder."""
  name = path.relative_to(ROOT).as_posix()
  if path.is_dir():
    files = sorted(p.name for p in path.iterdir() if p.name[0] not in '._')
    return f'# {name}\n\n' + '\n'.join(f'- `{file}`' for file in files)
  language = _LANGUAGES.get(path.suffix, 'text')
  text = path.read_text(encoding='utf-8').replace('```', '` ` `')
  return f'# {name}\n\n```{language}\n{text}\n```\n'


def notebook_page(path: pathlib.Path, picture: str | None) -> str:
  """A notebook as a page: its text, its code and its picture."""
  cells = json.loads(path.read_text(encoding='utf-8'))['cells']
  parts = []
  for number, cell in enumerate(cells):
    text = ''.join(cell['source'])
    if cell['cell_type'] == 'code':
      text = f'```python\n{text}\n```'
    parts.append(text)
    if number == 0:
      where = f'The notebook is `colabs/{path.name}` of the repository.'
      parts.append(where)
      if picture:
        parts.append(f'![What the notebook draws]({picture})')
  return '\n\n'.join(parts) + '\n'


def gallery(pictures: Mapping[str, str]) -> str:
  """The page of all notebooks.

  Args:
    pictures: addresses of pictures by the notebooks' names.

  Returns:
    Markdown with a card for each notebook.
  """
  cards = []
  for path in notebooks():
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    heading = title(''.join(cells[0]['source']))
    page, picture = f'/notebooks/{path.stem}.md', ''
    if path.stem in pictures:
      picture = f'    [![{heading}]({pictures[path.stem]})]({page})\n\n'
    cards.append(f'-   **[{heading}]({page})**\n\n{picture}')
  return (
    '# Notebooks\n\nOne notebook for each paper. Each takes about a minute on '
    'a laptop and downloads no data; the first cell installs the library where '
    'it is missing.\n\n<div class="grid cards" markdown>\n\n'
    + '\n'.join(cards)
    + '\n</div>\n'
  )


def readme_example() -> str:
  """The Python block of the README."""
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  return re.search(r'```python\n.*?```', text, re.DOTALL)[0]
