"""Refuses arrays that exceed the memory, before they are made."""

import os

import jax

from experiments.harness.app import errors


def require_memory(size: int, what: str) -> None:
  """Checks that arrays fit into memory, before they are made.

  XLA ends the process, instead of raising an error, for an array of 2^63 bytes
  or more, and the system ends processes that fill its memory.

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
