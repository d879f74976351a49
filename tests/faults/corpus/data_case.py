"""What cases of the corpus share: a broken file, its place, and its reader."""

import gzip
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Folder = pathlib.Path


class Case(NamedTuple):
  """A broken file.

  Attributes:
    name: group and fault.
    file: path of the broken file, which the error names.
    make: writes it into a folder.
    read: reads the folder with a loader.
    place: regular expression of the line or key in the error; '' for faults of
      the whole file.
    package: package that the loader needs; '' for none.
  """

  name: str
  file: str
  make: Callable[[Folder], None]
  read: Callable[[Folder], Any]
  place: str = ''
  package: str = ''


class Piped(NamedTuple):
  """A named pipe instead of a file, which blocks who opens it."""


class Linked(NamedTuple):
  """A symbolic link instead of a file."""

  target: str


Content = bytes | str | Piped | Linked | None
# The place of a fault for which the error names the folder of the data.
FOLDER = ' '
PIPE, ZERO, OUTSIDE = Piped(), Linked('/dev/zero'), Linked('/etc/passwd')
# Objects that are no regular files, for each loader that opens a path.
IRREGULAR: Mapping[str, Content] = {
  'named pipe': PIPE,
  'link to a device': ZERO,
  'folder': None,
}


def put(path: Folder, content: Content) -> None:
  """Writes a file, a pipe or a link, or makes a folder for None."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.is_symlink() or path.is_file():
    path.unlink()
  if content is None:
    path.mkdir()
  elif isinstance(content, Piped):
    os.mkfifo(path)
  elif isinstance(content, Linked):
    path.symlink_to(content.target)
  elif isinstance(content, str):
    path.write_text(content, encoding='utf-8')
  else:
    path.write_bytes(content)


def cases(
  group: str,
  file: str,
  read: Callable[[Folder], Any],
  contents: Mapping[str, Any],
  *,
  others: Mapping[str, Content] | None = None,
  package: str = '',
) -> list[Case]:
  """Makes a case for each content of a file.

  Args:
    group: first part of the names of the cases.
    file: path of the file.
    read: reads the folder.
    contents: by fault, the content or a function of no argument that makes it,
      or a pair of it and the place.
    others: valid files in the folder, by path.
    package: see `Case`.
  """

  def case(fault, value):
    content, place = value if type(value) is tuple else (value, '')

    def make(folder):
      for name, other in (others or {}).items():
        put(folder / name, other() if callable(other) else other)
      put(folder / file, content() if callable(content) else content)

    return Case(f'{group}: {fault}', file, make, read, place, package)

  return [case(*item) for item in contents.items()]


def bomb(start: bytes, mebibytes: int, piece: bytes = b'', wbits: int = 31):
  """Compresses a start and many equal pieces, as gzip does by default."""
  piece = piece or bytes(2**10)
  pack = zlib.compressobj(9, wbits=wbits)
  parts = [pack.compress(start)]
  block = piece * (2**20 // len(piece))
  parts += [pack.compress(block) for _ in range(mebibytes)]
  return b''.join([*parts, pack.flush()])


def cut(content: bytes) -> bytes:
  """The first half."""
  return content[: len(content) // 2]


def flipped(content: bytes, at: int) -> bytes:
  """A content with one bit changed."""
  changed = bytearray(content)
  changed[at] ^= 1
  return bytes(changed)


HTML = '<!DOCTYPE html><html><body>404: not found</body></html>\n'
PNG = b'\x89PNG\r\n\x1a\n' + bytes(64)
JSON = '{"message": "rate limit exceeded"}\n'
ZIP = b'PK\x03\x04' + bytes(64)
packed = gzip.compress
