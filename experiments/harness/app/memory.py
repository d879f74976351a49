"""Keeps freed memory in the process, which avoids page faults in each step.

Also refuses arrays that are too large, and recognises the errors of others.

glibc returns large blocks to the system as soon as they are freed. A compiled
step frees its temporary buffer at its end, and the next step then causes a page
fault for every 4 KiB: for 60 MB, 15,000 faults and a quarter of the CPU time.
"""

import ctypes
import os
import re

import jax

from experiments.harness.app import errors

# Parameters of `mallopt`, from its manual page.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Environment variables by which a user configures the allocator.
VARIABLES = (
  'GLIBC_TUNABLES',
  'MALLOC_MMAP_THRESHOLD_',
  'MALLOC_TRIM_THRESHOLD_',
)
# Blocks above this size are returned; older versions of glibc allow less.
_LARGEST, _LARGEST_BEFORE = 1 << 30, 1 << 25


# What jax and NumPy say about arrays that exceed the memory or any memory.
_EXCEEDED = re.compile(
  'RESOURCE_EXHAUSTED|array is too big|Maximum allowed|iterator is too large|'
  'array of size exceeding|too large to convert|overflow in static extent'
)


def is_exceeded(error: BaseException) -> bool:
  """Whether an error says that an array is too large."""
  return isinstance(error, MemoryError) or bool(_EXCEEDED.search(str(error)))


def require(size: int, what: str) -> None:
  """Checks that arrays fit into memory, before they are made.

  XLA ends the process instead of raising an error for some sizes near or above
  2^31, and the system ends processes that fill its memory.

  Args:
    size: bytes of the arrays.
    what: the arrays, in the plural, and the settings that give their sizes.

  Raises:
    SettingsError: if they are larger than the memory.
  """
  limit = capacity()
  if size > limit:
    raise errors.SettingsError(
      f'{what} need {size / 2**30:,.0f} GiB of {limit / 2**30:,.0f} GiB of '
      'memory: choose smaller sizes.'
    )


def capacity() -> int:
  """Bytes that arrays can have: of all devices, or of the machine for CPUs."""
  devices = jax.local_devices()
  sizes = [(d.memory_stats() or {}).get('bytes_limit', 0) for d in devices]
  if devices[0].platform == 'cpu' or not all(sizes):
    sizes = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
  return sum(sizes) * jax.process_count()


def keep_freed() -> bool:
  """Makes the allocator keep freed blocks below 1 GiB, for all threads.

  Returns:
    Whether it did: not if the environment configures the allocator, nor with
    another allocator than glibc's.
  """
  if any(name in os.environ for name in VARIABLES):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return False
  large = any(
    mallopt(_MMAP_THRESHOLD, size) for size in (_LARGEST, _LARGEST_BEFORE)
  )
  return large and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
