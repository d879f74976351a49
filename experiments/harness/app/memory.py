"""Keeps freed memory in the process, which avoids page faults in each step.

Returns the memory of the compiler to the system, and recognises errors of
arrays that are too large.

glibc returns large blocks to the system as soon as they are freed. A compiled
step frees its temporary buffer at its end, and the next step then causes a page
fault for every 4 KiB: for 60 MB, 15,000 faults and a quarter of the CPU time.
"""

import ctypes
import os
import re

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


def return_freed() -> bool:
  """Returns free blocks to the system, for instance those of the compiler.

  XLA allocates 100 to 250 MB to compile a decoder's step, and glibc keeps them
  in the heaps of the compiler's threads. It takes about 0.1 s: call it once
  per compiled program, not in a loop.

  Returns:
    Whether it did: not with another allocator than glibc's, nor if there was
    nothing to return.
  """
  try:
    trim = ctypes.CDLL(None).malloc_trim
  except (AttributeError, OSError, TypeError):
    return False
  return bool(trim(0))
