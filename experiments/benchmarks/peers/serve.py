"""Runs steps and times them when asked; a script of any environment.

    echo '{"option": 1}' | python serve.py MODULE CASE

It imports MODULE and calls its function CASE with the options, the first line
of its input, which gives `run(steps)`. It answers the other lines: `run N` by
wall and CPU seconds, `memory` by the bytes held at most, beyond those after the
import of MODULE and of what the attribute `imports` of CASE names.
"""

import importlib
import json
import resource
import sys
import time


def say(**words):
  """One answer."""
  print('\n@' + json.dumps(words), flush=True)


def peak():
  """The most bytes that this process has held."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident():
  """Bytes that this process holds."""
  with open('/proc/self/statm', encoding='utf-8') as file:
    return int(file.read().split()[1]) * resource.getpagesize()


def main(module, case):
  """Answers until the input ends."""
  try:
    make = getattr(importlib.import_module(module), case)
    for name in getattr(make, 'imports', ()):
      importlib.import_module(name)
    start = resident()
    run = make(**json.loads(sys.stdin.readline()))
  except Exception as error:
    say(error=f'{type(error).__name__}: {error}'[:300])
    return
  say()
  for line in sys.stdin:
    word, *number = line.split()
    try:
      if word == 'memory':
        say(bytes=peak() - start)
        continue
      wall, cpu = time.perf_counter(), time.process_time()
      run(int(number[0]))
      say(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
    except Exception as error:
      say(error=f'{type(error).__name__}: {error}'[:300])
      return


if __name__ == '__main__':
  main(*sys.argv[1:])
