"""Frees compiled programs when the test process is large."""

import ctypes
import gc
import pathlib
import sys

# Above this, MiB: a compiled program takes 1.6 of them, whatever its size.
LIMIT = 1_000
# Minimal growth before caches are cleared again, so that they are not cleared
# after every test if something else uses the memory.
GROWTH = 200
_after_last = 0.0


def resident() -> float:
  """Memory of this process in MiB; 0 if unknown."""
  status = pathlib.Path('/proc/self/statm')
  if not status.exists():
    return 0.0
  return int(status.read_text().split()[1]) * 4 / 1024


def release() -> None:
  """Clears all caches of compiled programs, if the process is large."""
  global _after_last
  if resident() < max(LIMIT, _after_last + GROWTH):
    return
  import jax

  jax.clear_caches()
  gc.collect()
  if sys.platform == 'linux':
    # Freed memory goes back to the system, where libc can do that.
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
      trim(0)
  _after_last = resident()
