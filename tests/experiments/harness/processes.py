"""Starts scripts as processes of their own, and ends them."""

import os
import pathlib
import signal
import subprocess
import sys
import time

from experiments.cluster import local

ROOT = pathlib.Path(__file__).parents[3]


def run_here(script, *arguments):
  """The script in this process, which saves a start of Python.

  Args:
    script: Python.
    *arguments: as of its command line.

  Returns:
    What it defines.
  """
  here = {'__name__': 'script', 'ARGUMENTS': list(map(str, arguments))}
  exec(compile(script, 'script', 'exec'), here)  # noqa: S102
  return here


def start(script, *arguments, count=None, last=(), devices=8):
  """Starts it once, or `count` times.

  Args:
    script: Python, or the name of a module.
    *arguments: as of its command line.
    count: number of processes that share a run; None for one of its own.
    last: further arguments of the last process alone.
    devices: number of devices of all `count` processes together.

  Returns:
    The processes.
  """
  kind = '-c' if '\n' in script else '-m'
  command = [sys.executable, '-W', 'error', kind, script, *map(str, arguments)]
  if count is None:
    # The proxies of some machines confuse the detection of processes.
    each = [{k: v for k, v in os.environ.items() if 'proxy' not in k.lower()}]
  else:
    each = local.environments(count, devices // count)
  more = [()] * (len(each) - 1) + [last]
  return [
    subprocess.Popen(
      [*command, *further],
      cwd=ROOT,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for env, further in zip(each, more, strict=True)
  ]


def wait_for_lines(process, path, lines):
  """Waits until a file has so many lines, or the process has ended."""
  deadline = time.monotonic() + 600
  while time.monotonic() < deadline and process.poll() is None:
    if path.exists() and path.read_bytes().count(b'\n') >= lines:
      return
    time.sleep(0.01)


def finish(processes, status=0):
  """Waits for all; what they printed, if they end with this status."""
  try:
    said = [process.communicate(timeout=600) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [p.returncode for p in processes] == [status] * len(processes), said
  return said


def kill_after(process, path, lines, *, by=signal.SIGKILL, status=None):
  """Sends a signal once a file has so many lines; what it said then."""
  wait_for_lines(process, path, lines)
  process.send_signal(by)
  ((_, said),) = finish([process], -by if status is None else status)
  assert path.read_bytes().count(b'\n') >= lines
  return said
