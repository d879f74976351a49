"""Writing files: atomically, and with one clear error where that fails."""

import contextlib
import os
import pathlib

from experiments.harness import errors

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


def write_bytes(path: Path, content: bytes) -> None:
  """Writes a file so that a kill leaves the old one or the new one.

  Args:
    path: the file; its folder is made.
    content: the whole content.

  Raises:
    WriteError: if it cannot be written; names the folder.
  """
  path = pathlib.Path(path)
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
