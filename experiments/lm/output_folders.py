"""Protects folders of weights: a run overwrites only its own files."""

import pathlib
from collections.abc import Callable
from typing import Any

from experiments import harness
from experiments.harness.store import files

_MODEL = ('model.safetensors', 'model-*-of-*.safetensors')
_OTHERS = ('model.safetensors.index.json', 'adapters/adapter_model.safetensors')


def require_own(workdir: files.Path, folder: files.Path) -> None:
  """Checks before a run that its weights can be written.

  Args:
    workdir: folder of the run, which records its files.
    folder: output folder.

  Raises:
    UserError: if the folder has weights of another origin, or the run's weights
      were changed; or if safetensors is not installed.
  """
  harness.load_extra('safetensors.numpy', 'llm', 'writing *.safetensors')
  folder = pathlib.Path(folder).resolve()
  existing = [
    *folder.glob('*.safetensors'),
    *folder.glob('adapters/*.safetensors'),
  ]
  if existing and not _is_own(_records(workdir).get(str(folder)), folder):
    raise harness.UserError(
      f'{folder} already has weights, which this run has not written: give '
      'another --output.'
    )


def write(
  workdir: files.Path,
  folder: files.Path,
  stamp: str,
  make: Callable[[pathlib.Path], Any],
) -> None:
  """Writes weights, unless the folder is up to date.

  Args:
    workdir: folder of the run.
    folder: output folder; created if missing.
    stamp: identifies the weights, for instance the number of updates; an equal
      stamp of an earlier call skips writing. '' always writes.
    make: called with the folder to write into it.

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
  # Recorded first, so that a killed run still owns the folder.
  _record(workdir, name, {'stamp': '', 'file': None})
  for file in (*_files(folder), *(folder / name for name in _OTHERS)):
    file.unlink(missing_ok=True)
  make(folder)
  _record(workdir, name, {'stamp': stamp, 'file': _state(folder)})


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of a model's weights."""
  return sorted(file for name in _MODEL for file in folder.glob(name))


def _state(folder: pathlib.Path) -> list[int] | None:
  """Returns sizes and times of the files, to detect changes."""
  stats = [file.stat() for file in _files(folder)]
  return [n for s in stats for n in (s.st_size, s.st_mtime_ns)] or None


def _is_own(record: dict[str, Any] | None, folder: pathlib.Path) -> bool:
  # An unfinished write, or unchanged files.
  return record is not None and record['file'] in (None, _state(folder))


def _records(workdir: files.Path) -> dict[str, Any]:
  """Reads the run's records by folder; {} if they are missing or damaged."""
  try:
    return files.unseal((pathlib.Path(workdir) / 'written.json').read_bytes())
  except (OSError, ValueError):
    return {}


def _record(workdir: files.Path, name: str, record: dict[str, Any]) -> None:
  path = pathlib.Path(workdir) / 'written.json'
  text = files.seal(_records(workdir) | {name: record})
  files.write_bytes(path, text.encode())
