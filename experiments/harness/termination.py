"""What SIGTERM does: the chunk under way ends, all is saved, the process exits.

Batch systems send SIGTERM before they take a machine back. The exit status is
then `EXIT_STATUS`, 75: the EX_TEMPFAIL of sysexits.h, "try again later". The
same command goes on where it stopped.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

EXIT_STATUS = 75


def exit_on_sigterm() -> None:
  """Lets SIGTERM end the process where nothing is unsaved."""

  def leave(number, frame):
    del number, frame
    sys.exit(EXIT_STATUS)

  signal.signal(signal.SIGTERM, leave)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
  """Notes a SIGTERM instead of obeying it.

  Only the main thread of a process can do so; in others, the signal keeps its
  effect.

  Yields:
    A function that tells whether there was one.
  """
  received = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield received.is_set
    return
  before = signal.signal(signal.SIGTERM, lambda *_: received.set())
  try:
    yield received.is_set
  finally:
    # None: it was set by other than Python, and cannot be set again.
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
