"""Pages of the public names of the library, from their docstrings."""

import ast
import functools
import inspect
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import bilevel_jax as bj

# Modules of public names that no `__all__` lists.
_NESTED = ('oracles.base',)


class Name(NamedTuple):
  """One public name.

  Attributes:
    short: how users write it, `bj.solvers.alright`.
    paths: all full names, `bilevel_jax.solvers.alright`, the page's own first.
    value: what it names.
    page: the page of the site.
  """

  short: str
  paths: tuple[str, ...]
  value: Any
  page: str


def namespaces() -> dict[str, Any]:
  """The public modules, by full name."""
  modules = {'bilevel_jax': bj}
  listed = [n for n in bj.__all__ if inspect.ismodule(getattr(bj, n))]
  for name in (*listed, *_NESTED):
    module = functools.reduce(getattr, name.split('.'), bj)
    modules[f'bilevel_jax.{name}'] = module
  return modules


def _defined(module: Any) -> list[str]:
  """Names that a module without `__all__` defines."""
  names = []
  for node in ast.parse(inspect.getsource(module)).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      names.append(node.name)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
      targets = node.targets if isinstance(node, ast.Assign) else [node.target]
      names += [t.id for t in targets if isinstance(t, ast.Name)]
  return [name for name in names if not name.startswith('_')]


def _exported(module: Any) -> Iterator[tuple[str, Any]]:
  for name in getattr(module, '__all__', None) or _defined(module):
    value = getattr(module, name)
    if not inspect.ismodule(value):
      yield name, value


@functools.cache
def public_names() -> tuple[Name, ...]:
  """All public names; what is exported twice has one page, the shortest."""
  known: dict[Any, list[str]] = {}
  values = {}
  for path, module in namespaces().items():
    for name, value in _exported(module):
      # Constants with equal values are different names.
      own = inspect.isfunction(value) or inspect.isclass(value)
      key = id(value) if own else name
      known.setdefault(key, []).append(f'{path}.{name}')
      values[key] = value
  return tuple(
    Name(
      short=paths[0].replace('bilevel_jax', 'bj', 1),
      paths=tuple(paths),
      value=values[key],
      page='api/' + '/'.join(paths[0].split('.')[1:]) + '.md',
    )
    for key, paths in known.items()
  )


def _targets(node: ast.stmt) -> list[str]:
  """The names that a statement assigns."""
  if isinstance(node, ast.AnnAssign):
    return [ast.unparse(node.target)]
  if isinstance(node, ast.Assign):
    return [n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
  return []


def _assignment(path: str) -> tuple[str, str]:
  """The statement that assigns a name, and the comment or string with it."""
  module_path, _, name = path.rpartition('.')
  module = pathlib.Path(namespaces()[module_path].__file__)
  # Packages export what a module of theirs assigns.
  packaged = module.name == '__init__.py'
  for file in sorted(module.parent.glob('*.py')) if packaged else [module]:
    text = file.read_text(encoding='utf-8')
    lines, body = text.splitlines(), ast.parse(text).body
    for node, after in zip(body, [*body[1:], None]):
      if name not in _targets(node):
        continue
      statement = ast.get_source_segment(text, node)
      if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
        return statement, str(after.value.value)
      inline = lines[node.end_lineno - 1].partition('  # ')[2]
      above, at = [], node.lineno - 2
      while lines[at].startswith('# '):
        above.insert(0, lines[at][2:])
        at -= 1
      return statement, inline or ' '.join(above)
  return '', ''


def _assigned(name: Name) -> bool:
  return not (inspect.isfunction(name.value) or inspect.isclass(name.value))


def documentation(name: Name) -> str:
  """The docstring of a name, or the comment of an assigned one; '' if none."""
  if _assigned(name):
    comments = (_assignment(path)[1] for path in name.paths)
    return next(filter(None, comments), '')
  text = inspect.getdoc(inspect.unwrap(name.value)) or ''
  # What NamedTuple and dataclasses write themselves.
  bare = re.match(rf'{re.escape(name.value.__name__)}\(', text)
  return '' if bare else text


def undocumented() -> list[str]:
  """Public names without documentation."""
  return [n.short for n in public_names() if not documentation(n).strip()]


def summary(name: Name) -> str:
  """The first sentence of the documentation, as one line of Markdown."""
  first = documentation(name).strip().split('\n\n')[0]
  first = re.sub(r':math:`([^`]*)`', r'$\1$', ' '.join(first.split()))
  return first.replace('|', r'\|')


def page(name: Name) -> str:
  """The Markdown of the page of one name."""
  title = f'---\ntitle: {name.short}\n---\n\n'
  others = ', '.join(
    f'`{p.replace("bilevel_jax", "bj", 1)}`' for p in name.paths[1:]
  )
  also = f'Also {others}.\n\n' if others else ''
  if _assigned(name):
    statements = (_assignment(path)[0] for path in name.paths)
    statement = next(filter(None, statements), '')
    code = f'```python\n{statement}\n```'
    return f'# {name.short}\n\n{documentation(name)}\n\n{code}\n\n{also}'
  heading = f'    options:\n      heading: {name.short}\n'
  return f'{title}::: {name.paths[0]}\n{heading}\n{also}'


def index(path: str, module: Any) -> str:
  """The Markdown of the page of a module: its docstring and its names."""
  short = path.replace('bilevel_jax', 'bj', 1)
  rows = [
    f'| [`{name.short.rpartition(".")[2]}`](/{name.page}) | {summary(name)} |'
    for name in sorted(public_names(), key=lambda n: n.short.lower())
    if f'{path}.{name.short.rpartition(".")[2]}' in name.paths
  ]
  table = '\n'.join(['| name | |', '| --- | --- |', *rows])
  text = inspect.getdoc(module) or ''
  if path == 'bilevel_jax':
    text = 'The names used most, `import bilevel_jax as bj`.'
  return f'# {short}\n\n{text}\n\n## Names {{: #names}}\n\n{table}\n'


def pages() -> dict[str, str]:
  """All pages of the reference, by their place in the site."""
  texts = {name.page: page(name) for name in public_names()}
  for path, module in namespaces().items():
    folder = '/'.join(['api', *path.split('.')[1:]])
    texts[f'{folder}/index.md'] = index(path, module)
  return texts
