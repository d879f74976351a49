"""Several processes of one run: how they find and how they lose each other.

If one of them is killed, jax aborts the others, with pages of C++ and no word
that helps. So each process works in a child of its own, and says in one line
which one is gone.
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

# Without a sign of life for so long, s, a process is taken for gone.
_PATIENCE = 20
# How its loss begins in what jax says, and who it is.
_BEGINS = re.compile(rb'Traceback|[WEF]\d{4} .*(coordination|preemption)')
_GONE = re.compile(rb'stopped sending heartbeats\):\s+(\d+(?:[\s,]+\d+)*)')
_FIRST_GONE = re.compile(rb'CoordinationService/|JAX distributed service')
_PR_SET_PDEATHSIG = 1


def join(environment: Mapping[str, str] = os.environ) -> None:
  """Joins this process to the others of the run, for one mesh of all devices.

  SLURM, Open MPI and Kubernetes are detected by jax. Elsewhere each process
  is told by JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES
  and JAX_PROCESS_ID. Only a child returns: call it before jax has devices.
  If a process of the run is gone, the others end with
  `termination.EXIT_STATUS`.

  Args:
    environment: environment variables.

  Raises:
    SettingsError: if jax cannot tell which processes there are.
  """
  given = {
    name: int(environment[variable])
    for name, variable in (
      ('num_processes', 'JAX_NUM_PROCESSES'),
      ('process_id', 'JAX_PROCESS_ID'),
    )
    if variable in environment
  }
  _work_in_a_child()
  # Processors talk to each other by gloo; accelerators have their own way.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=_PATIENCE)
  except ValueError as error:
    raise errors.SettingsError(
      f'--distributed found no other processes ({error}). Start it by SLURM, '
      'Open MPI or Kubernetes, or set JAX_COORDINATOR_ADDRESS, '
      'JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process.'
    ) from error


def leave_if_joined(said: str) -> None:
  """Ends a process that failed: at its usual end it would wait for the others.

  Args:
    said: what is wrong, for stderr.
  """
  if jax.distributed.is_initialized():
    sys.stdout.flush()
    print(said, file=sys.stderr, flush=True)
    if 'by peer' in said:
      time.sleep(2 * _PATIENCE)  # Until jax finds which one, and aborts this.
    os._exit(1)


def _work_in_a_child() -> None:
  """Returns in a child; the parent ends as the child does."""
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
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The terminal tells it too.
  said = _pass_on(reading)
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  gone = _gone(said) if status else None
  if gone is not None:
    status = termination.EXIT_STATUS
    said = (
      f'{gone} of the run is gone (see what it said): this one ends too. The '
      'same command in all of them goes on from the last checkpoint.\n'
    ).encode()
  os.write(sys.stderr.fileno(), said)
  os._exit(status if status >= 0 else 128 - status)


def _pass_on(reading: int) -> bytes:
  """Passes on what the child says, until it ends; returns what may be a loss.

  That is kept back, but no longer than a loss takes to be found.
  """
  held, since = b'', 0.0
  while True:
    ready, _, _ = select.select([reading], [], [], 1.0 if held else None)
    content = os.read(reading, 1 << 16) if ready else b''
    if ready and not content:
      return held
    if held or _BEGINS.search(content):
      since = since if held else time.monotonic()
      held += content
      content = b''
      if time.monotonic() - since > 3 * _PATIENCE:
        held, content = b'', held
    os.write(sys.stderr.fileno(), content)


def _gone(said: bytes) -> str | None:
  """Which process an error is about that another one's end has caused."""
  found = _GONE.search(said)
  if found:
    numbers = re.findall(r'\d+', found[1].decode())
    return f'process {", ".join(numbers)}'
  return 'process 0' if _FIRST_GONE.search(said) else None
