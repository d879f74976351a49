"""Runs and times steps on request, in any environment.

    echo '{"option": 1}' | python serve.py MODULE CASE

It imports MODULE and calls its function CASE with the options in the first line
of its input; CASE returns `run(steps)`. It answers the next lines: `run N` with
wall and CPU seconds, `memory` with the peak memory of the steps, without
that of CASE, above the memory after the imports of MODULE and of the modules in
the attribute `imports` of CASE. Free memory of CASE, such as a compiler's,
first returns to the system.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import resource
import sys
import time


def answer(**words):
  """Prints an answer."""
  print('\n@' + json.dumps(words), flush=True)


def peak():
  """Returns the peak memory since `reset_peak`, bytes."""
  with open('/proc/self/status', encoding='utf-8') as file:
    (line,) = (line for line in file if line.startswith('VmHWM:'))
  return int(line.split()[1]) * 1024


def return_freed():
  """Returns free memory to the system."""
  gc.collect()
  # An allocator other than glibc's has no such function.
  with contextlib.suppress(AttributeError, OSError, TypeError):
    ctypes.CDLL(None).malloc_trim(0)


def reset_peak():
  """Sets the peak memory to the present memory, without free memory."""
  return_freed()
  with open('/proc/self/clear_refs', 'w', encoding='utf-8') as file:
    file.write('5')


def resident():
  """Returns the memory of this process, bytes."""
  with open('/proc/self/statm', encoding='utf-8') as file:
    return int(file.read().split()[1]) * resource.getpagesize()


def main(module, case):
  """Answers until the input ends."""
  try:
    make = getattr(importlib.import_module(module), case)
    for name in getattr(make, 'imports', ()):
      importlib.import_module(name)
    return_freed()
    start = resident()
    run = make(**json.loads(sys.stdin.readline()))
    reset_peak()
  except Exception as error:
    answer(error=f'{type(error).__name__}: {error}'[:300])
    return
  answer()
  for line in sys.stdin:
    word, *number = line.split()
    try:
      if word == 'memory':
        answer(bytes=max(0, peak() - start))
        continue
      wall, cpu = time.perf_counter(), time.process_time()
      run(int(number[0]))
      answer(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
    except Exception as error:
      answer(error=f'{type(error).__name__}: {error}'[:300])
      return


if __name__ == '__main__':
  main(*sys.argv[1:])
