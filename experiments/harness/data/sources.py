"""Finds data sets and identifies them by their content."""

import contextlib
import hashlib
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.harness.app import errors
from experiments.harness.data import reading
from experiments.harness.store import files

# Digests of the arrays of data sets, or of their training and test parts.
_PARTS = {
  'MNIST': ('fb3dfac15aee177ffefe98c4', 'd6dc1142089d21aa0f330572'),
  'Fashion-MNIST': ('afc71080c3828f531e9d92bf', 'f683ba0ee58a0244d683784f'),
  'sarcos': ('1479e3aa60237a37f27135ee',),
  'adult': ('5fcc36dffe15f28d8df49015',),
  'school': ('d76d82c3e56ea0f1dc717d0b',),
  'a9a': ('ab9dd9ebe9eeb59c175bb556',),
  'magic': ('1d851bc0cd6a99c6d62349ae',),
  'AN4': ('c705c4e1f7e24b110a11a64c',),
  'FSDD': ('7cab764afec723fed589e66e',),
}
_KNOWN = {digest: name for name, parts in _PARTS.items() for digest in parts}


class Source(NamedTuple):
  """The identity of data.

  Attributes:
    name: name of a known data set, otherwise a description.
    words: one line for people, without a full stop.
    digest: hex digests of the parts, joined by dashes.
  """

  name: str
  words: str
  digest: str


def identify_source(
  words: str, *parts: Sequence[np.ndarray], otherwise: str
) -> Source:
  """Identifies a data set by its content.

  Args:
    words: one line for people.
    *parts: the arrays of each part; a data set is known if all its parts are.
    otherwise: the name of unknown data.

  Returns:
    A `Source`.
  """
  digests = [_digest(part) for part in parts]
  names = {_KNOWN.get(digest, otherwise) for digest in digests}
  name = names.pop() if len(names) == 1 else otherwise
  return Source(name, words, '-'.join(digests))


def _digest(arrays):
  total = hashlib.blake2b(digest_size=12)
  for array in map(np.ascontiguousarray, arrays):
    total.update(f'{array.dtype.str}{array.shape}'.encode())
    total.update(array.data if array.size else b'')
  return total.hexdigest()


def substituted(data: Sequence[Source], published: Sequence[str]) -> str:
  """Names the data that replace the published data sets.

  Args:
    data: the data that were read.
    published: names of the published data sets.

  Returns:
    '' if all of them were read, otherwise the names of the other data.
  """
  names = {source.name for source in data}
  if names.issuperset(published):
    return ''
  return ', '.join(sorted(names.difference(published))) or 'a part of the data'


def find(
  data_dir: files.Path | None,
  names: Sequence[str],
  *,
  folders: Sequence[str] = ('',),
  advice: str,
  is_folder: bool = False,
) -> pathlib.Path:
  """Finds a file or folder of a data set.

  Args:
    data_dir: folder of data sets, or None.
    names: possible names.
    folders: possible subfolders, in order.
    advice: where to get the data, for the message.
    is_folder: whether to find a folder.

  Returns:
    The first match.

  Raises:
    MissingDataError: if there is no match.
    DamagedDataError: if the only match is a pipe or a device.
  """
  irregular = None
  for folder in folders if data_dir is not None else ():
    for name in names:
      path = pathlib.Path(data_dir) / folder / name
      with contextlib.suppress(OSError, ValueError):
        if path.is_dir() if is_folder else path.is_file():
          return path
        if path.exists() and not (is_folder or path.is_dir()):
          irregular = irregular or path
  if irregular is not None:
    reading.check_regular(irregular)
  where = 'no --data_dir is given' if data_dir is None else f'not in {data_dir}'
  raise errors.MissingDataError(
    f'{" or ".join(names[:2])} is missing ({where}): {advice}.'
  )
