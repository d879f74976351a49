"""Files of a run: written atomically, with digests that reveal damage."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import stat
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from experiments.harness.app import errors

Path = str | os.PathLike[str]


@contextlib.contextmanager
def writing(folder: Path):
  """Turns an OSError inside into a `WriteError` with the reason and a remedy.

  Args:
    folder: folder that is written to, for the message.

  Yields:
    Nothing.

  Raises:
    WriteError: from an OSError.
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
  """Creates a folder with its parents; returns its absolute path."""
  folder = pathlib.Path(folder).absolute()
  with writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
  return folder


def check_writable(folder: Path) -> None:
  """Creates a folder, and checks that it can be written to.

  Args:
    folder: folder of a run, before it does any work.

  Raises:
    WriteError: if it cannot be created or written to, or its name is not in
      UTF-8, which the writer of checkpoints expects.
  """
  try:
    os.path.abspath(folder).encode()
  except UnicodeEncodeError:
    raise errors.WriteError(
      errno.EILSEQ,
      f'{os.fspath(folder)!r} is no name in UTF-8: give another folder '
      '(--workdir=...)',
    ) from None
  folder = make_folder(folder)
  with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
    file.write(b'0')


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
  """Locks a folder against other processes; a kill releases the lock.

  Args:
    folder: an existing folder, where `.lock` gets the process id.

  Yields:
    Nothing.

  Raises:
    BusyError: if another process has locked it.
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
        f'another process{holder and f" ({holder})"} is using {folder}. '
        'Wait for it, or give another --workdir.'
      ) from None
    except OSError:
      pass  # The file system has no locks.
    with writing(folder):
      file.truncate(0)
      file.write(f'pid {os.getpid()}')
      file.flush()
    yield


def is_writer() -> bool:
  """Whether this process writes results: only the first of several does."""
  # Tested first: `process_index` starts a backend, which may take the
  # accelerator from another process.
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def write_bytes(path: Path, content: bytes) -> None:
  """Writes a file atomically; does nothing in processes other than the first.

  Args:
    path: the file; its folder is created.
    content: the content.

  Raises:
    WriteError: if it cannot be written or is a folder.
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
  """Writes a text in UTF-8; see `write_bytes`."""
  write_bytes(path, text.encode())


_DIGEST = '_digest'
_KINDS = {
  stat.S_IFDIR: 'a folder',
  stat.S_IFIFO: 'a named pipe',
  stat.S_IFSOCK: 'a socket',
}


def seal(values: Mapping[str, Any], **options: Any) -> str:
  """Formats values as JSON with a digest.

  Args:
    values: plain values by name.
    **options: options of `json.dumps`.

  Returns:
    The text.
  """
  return json.dumps({**values, _DIGEST: _digest(values)}, **options)


def unseal(text: str | bytes) -> dict[str, Any]:
  """Parses a text that `seal` formatted.

  Raises:
    ValueError: if the text is damaged.
  """
  try:
    values = json.loads(text)
    if values.pop(_DIGEST) == _digest(values):
      return values
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
    pass
  raise ValueError('its content does not match its digest')


def describe_irregular(path: Path) -> str:
  """Says what a path is that is no regular file; '' for a file or nothing."""
  try:
    kind = stat.S_IFMT(os.stat(path).st_mode)
  except OSError:
    return ''
  return '' if kind == stat.S_IFREG else _KINDS.get(kind, 'a device')


def read_sealed(path: Path, then: str) -> dict[str, Any] | None:
  """Reads a file that `seal` formatted.

  Args:
    path: the file. If it is damaged or no regular file, it is moved to the
      subfolder `damaged` of its folder with a warning.
    then: what happens next, for the warning.

  Returns:
    The values; None if the file is missing or damaged.
  """
  path = pathlib.Path(path)
  kind = describe_irregular(path)
  try:
    if kind:
      raise ValueError(kind)
    return unseal(path.read_bytes())
  except FileNotFoundError:
    return None
  except ValueError as reason:
    put_aside(path, f'{path} is damaged ({reason}): {then}', path.parent)
    return None


def _digest(values: Mapping[str, Any]) -> str:
  text = json.dumps(values, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def put_aside(path: Path, what: str, folder: Path) -> None:
  """Moves a damaged file or folder to the subfolder `damaged`, and warns.

  Args:
    path: the file or folder; only the first of several processes moves it.
    what: what is wrong and what happens next, for the warning.
    folder: folder where `damaged` is created.
  """
  path = pathlib.Path(path)
  damaged = make_folder(pathlib.Path(folder) / 'damaged')
  if is_writer():
    target = damaged / path.name
    while target.exists():
      target = target.with_name(target.name + '_')
    with writing(folder):
      path.rename(target)
  warnings.warn(f'{what}; moved to {damaged}.', RuntimeWarning, stacklevel=3)
