"""What BUILD should hold: one target for each module, binary and test.

`python -m tests.build_targets` rewrites BUILD; a test compares the two.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ('bilevel_jax', 'experiments', 'tests')
HEADER = (
  '# Made by `python -m tests.build_targets`; a test compares it with the '
  'files.\n\npackage(default_visibility = ["//visibility:public"])\n\n'
  'licenses(["notice"])\n'
)


def modules() -> dict[str, pathlib.Path]:
  """All modules by dotted name; a package has the name of its folder."""
  found = {}
  for folder in FOLDERS:
    for path in sorted((ROOT / folder).rglob('*.py')):
      parts = path.relative_to(ROOT).with_suffix('').parts
      name = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
      found[name] = path
  return found


def dependencies(
  name: str, path: pathlib.Path, known: dict[str, pathlib.Path]
) -> list[str]:
  """The modules of this project that a module imports at any place."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {
        inner
        if (inner := f'{node.module}.{alias.name}') in known
        else node.module
        for alias in node.names
      }
  return sorted((found & set(known)) - {name})


def target(
  name: str, path: pathlib.Path, known: dict[str, pathlib.Path]
) -> str:
  """The rule of one module."""
  text = path.read_text()
  if path.name.endswith('_test.py'):
    rule = 'py_test'
  elif "__name__ == '__main__'" in text:
    rule = 'py_binary'
  else:
    rule = 'py_library'
  relative = path.relative_to(ROOT).as_posix()
  lines = [f'    name = "{name}",', f'    srcs = ["{relative}"],']
  if rule != 'py_library':
    lines.append(f'    main = "{relative}",')
  deps = dependencies(name, path, known)
  if deps:
    lines.append('    deps = [')
    lines += [f'        ":{dep}",' for dep in deps]
    lines.append('    ],')
  return f'{rule}(\n' + '\n'.join(lines) + '\n)\n'


def build_file() -> str:
  """The text of BUILD."""
  known = modules()
  rules = [target(name, path, known) for name, path in known.items()]
  return '\n'.join([HEADER, *rules])


if __name__ == '__main__':
  (ROOT / 'BUILD').write_text(build_file())
