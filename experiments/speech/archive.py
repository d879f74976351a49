"""Files of a small data set, from a folder or its gzipped tar archive."""

import os
import pathlib
import tarfile
from collections.abc import Callable, Sequence

from experiments import harness
from experiments.harness.data import reading, sources
from experiments.harness.store import files

# Largest total size of the files that are read from an archive, bytes.
MAX_BYTES = 2**30


def read(
  data_dir: files.Path | None,
  *,
  folder: str,
  archive: str,
  wanted: Callable[[str], bool],
  folders: Sequence[str],
  advice: str,
) -> tuple[pathlib.Path, dict[str, bytes]]:
  """Reads the files of a data set into memory.

  Args:
    data_dir: folder of data sets.
    folder: name of the data set's folder; file names are relative to it.
    archive: name of the archive that contains this folder.
    wanted: selects files by their name.
    folders: places of the folder or the archive below `data_dir`.
    advice: where to get the data, for the error message.

  Returns:
    The path of the folder or archive, and the content of files by name.

  Raises:
    MissingDataError: if both are missing.
    DamagedDataError: if the archive is damaged or too large.
  """
  names = [folder, archive]
  if data_dir is not None:
    for place in folders:
      path = pathlib.Path(data_dir) / place / folder
      if path.is_dir():
        return path, _from_folder(path, wanted)
  path = sources.find(data_dir, names, folders=folders, advice=advice)
  with reading.parsing(path, 'gzipped tar archive'):
    return path, _from_archive(path, folder, wanted)


def _from_folder(path, wanted):
  contents, left = {}, MAX_BYTES
  for place, inner, names in os.walk(path):
    inner.sort()
    for name in sorted(names):
      file = pathlib.Path(place) / name
      below = file.relative_to(path).as_posix()
      if wanted(below):
        reading.check_inside(file, path)
        contents[below] = reading.read_small(file, 'data set', left)
        left -= len(contents[below])
  return contents


def _from_archive(path, folder, wanted):
  contents, total = {}, 0
  size = reading.check_regular(path)
  # As a stream, since seeking in a compressed file would decompress it again.
  with (
    reading.opened(path, 'gzipped tar archive') as file,
    tarfile.open(fileobj=file, mode='r|') as archive,
  ):
    for member in archive:
      where = f'{path}, {reading.shorten(member.name)}'
      reading.check_growth(where, size, member.offset_data + member.size)
      inside = pathlib.PurePosixPath(member.name).parts
      if not member.isfile() or folder not in inside:
        continue
      below = '/'.join(inside[inside.index(folder) + 1 :])
      if not wanted(below):
        continue
      if member.issparse() or member.size < 0:
        raise reading.damaged(where, 'its size is not that of its content')
      total += member.size
      if total > MAX_BYTES:
        raise harness.DamagedDataError(
          f'{path} has more than {MAX_BYTES:,} bytes of files, the limit: '
          'unpack it.'
        )
      content = archive.extractfile(member)
      contents[below] = content.read() if content else b''
    while file.read(2**20):
      pass  # The checksum is at the end.
  return contents
