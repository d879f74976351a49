"""The rules of CONTRIBUTING on language: names, phrases, lengths of documents.

Checks the library, the experiments and the documents. An exception is listed
with its reason.
"""

import ast
import collections
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Participles, pronouns and fragments, which do not say what a value is.
NAMES = frozenset(
  (
    *('found', 'said', 'told', 'made', 'given', 'kept', 'held', 'seen'),
    *('ours', 'theirs', 'mine', 'who', 'whole', 'worth', 'sure', 'looks'),
    *('least', 'most', 'apart', 'beside', 'begun'),
  )
)
FUNCTION = re.compile(r'_*(of_\w+|\w+_of)')
PHRASES = re.compile(
  r'\b(that (is|are) none|is none of|of which|anew|likewise'
  r'|beside(?! the point)|so many|as it was|tells? of|with the mend|by itself'
  r'|nobody|somebody|a (seed|step|frame|row) (each|alone))\b',
  re.IGNORECASE,
)
# By file and name or phrase: why it stays.
EXCEPTIONS: dict[tuple[str, str], str] = {}
MAX_LINE, MAX_README_WORDS, MAX_PAPER_WORDS = 200, 900, 6_000


def folder(name: str) -> str:
  """The part of the project that a file belongs to."""
  parts = pathlib.PurePath(name).parts
  depth = 2 if parts[0] == 'experiments' and len(parts) > 2 else 1
  return '/'.join(parts[:depth]) if len(parts) > 1 else 'top'


@functools.cache
def texts() -> dict[str, str]:
  """All checked files by name."""
  patterns = ('bilevel_jax/**/*.py', 'experiments/**/*.py', '*.md')
  patterns += ('docs/**/*.md', 'experiments/**/*.md')
  return {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8')
    for pattern in patterns
    for path in sorted(ROOT.glob(pattern))
  }


def examine(code: str) -> tuple[set[str], str]:
  """Returns the banned names of a module, and its prose without line breaks.

  Prose are docstrings, other strings, and comments.
  """
  banned, strings = set(), []
  for node in ast.walk(ast.parse(code)):
    kind, name = type(node), ''
    if kind is ast.Constant:
      if isinstance(node.value, str):
        strings.append(node.value)
    elif kind is ast.Name:
      name = node.id if isinstance(node.ctx, ast.Store) else ''
    elif kind is ast.Attribute:
      name = node.attr if isinstance(node.ctx, ast.Store) else ''
    elif kind is ast.arg:
      name = node.arg
    elif kind in (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler):
      name = node.name or ''
      if kind is ast.FunctionDef and FUNCTION.fullmatch(name):
        banned.add(name)
    if name.strip('_') in NAMES:
      banned.add(name)
  joined = re.sub(r'\n *# ', ' ', code)  # The lines of a comment.
  comments = re.findall(r'(?:^|\s)# (.*)', joined, re.MULTILINE)
  return banned, '\n'.join(' '.join(x.split()) for x in (*strings, *comments))


@functools.cache
def violations() -> dict[str, list[tuple[str, str]]]:
  """Files with their banned names and phrases, by folder."""
  by_folder = collections.defaultdict(list)
  for path, text in texts().items():
    banned = set()
    if path.endswith('.py'):
      banned, text = examine(text)
    text = ' '.join(text.split())
    banned |= {x[0].lower() for x in PHRASES.finditer(text)}
    by_folder[folder(path)] += [(path, name) for name in sorted(banned)]
  return by_folder


@pytest.mark.parametrize('name', sorted({folder(path) for path in texts()}))
def test_names_and_phrases(name):
  wrong = [x for x in violations().get(name, []) if x not in EXCEPTIONS]
  assert not wrong, '\n'.join(f'{path}: {what}' for path, what in wrong)


def test_exceptions_are_in_use():
  every = {x for wrong in violations().values() for x in wrong}
  assert set(EXCEPTIONS) <= every
  assert all(EXCEPTIONS.values())


def test_bad_names_and_phrases_are_detected():
  code = 'def of_x(found): # tells of\n  """Of\n  which."""\n  self.kept = y_of'
  banned, prose = examine(code)
  assert banned == {'of_x', 'found', 'kept'}
  phrases = [x[0] for x in PHRASES.finditer(prose)]
  assert phrases == ['Of which', 'tells of']


def count_words(text: str) -> int:
  """Words that a reader sees."""
  return len(re.sub(r'<!--.*?-->', '', text, flags=re.DOTALL).split())


def hide_generated(text):
  """Empties the lines that `experiments.tables` writes."""
  generated = re.compile(r'<!-- table: .*?<!-- end -->', re.DOTALL)
  return generated.sub(lambda match: '\n' * match[0].count('\n'), text)


def test_documents_have_short_lines():
  long = [
    f'{path}:{number}'
    for path, text in texts().items()
    if path.endswith('.md')
    for number, line in enumerate(hide_generated(text).splitlines(), 1)
    if len(line) > MAX_LINE and not line.startswith('|')
  ]
  assert not long, '\n'.join(long)


def test_readmes_are_short():
  assert count_words(texts()['README.md']) <= MAX_README_WORDS
  papers = {
    path: count_words(text)
    for path, text in texts().items()
    if re.fullmatch(r'experiments/\w+/README\.md', path)
  }
  assert sum(papers.values()) <= MAX_PAPER_WORDS, papers
