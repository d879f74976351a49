"""Folders of weights that a run writes: its own ones anew, others' never."""

import pathlib
from collections.abc import Callable
from typing import Any

from experiments import harness
from experiments.harness.store import files

_MODEL = ('model.safetensors', 'model-*-of-*.safetensors')
_OTHERS = ('model.safetensors.index.json', 'adapters/adapter_model.safetensors')


def require_own(workdir: files.Path, folder: files.Path) -> None:
  """Refuses what could not be written at the end of a run.

  Args:
    workdir: of the run; what it has written is kept there.
    folder: where weights are to be written.

  Raises:
    UserError: if there are weights of others, or what the run has written was
      changed since; or if the package that writes them is missing.
  """
  harness.load_extra('safetensors.numpy', 'llm', 'writing *.safetensors')
  folder = pathlib.Path(folder).resolve()
  there = [
    *folder.glob('*.safetensors'),
    *folder.glob('adapters/*.safetensors'),
  ]
  if there and not _is_own(_records(workdir).get(str(folder)), folder):
    raise harness.UserError(
      f'{folder} has weights already, which this run has not written: give '
      'another --output.'
    )


def write(
  workdir: files.Path,
  folder: files.Path,
  stamp: str,
  make: Callable[[pathlib.Path], Any],
) -> None:
  """Writes weights, unless they are there as they are to be.

  Args:
    workdir: of the run.
    folder: to be made, or written anew.
    stamp: of what the weights are, the number of updates for instance: where
      the run has written the same stamp, nothing is done. '' writes anew.
    make: writes into the folder, given it.

  Raises:
    UserError: as `require_own`.
  """
  require_own(workdir, folder)
  folder = pathlib.Path(folder)
  name = str(folder.resolve())
  record = _records(workdir).get(name)
  done = record is not None and record['file'] == _state(folder) is not None
  if stamp and done and record['stamp'] == stamp:
    return
  # From before the first file is there: a kill leaves a folder of this run.
  _keep(workdir, name, {'stamp': '', 'file': None})
  for file in (*_files(folder), *(folder / name for name in _OTHERS)):
    file.unlink(missing_ok=True)
  make(folder)
  _keep(workdir, name, {'stamp': stamp, 'file': _state(folder)})


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a model's weights: one, or several."""
  return sorted(file for name in _MODEL for file in folder.glob(name))


def _state(folder: pathlib.Path) -> list[int] | None:
  """Sizes and times, which tell files from those written in their place."""
  stats = [file.stat() for file in _files(folder)]
  return [n for s in stats for n in (s.st_size, s.st_mtime_ns)] or None


def _is_own(record: dict[str, Any] | None, folder: pathlib.Path) -> bool:
  # Begun and not ended, or what was written last.
  return record is not None and record['file'] in (None, _state(folder))


def _records(workdir: files.Path) -> dict[str, Any]:
  """What a run has written, by folder; of a damaged file, nothing."""
  try:
    return files.unseal((pathlib.Path(workdir) / 'written.json').read_bytes())
  except (OSError, ValueError):
    return {}


def _keep(workdir: files.Path, name: str, record: dict[str, Any]) -> None:
  path = pathlib.Path(workdir) / 'written.json'
  text = files.seal(_records(workdir) | {name: record})
  files.write_bytes(path, text.encode())
