"""A process that ends with the process that started it, however that ends.

    status = lifeline.run([sys.executable, '-m', 'module'])  # The parent.
    lifeline.hold()  # First in the module.

The parent keeps the writing end of a pipe, which the system closes when the
parent ends, also by SIGKILL. The child waits for that in a thread, and then
kills its process group: itself and the processes that it has started.
"""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Sequence

# The reading end of the pipe, in the environment of the child.
VARIABLE = 'BILEVEL_JAX_LIFELINE'


def run(command: Sequence[str]) -> int:
  """Runs a command that calls `hold`, in a process group of its own.

  Args:
    command: its command line.

  Returns:
    Its exit status; minus the number of a signal that has ended it.
  """
  reading, writing = os.pipe()
  try:
    process = subprocess.Popen(
      command,
      env=os.environ | {VARIABLE: str(reading)},
      pass_fds=(reading,),
      process_group=0,
    )
    try:
      return process.wait()
    finally:
      if process.returncode is None:
        # An exception, for instance of Ctrl-C, which only the parent gets.
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, signal.SIGKILL)
        process.wait()
  finally:
    os.close(reading)
    os.close(writing)


def hold() -> None:
  """Ends this process group with the parent; does nothing without `run`."""
  number = os.environ.pop(VARIABLE, None)
  if number is None:
    return

  def wait() -> None:
    os.read(int(number), 1)  # Nothing is written: it returns at the end.
    os.killpg(0, signal.SIGKILL)

  threading.Thread(target=wait, daemon=True).start()
