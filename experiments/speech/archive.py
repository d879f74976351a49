"""A data set's files, from a folder or from its gzipped tar archive alike."""

import os
import pathlib
import tarfile
from collections.abc import Callable, Sequence

from experiments import harness
from experiments.harness.data import sources
from experiments.harness.store import files

# Bytes that are taken out of an archive, at most.
MOST = 2**30


def read(
  data_dir: files.Path | None,
  *,
  folder: str,
  archive: str,
  wanted: Callable[[str], bool],
  folders: Sequence[str],
  advice: str,
) -> tuple[pathlib.Path, dict[str, bytes]]:
  """Reads the files of a data set that is small enough to be held.

  Args:
    data_dir: folder of data sets.
    folder: of this one; its files' names are below it.
    archive: the file with the same folder in it.
    wanted: which files are read, by name below the folder.
    folders: where either may be, below `data_dir`.
    advice: where to get it, for the message.

  Returns:
    What was read, the folder or the archive, and the content of files by name.

  Raises:
    MissingDataError: if neither is there.
    DamagedDataError: if the archive is damaged, or has too much.
  """
  names = [folder, archive]
  if data_dir is not None:
    for place in folders:
      path = pathlib.Path(data_dir) / place / folder
      if path.is_dir():
        return path, _from_folder(path, wanted)
  path = sources.find(data_dir, names, folders=folders, advice=advice)
  with sources.parsing(path, 'gzipped tar archive'):
    return path, _from_archive(path, folder, wanted)


def _from_folder(path, wanted):
  found = {}
  for place, inner, names in os.walk(path):
    inner.sort()
    for name in sorted(names):
      file = pathlib.Path(place) / name
      below = file.relative_to(path).as_posix()
      if wanted(below):
        with sources.parsing(file, 'file that can be read', (OSError,)):
          found[below] = file.read_bytes()
  return found


def _from_archive(path, folder, wanted):
  found, total = {}, 0
  with tarfile.open(path, 'r:gz') as archive:
    for member in archive:
      inside = pathlib.PurePosixPath(member.name).parts
      if not member.isfile() or folder not in inside:
        continue
      below = '/'.join(inside[inside.index(folder) + 1 :])
      if not wanted(below):
        continue
      total += member.size
      if total > MOST:
        raise harness.DamagedDataError(
          f'{path} has more than the {MOST:,} bytes that are read.'
        )
      content = archive.extractfile(member)
      found[below] = content.read() if content else b''
  return found
