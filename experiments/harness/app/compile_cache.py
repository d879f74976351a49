"""Compiled programs kept on disk, so that a later process need not compile.

JAX keys a program by its code, its options and the version of jaxlib. Here the
processor is added: a home folder may be shared by unlike machines. Entries are
written atomically and carry a digest, so processes may share the folder, and a
damaged entry is compiled again. The least recently used entries go first.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import sys
import tempfile
import time

import jax
from jax._src import compilation_cache

Path = str | os.PathLike[str]

# A folder, or OFF. JAX's own JAX_COMPILATION_CACHE_DIR takes precedence.
VARIABLE = 'BILEVEL_JAX_COMPILE_CACHE'
OFF = 'off'
# Size of all entries, in bytes. A program takes 10 to 200 kB.
MAX_BYTES = 2**30
# Lines of /proc/cpuinfo that the compiler chooses instructions by.
_CPUINFO = pathlib.Path('/proc/cpuinfo')
_CPU_LINES = (
  *('vendor_id', 'cpu family', 'model', 'flags'),
  *('CPU implementer', 'CPU architecture', 'CPU variant', 'CPU part'),
  'Features',
)
# Variables by which XLA divides a program among threads.
_THREAD_VARIABLES = ('NPROC', 'PJRT_NPROC')
_SUFFIX, _TEMPORARY = '.program', '.tmp'
# Age in s of a temporary file whose process was killed while it wrote.
_ABANDONED = 3_600
_DIGEST_SIZE = 16
_GET_FILE_CACHE = compilation_cache.get_file_cache


def use(folder: Path | None = None, *, max_bytes: int = MAX_BYTES) -> bool:
  """Keeps what this process compiles from now on in a folder.

  Args:
    folder: made if it does not exist; `off` keeps nothing. By default the
      environment variable BILEVEL_JAX_COMPILE_CACHE, else `default_folder()`.
    max_bytes: size of the folder above which old entries are removed.

  Returns:
    Whether programs are kept. Not if the folder cannot be used, which one
    line on stderr says; and not if JAX has been given a folder of its own.
  """
  if jax.config.jax_compilation_cache_dir and not _in_use():
    return False
  folder = folder or os.environ.get(VARIABLE) or default_folder()
  if os.fspath(folder) == OFF:
    return False
  folder = pathlib.Path(folder).expanduser().absolute()
  reason = _prepare(folder)
  if reason:
    _inform(folder, reason)
    return False
  store = Store(folder, max_bytes=max_bytes)
  jax.config.update('jax_compilation_cache_dir', str(folder))
  # Small programs too: what a run waits for is their number.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  # XLA's caches ignore the limit, and their folder changes the key.
  jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
  # JAX has no public hook for a store. Without this one, it would use its own
  # in the same folder, which neither repairs entries nor limits their size.
  compilation_cache.get_file_cache = lambda path: (store, path)
  # JAX decides at its first program whether there is a cache.
  compilation_cache.reset_cache()
  return True


def stop() -> None:
  """Undoes `use`, for tests."""
  if _in_use():
    jax.config.update('jax_compilation_cache_dir', None)
    compilation_cache.get_file_cache = _GET_FILE_CACHE
    compilation_cache.reset_cache()


def default_folder() -> pathlib.Path:
  """The user's cache folder, by the XDG convention."""
  # The convention has relative paths ignored.
  base = os.environ.get('XDG_CACHE_HOME', '')
  base = base if os.path.isabs(base) else os.path.expanduser('~/.cache')
  return pathlib.Path(base) / 'bilevel_jax' / 'programs'


def machine() -> str:
  """Describes the processor that programs are compiled for."""
  try:
    lines = _CPUINFO.read_text(encoding='utf-8', errors='replace').splitlines()
  except OSError:
    lines = []
  pairs = [[x.strip() for x in line.partition(':')[::2]] for line in lines]
  # Cores may differ, so all of their lines count, each once.
  features = {
    f'{name}: {" ".join(sorted(value.split()))}'
    for name, value in pairs
    if name in _CPU_LINES
  }
  if not features:
    # No other machine's programs where the system does not say.
    features = {platform.node(), platform.processor(), platform.platform()}
  threads = [f'{name}={os.environ.get(name)}' for name in _THREAD_VARIABLES]
  if hasattr(os, 'sched_getaffinity'):
    threads.append(f'cores={len(os.sched_getaffinity(0))}')
  return '\n'.join([platform.machine(), *sorted(features), *threads])


class Store:
  """Entries of a folder, as JAX's cache reads and writes them.

  Args:
    folder: where they are.
    max_bytes: size above which old entries are removed.
  """

  def __init__(self, folder: pathlib.Path, *, max_bytes: int = MAX_BYTES):
    self._path = folder  # JAX's name for it.
    self._max_bytes = max_bytes
    self._writable = True
    # Bytes to write until the folder is next measured: at first none.
    self._until_swept = 0
    self._machine = machine().encode()

  def get(self, key: str) -> bytes | None:
    """Returns an entry; None if there is none, or a damaged one."""
    path = self._entry(key)
    try:
      content = path.read_bytes()
    except OSError:
      return None
    digest, value = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
    if digest != _digest(value):
      return None  # What is compiled now replaces it.
    with contextlib.suppress(OSError):
      os.utime(path)  # The time of the last use.
    return value

  def put(self, key: str, value: bytes) -> None:
    """Writes an entry, in place of a damaged one if there is one."""
    size = len(value) + _DIGEST_SIZE
    if not self._writable or size > self._max_bytes:
      return
    try:
      _write(self._entry(key), _digest(value) + value)
      self._until_swept -= size
      if self._until_swept <= 0:
        self._sweep()
        self._until_swept = self._max_bytes // 16
    except OSError as error:
      self._writable = False  # Once is enough.
      _inform(self._path, error.strerror or str(error))

  def _entry(self, key: str) -> pathlib.Path:
    name = hashlib.blake2b(
      key.encode(), key=_digest(self._machine), digest_size=20
    )
    return self._path / (name.hexdigest() + _SUFFIX)

  def _sweep(self) -> None:
    """Removes the entries that were not used for longest."""
    entries = []
    for entry in os.scandir(self._path):
      with contextlib.suppress(OSError):  # Another process removed it.
        stat = entry.stat()
        if entry.name.endswith(_SUFFIX):
          entries.append((stat.st_mtime, stat.st_size, entry.path))
        elif (
          entry.name.endswith(_TEMPORARY)
          and time.time() - stat.st_mtime > _ABANDONED
        ):
          os.unlink(entry.path)
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
      if total <= self._max_bytes:
        break
      with contextlib.suppress(OSError):
        os.unlink(path)
      total -= size


def _write(path: pathlib.Path, content: bytes) -> None:
  """Writes a file whole or not at all, for any number of processes."""
  # Not synchronised to the disk: a file that a crash tears has another digest.
  handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=_TEMPORARY)
  try:
    with open(handle, 'wb') as file:
      file.write(content)
    os.replace(temporary, path)
  except OSError:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise


def _digest(value: bytes) -> bytes:
  return hashlib.blake2b(value, digest_size=_DIGEST_SIZE).digest()


def _prepare(folder: pathlib.Path) -> str:
  """Makes the folder; returns what speaks against its use, or ''."""
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = folder.stat()
    os.listdir(folder)
  except OSError as error:
    return error.strerror or str(error)
  # Entries are machine code: who can write them runs it as this user.
  if stat.st_uid not in (os.geteuid(), 0):
    return 'it belongs to another user'
  if stat.st_mode & 0o002:
    return 'every user can write to it'
  return ''


def _inform(folder: pathlib.Path, reason: str) -> None:
  print(
    f'Compiled programs cannot be kept in {folder}: {reason}. Each run '
    f'compiles again; --compile_cache or {VARIABLE} names another folder, or '
    f'{OFF}.',
    file=sys.stderr,
    flush=True,
  )


def _in_use() -> bool:
  """Whether the folder that JAX has is of `use`."""
  return compilation_cache.get_file_cache is not _GET_FILE_CACHE
