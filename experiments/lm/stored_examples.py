"""Examples that stay in their file, for files that exceed the memory."""

import array
import pathlib
from collections.abc import Sequence

from experiments.harness.store import files
from experiments.lm import data, row_files


class StoredExamples(Sequence[data.Example]):
  """Examples of a .jsonl file, which are parsed when they are read.

  Args:
    path: the file, for `data.read(store=)`, which adds the examples.
    folder: folder into which a .jsonl.gz file is unpacked.
  """

  def __init__(self, path: str | pathlib.Path, folder: files.Path = '.'):
    self.path = pathlib.Path(path)
    self._unpacked = row_files.unpack(path, folder)
    # Of each example: the offset and the number of its row, and its instance.
    self._places = array.array('q')

  def add(self, row: row_files.Row, count: int) -> None:
    """Adds the examples of a row."""
    for instance in range(count):
      self._places.extend((row.offset, row.number, instance))

  def __len__(self) -> int:
    return len(self._places) // 3

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(i)
    offset, number, instance = self._places[3 * i : 3 * i + 3]
    row = row_files.read_row(self._unpacked, offset, number)
    return data.as_examples(row.value or {}, number)[instance]
