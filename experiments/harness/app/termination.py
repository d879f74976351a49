"""What SIGTERM does: the chunk under way ends, all is saved, the process exits.

Batch systems send SIGTERM before they take a machine back. The exit status is
then `EXIT_STATUS`, 75: the EX_TEMPFAIL of sysexits.h, "try again later". The
same command goes on where it stopped.
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
  """Lets SIGTERM end the process where nothing is unsaved.

  Args:
    unwind: whether to leave by `SystemExit`, for a program with something to
      put in order first. Whatever catches all exceptions can swallow that, so
      the process otherwise ends at once.
  """

  def end(number, frame):
    del number, frame
    if unwind:
      leave()
    with contextlib.suppress(Exception):
      # The signal may have come within a write to the same stream.
      sys.stdout.flush()
    os._exit(EXIT_STATUS)

  signal.signal(signal.SIGTERM, end)


def show_on_sigusr1() -> None:
  """Lets SIGUSR1 print where all threads are, for one that stands still."""
  with contextlib.suppress(ValueError, OSError, AttributeError):
    # stderr may be no file, as in a notebook.
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def ignore() -> None:
  """Lets SIGTERM change nothing more, where the process ends anyway.

  Any other handler is gone before the interpreter is.
  """
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def leave() -> NoReturn:
  """Ends the program as after a SIGTERM; a second one changes nothing."""
  ignore()
  sys.exit(EXIT_STATUS)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
  """Notes a SIGTERM, and obeys it at the end at the latest.

  Only the main thread of a process can do so; in others, the signal keeps its
  effect.

  Yields:
    A function that tells whether there was one.

  Raises:
    SystemExit: at the end, with `EXIT_STATUS`, if there was one.
  """
  # No event: its lock is not reentrant, and signals interrupt each other.
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
    # None: it was set by other than Python, and cannot be set again.
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    if received:
      leave()
