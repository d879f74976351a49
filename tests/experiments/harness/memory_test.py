"""Freed memory stays in the process: counted in page faults, not in time."""

import os
import pathlib
import subprocess
import sys

import pytest

from experiments.harness.app import memory

# Alone in a process, as it is for good. Blocks of 64 MB are always returned by
# default, so that each of them costs its pages again.
PROGRAM = """
import resource, runpy, sys
keep_freed = runpy.run_path(sys.argv[1])['keep_freed']

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(5):
    b'x' * (1 << 26)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before, kept = faults(), keep_freed()
faults()
print(kept, before, faults())
"""


def test_blocks_that_come_back_cost_no_page_faults():
  environment = {
    name: value
    for name, value in os.environ.items()
    if name not in memory.VARIABLES
  }
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, str(pathlib.Path(memory.__file__))],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  kept, before, after = done.stdout.split()
  if kept == 'False':
    pytest.skip('this allocator is not that of glibc.')
  assert int(after) < int(before) / 10


def test_what_the_environment_says_stays(monkeypatch):
  monkeypatch.setenv('MALLOC_TRIM_THRESHOLD_', '131072')
  assert not memory.keep_freed()


# Small blocks below a last one that is in use stay in the heap.
FREED = """
import runpy, sys
return_freed = runpy.run_path(sys.argv[1])['return_freed']

def resident():
  with open('/proc/self/status') as file:
    (line,) = (line for line in file if line.startswith('VmRSS'))
  return int(line.split()[1]) >> 10

blocks = [bytes(1 << 14) for _ in range(1 << 12)]
last, blocks = blocks[-1], None
before = resident()
print(return_freed(), before - resident())
"""


def test_free_blocks_return_to_the_system():
  if not os.path.exists('/proc/self/status'):
    pytest.skip('the memory of a process is read from /proc.')
  done = subprocess.run(
    [sys.executable, '-c', FREED, str(pathlib.Path(memory.__file__))],
    capture_output=True,
    text=True,
    check=True,
  )
  returned, mebibytes = done.stdout.split()
  if returned == 'False':
    pytest.skip('this allocator is not that of glibc.')
  assert int(mebibytes) > 50
