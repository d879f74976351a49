"""Keeps freed memory in the process, so that a step finds its pages again.

The allocator of glibc returns large blocks to the system as soon as they are
freed. A compiled step frees its temporary buffer at its end, so the next one
asks for the same memory again and pays a page fault for every 4 KiB of it: for
60 MB, 15,000 faults and a quarter of the processor time.
"""

import ctypes
import os

# Numbers of `mallopt`, as its manual page has them.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Of the environment, by which a user says how to allocate.
VARIABLES = (
  'GLIBC_TUNABLES',
  'MALLOC_MMAP_THRESHOLD_',
  'MALLOC_TRIM_THRESHOLD_',
)
# From this size on, blocks are returned; older versions allow less.
_LARGEST, _LARGEST_BEFORE = 1 << 30, 1 << 25


def keep_freed() -> bool:
  """Lets the allocator keep freed blocks below 1 GiB, from now on.

  The process does it itself, at any time and for all of its threads: there is
  no environment to prepare, and so no second start.

  Returns:
    Whether it does: not where the environment already says how to allocate, nor
    with an allocator other than glibc's.
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
