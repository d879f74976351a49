"""SIGTERM: the run finishes its chunk, saves a checkpoint and exits.

Batch systems send SIGTERM before they reclaim a machine. The exit status is
75, the EX_TEMPFAIL ("try again later") of sysexits.h. The same command resumes
the run.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

EXIT_STATUS = os.EX_TEMPFAIL


def exit_on_sigterm(*, unwind: bool = False) -> None:
  """Makes SIGTERM end the process outside of training.

  Args:
    unwind: whether to raise `SystemExit`, for a program that has to clean up.
      Code that catches all exceptions can swallow it, so by default the process
      ends at once.
  """

  def end(number, frame):
    del number, frame
    if unwind:
      leave()
    with contextlib.suppress(Exception):
      # The signal may have interrupted a write to the same stream.
      sys.stdout.flush()
    os._exit(EXIT_STATUS)

  signal.signal(signal.SIGTERM, end)


def show_on_sigusr1() -> None:
  """Makes SIGUSR1 print the stack of every thread, to debug a hang."""
  with contextlib.suppress(ValueError, OSError, AttributeError):
    # In a notebook, stderr is no file.
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def ignore() -> None:
  """Ignores SIGTERM while the process exits.

  A Python handler would be removed before the interpreter ends.
  """
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def leave() -> NoReturn:
  """Exits with `EXIT_STATUS`, and ignores further SIGTERMs."""
  ignore()
  sys.exit(EXIT_STATUS)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
  """Defers SIGTERM to the end of the block.

  Only the main thread can do this; in other threads the signal keeps its
  effect.

  Yields:
    A function that returns whether a SIGTERM has arrived.

  Raises:
    SystemExit: at the end, with `EXIT_STATUS`, if one has arrived.
  """
  # Not a threading.Event: its lock is not reentrant, and signals nest.
  received: list[int] = []
  terminated = lambda: bool(received)
  if threading.current_thread() is not threading.main_thread():
    yield terminated
    return
  before = signal.signal(
    signal.SIGTERM, lambda number, frame: received.append(number)
  )
  try:
    yield terminated
  except Exception as error:
    if received:
      print(error, file=sys.stderr)
    raise
  finally:
    # None: the handler was not set from Python and cannot be restored.
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    if received:
      leave()
