"""Broken files of rows and of scores."""

import gzip
import json
import os

from tests.faults.corpus import models
from tests.faults.corpus.models import Case, edit, put, special

ROWS, LIST, PACKED = 'rows.jsonl', 'rows.json', 'rows.jsonl.gz'
SCORES = 'scores.jsonl'
VALID = models.lines(models.ROWS)


def sparse(name):
  """A file of 3 GiB without a line end, which takes no space on the disk."""

  def damage(folder):
    with open(folder / name, 'wb') as file:
      file.truncate(3 * 2**30)

  return damage


def second(row):
  """Replaces the second row."""
  raw = row if isinstance(row, bytes) else json.dumps(row).encode()
  return put(ROWS, VALID.split(b'\n')[0] + b'\n' + raw + b'\n')


def bomb(mebibytes, start=b''):
  """Packs zeros, in parts that are equal."""

  def damage(folder):
    zeros = gzip.compress(bytes(2**20))
    (folder / PACKED).write_bytes(gzip.compress(start) + mebibytes * zeros)

  return damage


_SECOND = {
  'is cut short': b'{"prompt": "a", "respon',
  'is not UTF-8': b'{"prompt": "\xff", "response": "b"}',
  'has zero bytes': b'{"prompt": "a\0", "response": "b"}',
  'is deep': b'[' * 100_000 + b']' * 100_000,
  'is a deep object': b'{"prompt":' * 100_000 + b'1' + b'}' * 100_000,
  'has a number of many digits': b'{"prompt": ' + b'9' * 9_999 + b'}',
  'has a key twice': b'{"prompt": "a", "prompt": "b", "response": "c"}',
  'is a list': [1],
  'is null': None,
  'has two objects': b'{"prompt": "a"} {"response": "b"}',
  'has an unpaired surrogate': {'prompt': '\ud800', 'response': 'b'},
  'has single quotes': b"{'prompt': 'a', 'response': 'b'}",
  'lacks its answer': {'prompt': 'a'},
  'has a number for its answer': {'prompt': 'a', 'response': 1},
  'has an empty answer': {'prompt': 'a', 'response': ' '},
  'has other keys': {'texts': 'a'},
  'has an unknown role': {'messages': [{'role': 'x', 'content': 'a'}]},
  'has a message that is a text': {'messages': ['a']},
  'has no turn of a user': {
    'messages': [{'role': 'assistant', 'content': 'a'}]
  },
  'has an unwanted answer': {'prompt': 'a', 'response': 'b', 'label': False},
  'has a tool': {'prompt': 'a', 'response': 'b', 'tools': ['x']},
  'has one answer of two': {'prompt': 'a', 'chosen': 'b'},
  'has a label of NaN': b'{"prompt": "a", "response": "b", "label": NaN}',
}
CASES = {
  f'{ROWS}: a row {name}': Case('rows', ROWS, 'line 2', second(row))
  for name, row in _SECOND.items()
}
_FILES = {
  'is empty': ('no rows', put(ROWS, b'')),
  'has blank lines only': ('no rows', put(ROWS, b'\n \n')),
  'is UTF-16': ('line 1', put(ROWS, VALID.decode().encode('utf-16'))),
  'is missing': ('no file', lambda folder: (folder / ROWS).unlink()),
  'is a line of 3 GiB': ('line 1: .*bytes', sparse(ROWS)),
  'is a folder': ('folder', special(ROWS, lambda path: path.mkdir())),
  'is a FIFO': ('regular', special(ROWS, os.mkfifo)),
  'is a device': (
    'regular',
    special(ROWS, lambda path: path.symlink_to('/dev/zero')),
  ),
  'is a link to itself': (
    'link',
    special(ROWS, lambda path: path.symlink_to(path)),
  ),
}
CASES |= {
  f'{ROWS} {name}': Case('rows', ROWS, cause, damage)
  for name, (cause, damage) in _FILES.items()
}
_LISTS = {
  'is empty': ('JSON', put(LIST, b'')),
  'is a line of 3 GiB': ('line 1: .*bytes', sparse(LIST)),
  'is an object': ('list|keys', put(LIST, b'{"a": 1}')),
  'is cut short': ('JSON', edit(LIST, lambda raw: raw[:-3])),
  'is deep': ('nested', put(LIST, b'[' * 100_000 + b']' * 100_000)),
  'is not UTF-8': ('UTF-8', put(LIST, b'[{"prompt": "\xff"}]')),
  'has a row that is a number': ('row 0', put(LIST, b'[1]')),
  'has a key twice': ('more than once', put(LIST, b'[{"a": 1, "a": 2}]')),
}
CASES |= {
  f'{LIST} {name}': Case('list', LIST, cause, damage)
  for name, (cause, damage) in _LISTS.items()
}
_GZIP = {
  'is not packed': ('', put(PACKED, VALID)),
  'is empty': ('', put(PACKED, b'')),
  'is cut short': ('', put(PACKED, gzip.compress(VALID)[:-9])),
  'has a wrong sum': ('', put(PACKED, gzip.compress(VALID)[:-8] + bytes(8))),
  'has text after its end': ('', put(PACKED, gzip.compress(VALID) + b'abc')),
  'is packed twice': (
    'line 1',
    put(PACKED, gzip.compress(gzip.compress(VALID))),
  ),
  'is a FIFO': ('regular', special(PACKED, os.mkfifo)),
}
CASES |= {
  f'{PACKED} {name}': Case('packed', PACKED, cause, damage)
  for name, (cause, damage) in _GZIP.items()
}
CASES |= {
  f'{PACKED} unpacks to 3 GiB': Case(
    'packed', PACKED, 'line 1|unpack', bomb(3_000), heavy=True
  ),
  f'{PACKED} has millions of empty objects': Case(
    'packed',
    PACKED,
    'lines: .*unpack',
    put(PACKED, gzip.compress(b'{}\n' * 2**21)),
  ),
  f'{PACKED} unpacks to 300 MiB after a row': Case(
    'packed', PACKED, 'line|unpack', bomb(300, VALID), heavy=True
  ),
}
_SCORES = {
  'has no row numbers': [{'seal': 1.0}],
  'skips a row': [{'row': 1, 'seal': 1.0}],
  'has a text for a score': [{'row': 0, 'seal': 'high'}],
  'has a list for a score': [{'row': 0, 'seal': [1, 2]}],
  'has an object for a score': [{'row': 0, 'seal': {'a': 1}}],
  'has true for a score': [{'row': 0, 'seal': True}],
  'has NaN for a score': [{'row': 0, 'seal': float('nan')}],
  'lacks a score': [{'row': 0, 'seal': 1.0}, {'row': 1}],
  'has a score of 400 digits': [{'row': 0, 'seal': 10**400}],
  'lacks a kind': [{'row': 0, 'seal': 1.0, 'kind': 'a'}, {'row': 1, 'seal': 2}],
  'has a number for a kind': [{'row': 0, 'seal': 1.0, 'kind': 1}],
  'has no scores': [{'row': 0}],
}
CASES |= {
  f'{SCORES} {name}': Case(
    'scores', SCORES, '', put(SCORES, models.lines(rows))
  )
  for name, rows in _SCORES.items()
}
