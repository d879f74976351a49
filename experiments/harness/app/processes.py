"""Runs of several processes, and what happens when one of them dies.

If one process dies, jax aborts the others with pages of C++ output. So each
process works in a child, and the parent reports in one line which process is
gone.
"""

import ctypes
import os
import re
import select
import signal
import sys
import time
from collections.abc import Mapping

import jax

from experiments.harness.app import errors, termination

# Seconds without a heartbeat after which a process counts as gone.
_PATIENCE = 20
# How jax's report of a lost process begins, and where it names the process.
_REPORT = re.compile(rb'Traceback|[WEF]\d{4} .*(coordination|preemption)')
_LOST = re.compile(rb'stopped sending heartbeats\):\s+(\d+(?:[\s,]+\d+)*)')
_FIRST_LOST = re.compile(rb'CoordinationService/|JAX distributed service')
_PR_SET_PDEATHSIG = 1


def join(environment: Mapping[str, str] = os.environ) -> None:
  """Joins the other processes of the run, for one mesh of all devices.

  jax detects SLURM, Open MPI and Kubernetes. Elsewhere, set
  JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES
  and JAX_PROCESS_ID. Returns in a child process only: call it before jax has
  devices. If a process is lost, the others end with `termination.EXIT_STATUS`.

  Args:
    environment: environment variables.

  Raises:
    SettingsError: if jax cannot detect the processes.
  """
  variables = {
    'num_processes': 'JAX_NUM_PROCESSES',
    'process_id': 'JAX_PROCESS_ID',
  }
  numbers = {
    name: int(environment[variable])
    for name, variable in variables.items()
    if variable in environment
  }
  _work_in_child()
  # CPUs communicate by gloo; accelerators have their own way.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(**numbers, heartbeat_timeout_seconds=_PATIENCE)
  except ValueError as error:
    raise errors.SettingsError(
      f'--distributed found no other processes ({error}). Start it by SLURM, '
      'Open MPI or Kubernetes, or set JAX_COORDINATOR_ADDRESS, '
      'JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process.'
    ) from error


def leave_if_joined(message: str) -> None:
  """Exits a failed process at once; a normal exit would wait for the others.

  Args:
    message: what is wrong, printed to stderr.
  """
  if jax.distributed.is_initialized():
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    if 'by peer' in message:
      time.sleep(2 * _PATIENCE)  # Until jax finds the lost process and aborts.
    os._exit(1)


def _work_in_child() -> None:
  """Returns in a child; the parent exits like the child."""
  sys.stdout.flush()
  reading, writing = os.pipe()
  child = os.fork()
  if not child:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(writing, sys.stderr.fileno())
    os.close(reading)
    os.close(writing)
    return
  os.close(writing)
  signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The child gets it as well.
  report = _forward(reading)
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  lost = _find_lost(report) if status else None
  if lost is not None:
    status = termination.EXIT_STATUS
    report = (
      f'{lost} of the run is gone (see its output): this one ends too. Run the '
      'same command in all of them to resume from the last checkpoint.\n'
    ).encode()
  os.write(sys.stderr.fileno(), report)
  os._exit(status if status >= 0 else 128 - status)


def _forward(reading: int) -> bytes:
  """Forwards the child's stderr until it ends; returns a pending report.

  Output that may report a lost process is held back for at most a minute.
  """
  pending, since = b'', 0.0
  while True:
    ready, _, _ = select.select([reading], [], [], 1.0 if pending else None)
    content = os.read(reading, 1 << 16) if ready else b''
    if ready and not content:
      return pending
    if pending or _REPORT.search(content):
      since = since if pending else time.monotonic()
      pending += content
      content = b''
      if time.monotonic() - since > 3 * _PATIENCE:
        pending, content = b'', pending
    os.write(sys.stderr.fileno(), content)


def _find_lost(report: bytes) -> str | None:
  """Returns which process an error blames, None if it blames none."""
  if match := _LOST.search(report):
    numbers = re.findall(r'\d+', match[1].decode())
    return f'process {", ".join(numbers)}'
  return 'process 0' if _FIRST_LOST.search(report) else None
