"""A cache of compiled programs on disk, shared by processes.

JAX keys a program by its code, its options and the version of jaxlib. This
cache adds the processor, since machines may share a home folder. Entries are
written atomically and carry a digest: a damaged entry is compiled again. The
least recently used entries are removed first.
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

# Environment variable: a folder or OFF. JAX_COMPILATION_CACHE_DIR, which JAX
# itself reads, takes precedence.
VARIABLE = 'BILEVEL_JAX_COMPILE_CACHE'
OFF = 'off'
# Maximum size of the folder in bytes. A program takes 10 to 200 kB.
MAX_BYTES = 2**30
# Lines of /proc/cpuinfo that determine the instructions of a program.
_CPUINFO = pathlib.Path('/proc/cpuinfo')
_CPU_LINES = (
  *('vendor_id', 'cpu family', 'model', 'flags'),
  *('CPU implementer', 'CPU architecture', 'CPU variant', 'CPU part'),
  'Features',
)
# Environment variables with the number of XLA's threads.
_THREAD_VARIABLES = ('NPROC', 'PJRT_NPROC')
_SUFFIX, _TEMPORARY = '.program', '.tmp'
# Seconds after which a temporary file is from a process that was killed.
_ABANDONED = 3_600
_DIGEST_SIZE = 16
_GET_FILE_CACHE = compilation_cache.get_file_cache


def use(folder: Path | None = None, *, max_bytes: int = MAX_BYTES) -> bool:
  """Caches the programs that this process compiles from now on.

  Args:
    folder: created if missing; `off` turns the cache off. Default: the
      environment variable BILEVEL_JAX_COMPILE_CACHE, else `default_folder()`.
    max_bytes: size of the folder above which old entries are removed.

  Returns:
    Whether programs are cached: not if the folder is unusable, which is
    reported on stderr, nor if JAX is configured with its own cache folder.
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
  # Cache small programs too: a run compiles many of them.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  # XLA's own caches ignore the limit, and their folder changes the key.
  jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
  # JAX has no public hook for a store. Its own store neither repairs entries
  # nor limits their size.
  compilation_cache.get_file_cache = lambda path: (store, path)
  # JAX decides at its first program whether to use a cache.
  compilation_cache.reset_cache()
  return True


def stop() -> None:
  """Undoes `use`, for tests."""
  if _in_use():
    jax.config.update('jax_compilation_cache_dir', None)
    compilation_cache.get_file_cache = _GET_FILE_CACHE
    compilation_cache.reset_cache()


def default_folder() -> pathlib.Path:
  """Returns the user's cache folder, by the XDG convention."""
  # The convention ignores relative paths.
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
  # Cores may differ: use the distinct lines of all.
  features = {
    f'{name}: {" ".join(sorted(value.split()))}'
    for name, value in pairs
    if name in _CPU_LINES
  }
  if not features:
    # Unknown processor: do not share programs with other machines.
    features = {platform.node(), platform.processor(), platform.platform()}
  threads = [f'{name}={os.environ.get(name)}' for name in _THREAD_VARIABLES]
  if hasattr(os, 'sched_getaffinity'):
    threads.append(f'cores={len(os.sched_getaffinity(0))}')
  return '\n'.join([platform.machine(), *sorted(features), *threads])


class Store:
  """A folder of entries, with the interface of JAX's cache.

  Args:
    folder: the folder.
    max_bytes: size above which old entries are removed.
  """

  def __init__(self, folder: pathlib.Path, *, max_bytes: int = MAX_BYTES):
    self._path = folder  # JAX reads this name.
    self._max_bytes = max_bytes
    self._writable = True
    # Bytes to write before the next sweep; the first write sweeps.
    self._until_swept = 0
    self._machine = machine().encode()

  def get(self, key: str) -> bytes | None:
    """Returns an entry; None if it is missing or damaged."""
    path = self._entry(key)
    try:
      content = path.read_bytes()
    except OSError:
      return None
    digest, value = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
    if digest != _digest(value):
      return None  # The program is compiled again and replaces the entry.
    with contextlib.suppress(OSError):
      os.utime(path)  # The time of the last use.
    return value

  def put(self, key: str, value: bytes) -> None:
    """Writes an entry."""
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
      self._writable = False  # Report the failure once.
      _inform(self._path, error.strerror or str(error))

  def _entry(self, key: str) -> pathlib.Path:
    name = hashlib.blake2b(
      key.encode(), key=_digest(self._machine), digest_size=20
    )
    return self._path / (name.hexdigest() + _SUFFIX)

  def _sweep(self) -> None:
    """Removes the least recently used entries."""
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
  """Writes a file atomically."""
  # Without fsync: the digest reveals a file that a crash left incomplete.
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
  """Creates the folder; returns why it is unusable, or ''."""
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = folder.stat()
    os.listdir(folder)
  except OSError as error:
    return error.strerror or str(error)
  # Entries are machine code, which this user would execute.
  if stat.st_uid not in (os.geteuid(), 0):
    return 'it belongs to another user'
  if stat.st_mode & 0o002:
    return 'every user can write to it'
  return ''


def _inform(folder: pathlib.Path, reason: str) -> None:
  print(
    f'Compiled programs cannot be kept in {folder}: {reason}. Each run '
    f'compiles again. Set --compile_cache or {VARIABLE} to another folder, or '
    f'to {OFF}.',
    file=sys.stderr,
    flush=True,
  )


def _in_use() -> bool:
  """Whether `use` configured JAX's cache."""
  return compilation_cache.get_file_cache is not _GET_FILE_CACHE
