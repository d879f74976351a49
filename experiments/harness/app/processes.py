"""Runs of several processes, and what happens when they differ or one dies.

Processes with other flags, code or data would wait for each other for ever. So
they compare them before they compute.

If one process dies, jax aborts the others with pages of C++ output. So each
process works in a child, and the parent reports in one line which process is
gone.
"""

import ctypes
import hashlib
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.harness.app import errors, termination

# Seconds without a heartbeat after which a process counts as gone, by default.
HEARTBEAT_TIMEOUT = 120
# Seconds that a failed first process waits for the others: without it, jax
# aborts them before they report their own error.
_GRACE = 3
# How jax's report of a lost process begins, and where it names the process.
_REPORT = re.compile(
  rb'Traceback|[WEF]\d{4} .*(coordination|preemption|distributed service)'
)
_LOST = re.compile(rb'stopped sending heartbeats\):\s+(\d+(?:[\s,]+\d+)*)')
_FIRST_LOST = re.compile(rb'CoordinationService/|JAX distributed service')
_NOT_JOINED = b'CoordinationService/RegisterTask'
_PR_SET_PDEATHSIG = 1


def join(
  heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
  environment: Mapping[str, str] = os.environ,
) -> None:
  """Joins the other processes of the run, for one mesh of all devices.

  jax detects SLURM, Open MPI and Kubernetes. Elsewhere, set
  JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES
  and JAX_PROCESS_ID. Returns in a child process only: call it before jax has
  devices or another thread starts. If a process is lost, the others end with
  `termination.EXIT_STATUS`.

  Args:
    heartbeat_timeout: seconds without a heartbeat after which a process counts
      as lost; 2.5 times as many until all have joined.
    environment: environment variables.

  Raises:
    SettingsError: if jax cannot detect the processes, a variable is no
      integer, or the address has no port.
  """
  numbers = {
    'num_processes': _integer(environment, 'JAX_NUM_PROCESSES'),
    'process_id': _integer(environment, 'JAX_PROCESS_ID'),
  }
  name = 'JAX_COORDINATOR_ADDRESS'
  address = environment.get(name)
  if address and not re.fullmatch(r'.+:[0-9]+', address):
    raise errors.SettingsError(
      f'the environment variable {name} is {address!r}: give host:port of the '
      'first process, such as localhost:1234.'
    )
  _work_in_child(heartbeat_timeout)
  # CPUs communicate by gloo; accelerators have their own way.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(
      **numbers,
      # More than for a heartbeat: a cluster may start processes one by one.
      initialization_timeout=5 * heartbeat_timeout // 2,
      heartbeat_timeout_seconds=heartbeat_timeout,
    )
  except ValueError as error:
    raise errors.SettingsError(
      f'--distributed found no other processes ({error}). Start it by SLURM, '
      'Open MPI or Kubernetes, or set JAX_COORDINATOR_ADDRESS, '
      'JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process.'
    ) from error


def _integer(environment: Mapping[str, str], name: str) -> int | None:
  text = environment.get(name)
  try:
    return None if text is None else int(text)
  except ValueError:
    raise errors.SettingsError(
      f'the environment variable {name} is {text!r}: give an integer.'
    ) from None


def compare(what: str, values: Mapping[str, Any]) -> None:
  """Compares plain values of all processes; all of them have to call this.

  Args:
    what: what the values are, for the message.
    values: plain JSON values by name.

  Raises:
    SettingsError: in all processes, if the values of two processes differ;
      names the first difference.
  """
  if jax.process_count() == 1:
    return
  text = json.dumps(values, sort_keys=True).encode()
  digest = hashlib.blake2b(text, digest_size=16).digest()
  heads = _gather(np.frombuffer(digest + len(text).to_bytes(8), np.uint8))
  if (heads == heads[0]).all():
    return
  sizes = [int.from_bytes(head[16:].tobytes()) for head in heads]
  padded = np.zeros(max(sizes), np.uint8)
  padded[: len(text)] = np.frombuffer(text, np.uint8)
  first, *others = [
    json.loads(row[:size].tobytes())
    for row, size in zip(_gather(padded), sizes, strict=True)
  ]
  index = next(i for i, other in enumerate(others, 1) if other != first)
  other = others[index - 1]
  name = next(
    name
    for name in sorted({*first, *other})
    if first.get(name) != other.get(name)
  )
  pair = [str(values.get(name, 'absent')) for values in (first, other)]
  raise errors.SettingsError(
    f'the processes of the run have different {what}: {name} is '
    f'{_short(pair[0])} in process 0 and {_short(pair[1])} in process {index}. '
    'Start all of them by the same command, with the same code and data.'
  )


def _gather(array: np.ndarray) -> np.ndarray:
  return np.asarray(multihost_utils.process_allgather(array))


def _short(text: str) -> str:
  return text if len(text) < 100 else f'{text[:97]}...'


def leave_if_joined(message: str, heartbeat_timeout: int) -> None:
  """Exits a failed process at once; a normal exit would wait for the others.

  Args:
    message: what is wrong, printed to stderr.
    heartbeat_timeout: see `join`.
  """
  if jax.distributed.is_initialized():
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    if 'by peer' in message:
      # Until jax finds the lost process and aborts.
      time.sleep(2 * heartbeat_timeout)
    elif jax.process_index() == 0:
      time.sleep(_GRACE)
    os._exit(1)


def _work_in_child(timeout: int) -> None:
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
  report = _forward(reading, 3 * timeout)
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


def _forward(reading: int, seconds: float) -> bytes:
  """Forwards the child's stderr until it ends; returns a pending report.

  Output that may report a lost process is held back for at most `seconds`.
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
      if time.monotonic() - since > seconds:
        pending, content = b'', pending
    os.write(sys.stderr.fileno(), content)


def _find_lost(report: bytes) -> str | None:
  """Returns which process an error blames, None if it blames none."""
  if match := _LOST.search(report):
    numbers = re.findall(r'\d+', match[1].decode())
    return f'process {", ".join(numbers)}'
  if _NOT_JOINED in report:
    return 'a process'
  return 'process 0' if _FIRST_LOST.search(report) else None
