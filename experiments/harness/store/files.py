"""A run's own files: atomic, with one clear error, and known if damaged."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from experiments.harness.app import errors

Path = str | os.PathLike[str]


@contextlib.contextmanager
def writing(folder: Path):
  """Turns any failure to write into one OSError that says what to do.

  Args:
    folder: what is being written to; named in the message.

  Yields:
    Nothing.

  Raises:
    WriteError: from an OSError inside, with folder, reason and mend.
  """
  try:
    yield
  except OSError as error:
    reason = error.strerror or str(error)
    raise errors.WriteError(
      error.errno,
      f'cannot write to {os.fspath(folder)}: {reason}. Free some space or '
      'give a writable folder (--workdir=...); what was saved before is '
      'intact, and the same command resumes from it',
    ) from error


def make_folder(folder: Path) -> pathlib.Path:
  """Makes a folder with its parents, and returns its absolute path."""
  folder = pathlib.Path(folder).absolute()
  with writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
  return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
  """Keeps other processes out of a folder, until the end or a kill.

  Args:
    folder: must exist; gets a file `.lock` with the number of the process.

  Yields:
    Nothing.

  Raises:
    BusyError: if another process holds it.
    WriteError: if the folder cannot be written.
  """
  folder = pathlib.Path(folder)
  with writing(folder):
    file = open(folder / '.lock', 'a+', encoding='utf-8')  # noqa: SIM115
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      holder = file.read().strip()
      raise errors.BusyError(
        f'another process{holder and f" ({holder})"} is at work in {folder}. '
        'Wait for it, or give another --workdir.'
      ) from None
    except OSError:
      pass  # A file system without locks: go on without.
    with writing(folder):
      file.truncate(0)
      file.write(f'pid {os.getpid()}')
      file.flush()
    yield


def is_writer() -> bool:
  """Whether this process writes results: of several, the first one."""
  # Asked first: the index of a process that is alone would start a backend,
  # which may take the accelerator from a process that needs it.
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def write_bytes(path: Path, content: bytes) -> None:
  """Writes a file so that a kill leaves the old one or the new one.

  Of several processes, the first writes and the others do nothing.

  Args:
    path: the file; its folder is made.
    content: the whole content.

  Raises:
    WriteError: if it cannot be written, or is a folder; names it.
  """
  if not is_writer():
    return
  path = pathlib.Path(path)
  if path.is_dir():
    raise errors.WriteError(
      errno.EISDIR, f'cannot write {path}: it is a folder. Name a file in it'
    )
  make_folder(path.parent)
  temporary = path.with_name(path.name + '.tmp')
  with writing(path.parent):
    with open(temporary, 'wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
  """Like `write_bytes`, in UTF-8."""
  write_bytes(path, text.encode())


_DIGEST = '_digest'


def seal(values: Mapping[str, Any], **options: Any) -> str:
  """JSON that knows whether it is damaged.

  Args:
    values: plain values by name.
    **options: of `json.dumps`.

  Returns:
    The text: the values and a digest of them.
  """
  return json.dumps({**values, _DIGEST: _digest(values)}, **options)


def unseal(text: str | bytes) -> dict[str, Any]:
  """The values that `seal` was given.

  Raises:
    ValueError: if the text is any other than what `seal` made of them.
  """
  try:
    values = json.loads(text)
    if values.pop(_DIGEST) == _digest(values):
      return values
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
    pass
  raise ValueError('its content does not match its digest')


def _digest(values: Mapping[str, Any]) -> str:
  text = json.dumps(values, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def put_aside(path: Path, what: str, folder: Path) -> None:
  """Warns of something damaged, and keeps it in the folder `damaged`.

  Args:
    path: the file or folder; the first of several processes moves it.
    what: what is wrong and what happens now, for the warning.
    folder: in which `damaged` is made.
  """
  path, kept = pathlib.Path(path), make_folder(pathlib.Path(folder) / 'damaged')
  if is_writer():
    target = kept / path.name
    while target.exists():
      target = target.with_name(target.name + '_')
    with writing(folder):
      path.rename(target)
  warnings.warn(f'{what}; moved to {kept}.', RuntimeWarning, stacklevel=3)
